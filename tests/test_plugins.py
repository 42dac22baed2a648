"""Finding plugins: a broken one is left out by name, leaves nothing behind, and the rest work."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

import pytest

from monoquant_core.declarations import ExporterDeclaration, RecipeDeclaration, SchemeDeclaration
from monoquant_core.errors import PluginError, UnknownNameError
from monoquant_core.hookspecs import HOOK_API, hookimpl, hookspec
from monoquant_core.plugins import TABLES, Registry, install_hint, load_registry

HEADER = """
from monoquant_core.declarations import *
from monoquant_core.hookspecs import hookimpl, hookspec
from monoquant_core.options import option
"""


class Site:
    """A folder of installed distributions, each with one plugin module."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(self, name: str, source: str, distribution: str = "", module: str = "") -> None:
        """A distribution whose entry point ``name`` is a module of ``source``; without it, of an earlier one."""
        distribution = distribution or f"dist-{name}"
        module = module or f"site_{self.path.name.replace('-', '_')}_{distribution.replace('-', '_')}"
        if source:
            (self.path / f"{module}.py").write_text(HEADER + textwrap.dedent(source))
        info = self.path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[monoquant]\n{name} = {module}\n")

    def found(self) -> list[EntryPoint]:
        return [ep for dist in distributions(path=[str(self.path)]) for ep in dist.entry_points]

    def load(self) -> Registry:
        return load_registry(found=self.found())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(str(tmp_path))
    for variable in ("MONOQUANT_DISABLED_PLUGINS", "MONOQUANT_STRICT_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
    before = set(sys.modules)
    yield Site(tmp_path)
    for name in set(sys.modules) - before:
        if name.startswith("site_"):
            del sys.modules[name]


def scheme(name: str, aliases: tuple[str, ...] = ()) -> str:
    return f"""
@hookimpl
def monoquant_register_schemes():
    return [SchemeDeclaration({name!r}, "One.", "nowhere:Nothing", aliases={aliases!r})]
"""


def snapshot(registry: Registry) -> dict[str, object]:
    """Everything a user can reach."""
    tables = {table: sorted(getattr(registry, table)) for _, _, table in TABLES.values()}
    return {**tables, "aliases": dict(registry.aliases), "origins": sorted(registry.origins)}


GOOD = scheme("Good", ("g1", "W9A9"))


def test_loads_what_is_installed(site: Site) -> None:
    site.install("good", GOOD)
    registry = site.load()
    assert registry.problems == []
    assert [(p.plugin, p.distribution, p.version) for p in registry.loaded] == [("good", "dist-good", "1.2")]
    for spelling in ("good", "Good", "GOOD", "g1", "w9a9", "W9A9"):
        assert registry.scheme(spelling).name == "Good"
    assert registry.origins["monoquant_register_schemes", "w9a9"] == "good"


#: a plugin that sorts after "good", and what is said of it
BROKEN = {
    "import error": (
        "import no_such_module_anywhere",
        "failed to import: ModuleNotFoundError(\"No module named 'no_such",
    ),
    "syntax error": ("def broken(:", "failed to import: SyntaxError("),
    "exit while importing": ("raise SystemExit(3)", "failed to import: SystemExit(3)"),
    "any error while importing": ("1 / 0", "failed to import: ZeroDivisionError('division by zero')"),
    "too new": (f"MONOQUANT_HOOK_API = {HOOK_API + 1}" + GOOD, f"wants hook API {HOOK_API + 1}, this monoquant has"),
    "hook raises": (
        """
        @hookimpl
        def monoquant_register_schemes():
            raise ValueError("lost\\nmy way")
        """,
        "ValueError('lost\\nmy way')",
    ),
    "hook exits": (
        """
        @hookimpl
        def monoquant_register_exporters():
            raise SystemExit("no")
        """,
        "SystemExit('no')",
    ),
    "generator breaks half-way": (
        """
        @hookimpl
        def monoquant_register_schemes():
            yield SchemeDeclaration("first", "One.", "a:B")
            raise SystemExit(1)
        """,
        "SystemExit(1)",
    ),
    "not a list": (
        """
        @hookimpl
        def monoquant_register_schemes():
            return 7
        """,
        "'int' object is not iterable",
    ),
    "wrong declaration": (
        """
        @hookimpl
        def monoquant_register_schemes():
            return [SchemeDeclaration("first", "One.", "a:B"), ExporterDeclaration("x", "One.", "a:B")]
        """,
        "monoquant_register_schemes gave ExporterDeclaration(name='x'",
    ),
    "unknown hook": (
        """
        @hookimpl
        def monoquant_register_shemes():
            return []
        """,
        "unknown hook 'monoquant_register_shemes'",
    ),
    "unknown argument": (
        """
        @hookimpl
        def monoquant_decide(proposed, machine):
            return None
        @hookimpl
        def monoquant_register_schemes():
            return [SchemeDeclaration("first", "One.", "a:B")]
        """,
        "{'machine'}",
    ),
    "bad name": (scheme("no good"), "a declared name is made of letters, digits, '_', '.' and '-', got 'no good'"),
    "bad alias": (
        scheme("fine", ("W4 A16",)),
        "a declared name is made of letters, digits, '_', '.' and '-', got 'W4 A",
    ),
    "name no text": (scheme(None), "a declared name is made of letters"),  # type: ignore[arg-type]
    "aliases that are one text": (
        scheme("fine", "W4A16"),  # type: ignore[arg-type]
        "fine: aliases are a tuple of texts, got 'W4A16'",
    ),
    "suffixes that are one text": (
        """
        @hookimpl
        def monoquant_register_sources():
            return [SourceDeclaration("fine", "One.", "a:B", suffixes=".foo")]
        """,
        "fine: suffixes are a tuple of texts, got '.foo'",
    ),
    "target without an attribute": (
        """
        @hookimpl
        def monoquant_register_schemes():
            return [SchemeDeclaration("fine", "One.", "package.module")]
        """,
        "fine: the target is 'package.module:Attribute', got 'package.module'",
    ),
    "no summary": (
        """
        @hookimpl
        def monoquant_register_schemes():
            return [SchemeDeclaration("fine", None, "a:B")]
        """,
        "fine: the summary is a text, got None",
    ),
    "a default that is none of the choices": (
        """
        from dataclasses import dataclass
        @dataclass(frozen=True)
        class Modes:
            mode: str = option("c", "Mode.", choices=("a", "b"))
        @hookimpl
        def monoquant_register_schemes():
            return [SchemeDeclaration("first", "One.", "a:B", Modes)]
        """,
        "default of Modes: mode is one of a, b, got 'c'",
    ),
    "declares one name twice": (
        """
        @hookimpl
        def monoquant_register_schemes():
            return [SchemeDeclaration("twin", "One.", "a:B"), SchemeDeclaration("Twin", "Two.", "a:B")]
        """,
        "scheme 'twin' is declared twice",
    ),
    "alias of its own other scheme": (
        """
        @hookimpl
        def monoquant_register_schemes():
            return [SchemeDeclaration("a1", "One.", "a:B"), SchemeDeclaration("a2", "Two.", "a:B", aliases=("A1",))]
        """,
        "scheme 'a1' is declared twice",
    ),
    "name of another's scheme": (scheme("gOOD"), "scheme 'good' is already registered by 'good'"),
    "name of another's alias": (scheme("w9a9"), "scheme 'w9a9' is already registered by 'good'"),
    "alias of another's name": (scheme("newer", ("Good",)), "scheme 'good' is already registered by 'good'"),
    "alias of another's alias": (scheme("newer", ("G1",)), "scheme 'g1' is already registered by 'good'"),
    "recipe before another's scheme": (
        """
        @hookimpl
        def monoquant_register_recipes():
            return [RecipeDeclaration("GOOD", "In its place.", "a:B")]
        """,
        "scheme 'good' is already registered by 'good'",
    ),
    "recipe before another's alias": (
        """
        @hookimpl
        def monoquant_register_recipes():
            return [RecipeDeclaration("g1", "In its place.", "a:B")]
        """,
        "scheme 'g1' is already registered by 'good'",
    ),
    "options that no flag can hold": (
        """
        from dataclasses import dataclass
        @dataclass(frozen=True)
        class Sizes:
            sizes: list[int] = option((), "Sizes.")
        @hookimpl
        def monoquant_register_schemes():
            return [SchemeDeclaration("first", "One.", "a:B", Sizes)]
        """,
        "Sizes.sizes: bool, int, float or str expected, got list[int]",
    ),
    "options that are no dataclass": (
        """
        @hookimpl
        def monoquant_register_schemes():
            return [SchemeDeclaration("first", "One.", "a:B", dict)]
        """,
        "options are declared in a frozen dataclass",
    ),
    "second table clashes": (
        """
        @hookimpl
        def monoquant_register_exporters():
            return [ExporterDeclaration("fresh", "One.", "a:B")]
        @hookimpl
        def monoquant_register_schemes():
            return [SchemeDeclaration("fresh", "One.", "a:B", aliases=("f1",)), SchemeDeclaration("good", "x", "a:B")]
        """,
        "scheme 'good' is already registered by 'good'",
    ),
    "respecifies a hook of the core": (
        scheme("first")
        + """
import types
@hookspec
def monoquant_decide(proposed): ...
@hookspec
def monoquant_a_new_one(): ...
MONOQUANT_HOOKSPECS = types.SimpleNamespace(
    monoquant_a_new_one=monoquant_a_new_one, monoquant_decide=monoquant_decide
)
""",
        "MONOQUANT_HOOKSPECS: hook 'monoquant_decide' is already specified",
    ),
    "hookspecs without a hook": (
        "MONOQUANT_HOOKSPECS = object()" + scheme("first"),
        "did not find any 'monoquant' hooks",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_left_out_whole(site: Site, case: str) -> None:
    source, reason = BROKEN[case]
    site.install("good", GOOD)
    alone = snapshot(site.load())
    site.install("later", source)
    site.install("zealous", scheme("zeal"))
    registry = site.load()
    (problem,) = registry.problems
    assert (problem.plugin, problem.distribution) == ("later", "dist-later")
    assert reason in problem.reason
    assert "\n" not in problem.reason
    assert [p.plugin for p in registry.loaded] == ["good", "zealous"]
    # Nothing of it is left: neither names, nor hooks that would still be called.
    assert registry.manager.get_plugin("later") is None
    assert {name for name, _ in registry.manager.list_name_plugin()} == {"good", "zealous"}
    assert registry.manager.hook.monoquant_decide(proposed=None, probes={}) is None
    assert registry.manager.hook.monoquant_decide.get_hookimpls() == []
    del registry.schemes["zeal"], registry.origins["monoquant_register_schemes", "zeal"]
    assert snapshot(registry) == alone


@pytest.mark.parametrize("hook", TABLES)
def test_a_taken_name_in_any_table_leaves_the_later_plugin_out(site: Site, hook: str) -> None:
    kind, word, table = TABLES[hook]
    source = f"""
    @hookimpl
    def {hook}():
        return [{kind.__name__}("Taken", "One.", "a:B"), {kind.__name__}("own-%s", "One.", "a:B")]
    """
    site.install("first", source % "first")
    site.install("second", source % "second")
    registry = site.load()
    assert [(p.plugin, p.reason) for p in registry.problems] == [
        ("second", f"{word} 'taken' is already registered by 'first'")
    ]
    assert list(getattr(registry, table)) == ["taken", "own-first"]
    assert snapshot(registry)[table] == ["own-first", "taken"]


def test_one_name_in_two_tables_is_no_clash(site: Site) -> None:
    """``--scheme gguf`` and ``--format gguf`` are asked in different places."""
    site.install("a", scheme("gguf"))
    site.install(
        "b",
        """
        @hookimpl
        def monoquant_register_exporters():
            return [ExporterDeclaration("gguf", "One.", "a:B")]
        """,
    )
    registry = site.load()
    assert registry.problems == []
    assert registry.scheme("gguf") is not registry.exporter("gguf")


def test_a_plugin_may_put_its_own_recipe_before_its_own_scheme(site: Site) -> None:
    """llama.cpp's Q4_0 is a tensor type and a mixture."""
    source = """
@hookimpl
def monoquant_register_recipes():
    return [RecipeDeclaration("Q4_0", "A mixture.", "a:B")]
"""
    site.install("both", scheme("q4_0") + source)
    registry = site.load()
    assert registry.problems == []
    assert registry.recipe("q4_0").name == "Q4_0"


def test_two_distributions_with_one_entry_point_name(site: Site) -> None:
    site.install("same", scheme("one"), distribution="dist-a")
    site.install("same", scheme("two"), distribution="dist-b")
    registry = site.load()
    assert [(p.plugin, p.distribution) for p in registry.loaded] == [("same", "dist-a")]
    (problem,) = registry.problems
    assert problem.distribution == "dist-b"
    assert problem.reason == "another installed distribution has an entry point of this name"
    assert set(registry.schemes) == {"one"}


def test_two_names_for_one_module(site: Site) -> None:
    site.install("aaa", scheme("one"), module="site_shared")
    site.install("bbb", "", module="site_shared")
    registry = site.load()
    assert [p.plugin for p in registry.loaded] == ["aaa"]
    assert [(p.plugin, p.reason) for p in registry.problems] == [("bbb", "is the same module as plugin 'aaa'")]
    assert set(registry.schemes) == {"one"}


def test_order_of_installation_does_not_matter(site: Site) -> None:
    site.install("a", scheme("shared", ("s",)))
    site.install("b", scheme("shared"))
    site.install("c", scheme("other", ("s",)))
    site.install("d", scheme("last"))
    results = []
    for order in itertools.permutations(site.found()):
        registry = load_registry(found=order)
        results.append((snapshot(registry), registry.loaded, registry.problems))
    assert all(result == results[0] for result in results)
    assert [p.plugin for p in results[0][1]] == ["a", "d"]


def test_a_plugin_brings_hooks_that_earlier_ones_implement(site: Site) -> None:
    """Implementers may sort before the plugin that specifies the hook."""
    implementer = """
    @hookimpl
    def monoquant_gguf_architectures(info):
        return ["llama of " + info]
    """
    site.install("architectures", implementer)
    site.install(
        "gguf",
        """
        class Hooks:
            @hookspec
            def monoquant_gguf_architectures(self, info):
                "Architectures."
        MONOQUANT_HOOKSPECS = Hooks
        """,
    )
    registry = site.load()
    assert registry.problems == []
    assert registry.manager.hook.monoquant_gguf_architectures(info="it") == [["llama of it"]]


def test_without_that_plugin_its_implementers_are_left_out(site: Site) -> None:
    site.install("architectures", "@hookimpl\ndef monoquant_gguf_architectures(info): return []\n")
    registry = site.load()
    assert [p.plugin for p in registry.problems] == ["architectures"]
    assert "unknown hook 'monoquant_gguf_architectures'" in registry.problems[0].reason


def test_a_too_new_plugin_brings_no_hooks(site: Site) -> None:
    site.install("a", "@hookimpl\ndef monoquant_fresh(): return 1\n")
    site.install(
        "b",
        f"""
        MONOQUANT_HOOK_API = {HOOK_API + 1}
        class MONOQUANT_HOOKSPECS:
            @hookspec
            def monoquant_fresh(self):
                "New."
        """,
    )
    assert [p.plugin for p in site.load().problems] == ["b", "a"]


def test_older_hook_api_is_refused_like_a_newer_one(site: Site) -> None:
    site.install("old", "MONOQUANT_HOOK_API = 0" + GOOD)
    (problem,) = site.load().problems
    assert problem.reason == f"wants hook API 0, this monoquant has {HOOK_API}"


@pytest.mark.parametrize("value", ["good", " good ,other", "other,good,"])
def test_disabled_plugins_are_not_even_imported(site: Site, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    site.install("good", "raise RuntimeError('imported')")
    site.install("kept", scheme("kept"))
    monkeypatch.setenv("MONOQUANT_DISABLED_PLUGINS", value)
    registry = site.load()
    assert registry.problems == []
    assert [p.plugin for p in registry.loaded] == ["kept"]


def test_strict_makes_the_first_problem_an_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("bad", "1 / 0")
    site.install("worse", "2 / 0")
    monkeypatch.setenv("MONOQUANT_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError) as caught:
        site.load()
    assert str(caught.value).startswith("plugin 'bad': failed to import: ZeroDivisionError")
    assert caught.value.hint == "see 'monoquant plugins list'"
    for off in ("", "0"):
        monkeypatch.setenv("MONOQUANT_STRICT_PLUGINS", off)
        assert len(site.load().problems) == 2


def test_plugins_given_in_code_come_first(site: Site) -> None:
    class Mine:
        __name__ = "mine"

        @hookimpl
        def monoquant_register_schemes(self) -> list[SchemeDeclaration]:
            return [SchemeDeclaration("good", "Mine.", "a:B")]

    site.install("good", GOOD)
    mine = Mine()
    registry = load_registry((mine,), found=site.found())
    assert registry.scheme("good").summary == "Mine."
    assert [p.plugin for p in registry.problems] == ["good"]
    assert [p.plugin for p in registry.loaded] == ["mine"]


@pytest.fixture
def registry() -> Registry:
    """Two schemes, a recipe and a format."""

    class Sample:
        __name__ = "sample"

        @hookimpl
        def monoquant_register_schemes(self) -> list[SchemeDeclaration]:
            return [
                SchemeDeclaration("int4", "Four bits.", "a:B", aliases=("W4A16",)),
                SchemeDeclaration("Q8_0", "Eight bits.", "a:B"),
            ]

        @hookimpl
        def monoquant_register_recipes(self) -> list[RecipeDeclaration]:
            return [RecipeDeclaration("Q4_K_M", "Mixture.", "a:B")]

        @hookimpl
        def monoquant_register_exporters(self) -> list[ExporterDeclaration]:
            return [ExporterDeclaration("safetensors", "Files.", "a:B")]

    registry = load_registry((Sample(),), found=())
    assert registry.problems == []
    return registry


@pytest.mark.parametrize(
    ("table", "name", "message", "hint"),
    [
        ("scheme", "int44", "no scheme 'int44'; installed: Q8_0, int4", "did you mean 'int4'?"),
        ("scheme", "W4A61", "no scheme 'W4A61'", "did you mean 'w4a16'?"),
        ("scheme", "q80", "no scheme 'q80'", "did you mean 'Q8_0'?"),
        ("recipe", "q4_k_s", "no recipe 'q4_k_s'; installed: Q4_K_M", "did you mean 'Q4_K_M'?"),
        ("exporter", "safetensor", "no format 'safetensor'; installed: safetensors", "did you mean 'safetensors'?"),
        ("calibrator", "minmax", "no calibrator 'minmax'; installed: none", "extras that bring plugins: monoquant["),
        ("runtime", "ort", "no runtime 'ort'; installed: none", "extras that bring plugins: monoquant["),
    ],
)
def test_unknown_names_have_a_hint(registry: Registry, table: str, name: str, message: str, hint: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        getattr(registry, table)(name)
    assert message in str(caught.value)
    assert caught.value.hint.startswith(hint)


def test_unknown_names_mention_what_failed_to_load(site: Site) -> None:
    site.install("bad", "1 / 0")
    with pytest.raises(UnknownNameError) as caught:
        site.load().exporter("xyz")
    assert caught.value.hint == "1 plugin(s) failed to load; see 'monoquant plugins list'"


def test_only_real_extras_are_suggested() -> None:
    assert install_hint("safetensors") == "try: pip install 'monoquant[safetensors]'"
    assert install_hint("SafeTensors") == "try: pip install 'monoquant[safetensors]'"
    for name in ("tensorrt", "all", "x'; rm -rf"):
        assert install_hint(name).startswith("extras that bring plugins: monoquant[")
        assert name not in install_hint(name)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module:Thing", "no_such_module:Thing cannot be imported: ModuleNotFoundError"),
        ("json:NoSuchThing", "json:NoSuchThing cannot be imported: AttributeError"),
        ("site_exits:Thing", "site_exits:Thing cannot be imported: SystemExit"),
    ],
)
def test_a_target_that_cannot_be_imported(site: Site, target: str, reason: str) -> None:
    (site.path / "site_exits.py").write_text("raise SystemExit(1)")
    with pytest.raises(PluginError) as caught:
        SchemeDeclaration("lost", "One.", target).load()
    assert reason in str(caught.value)


def test_an_installed_broken_plugin_is_seen_and_survived(site: Site) -> None:
    """The real entry points of a fresh process, with two more distributions on its path."""
    site.install("aaa-broken", "raise SystemExit(5)")
    site.install("zzz-fine", scheme("zzz"))
    code = (
        "from monoquant_core.plugins import load_registry\n"
        "r = load_registry()\n"
        "print([p.plugin for p in r.problems], 'zzz' in r.schemes, 'zzz-fine' in [p.plugin for p in r.loaded])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(site.path)}
    )
    assert done.stdout.strip() == "['aaa-broken'] True True"


def test_hook_markers_are_the_projects() -> None:
    """A hookspec of another pluggy project is none of ours."""
    assert hookspec.project_name == hookimpl.project_name == "monoquant"
