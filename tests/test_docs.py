"""The documentation: complete, fresh, without dead links, and its examples run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import monoquant_core as mq
from monoquant_core import declarations, errors, hookspecs, testing
from monoquant_core.cli import main
from monoquant_core.options import option_infos
from monoquant_core.plugins import load_registry
from monoquant_core.recipe import load_recipe
from monoquant_core.tensor import QuantizedTensor

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("plugins/*/README.md")])
MADE_BY_BENCH = DOCS / "performance.md"


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_at(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gen_docs() -> ModuleType:
    return module_at("gen_docs", ROOT / "tools" / "gen_docs.py")


@pytest.fixture(scope="module")
def text() -> str:
    return "\n".join(path.read_text() for path in DOCS.rglob("*.md"))


# --- complete ---


def test_generated_pages_are_fresh(gen_docs: ModuleType) -> None:
    stale = [ids(path) for path, page in gen_docs.pages().items() if path.read_text() != page]
    assert stale == [], "run: make docs"


def test_every_hook_is_documented() -> None:
    page = (DOCS / "plugins" / "hooks.md").read_text()
    hooks = [name for name in vars(load_registry().manager.hook) if name.startswith("monoquant_")]  # of plugins, too
    assert set(hooks) >= {name for name in vars(hookspecs) if name.startswith("monoquant_")} | {
        "monoquant_gguf_architectures"
    }
    assert [name for name in hooks if f"`{name}" not in page] == []


def test_every_declaration_and_its_fields_are_documented() -> None:
    page = (DOCS / "plugins" / "hooks.md").read_text()
    classes = [c for c in vars(declarations).values() if inspect.isclass(c) and issubclass(c, declarations.Declaration)]
    assert [c.__name__ for c in classes if c is not declarations.Declaration and c.__name__ not in page] == []
    fields = {f.name for c in classes for f in dataclasses.fields(c)}
    assert [name for name in fields if f"`{name}`" not in page] == []


def test_every_error_is_documented() -> None:
    page = (DOCS / "errors.md").read_text()
    classes = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, Exception)]
    assert errors.MonoquantError in classes
    assert [c.__name__ for c in classes if f"| `{c.__name__}` |" not in page] == []


def test_every_public_name_of_the_api_is_documented() -> None:
    page = (DOCS / "api.md").read_text()
    assert [name for name in mq.__all__ if name not in page] == []
    methods = [name for name in vars(mq.QuantizedModel) if not name.startswith("_")]
    assert [name for name in methods if f"`{name}" not in page and f".{name}(" not in page] == []
    functions = [f for f in (getattr(mq, name) for name in mq.__all__) if inspect.isfunction(f)]
    functions += [getattr(mq.QuantizedModel, name) for name in methods]
    assert {mq.quantize, mq.calibrate, mq.verify, mq.QuantizedModel.save} <= set(functions)
    for function in (*functions, mq.Target):
        for parameter in set(inspect.signature(function).parameters) - {"self"}:
            assert re.search(rf"([`(*]|, ){parameter}[`=(),]", page), f"{function}: {parameter}"


def test_every_class_of_the_kit_is_documented() -> None:
    page = (DOCS / "plugins" / "testing.md").read_text()
    assert [name for name in testing.__all__ if name not in page] == []


def test_every_command_is_documented(gen_docs: ModuleType) -> None:
    page = (DOCS / "cli.md").read_text()
    import typer

    from monoquant_core.cli.app import build_app

    root: Any = typer.main.get_command(build_app(gen_docs.own_registry()))
    names = [name for name, _ in gen_docs.commands(root)]
    assert {"quantize", "export", "plan", "inspect", "compare", "plugins list", "schemes show", "doctor"} <= set(names)
    assert [name for name in names if f"\n## monoquant {name}\n" not in page] == []


def test_everything_that_plugins_declare_is_documented(gen_docs: ModuleType) -> None:
    page = (DOCS / "options.md").read_text()
    registry = gen_docs.own_registry()
    tables = (registry.schemes, registry.exporters, registry.recipes, registry.sources, registry.probes)
    for declared in [d for table in tables for d in table.values()]:
        _, _, section = page.partition(f"\n### {declared.name}\n")
        section = re.split(r"\n##+ ", section)[0]
        assert section, f"{declared.name} has no section"
        for info in option_infos(declared.options):
            assert f"| `{info.name}` | `{info.flag}` |" in section, f"{declared.name}: {info.name}"
        for alias in getattr(declared, "aliases", ()):
            assert f"`{alias}`" in section
    assert {d.name for d in registry.schemes.values()} >= {"int8", "int4", "fp8", "w8a8", "float16", "bfloat16"}


@pytest.mark.parametrize("plugin", sorted(p.parent for p in ROOT.glob("plugins/*/pyproject.toml")), ids=ids)
def test_plugin_readmes_name_what_the_plugin_adds(plugin: Path, gen_docs: ModuleType) -> None:
    page = (plugin / "README.md").read_text()
    registry = gen_docs.own_registry()
    names = {e.name for e in entry_points(group="monoquant") if e.dist and e.dist.name == plugin.name}
    for attribute in gen_docs.SECTIONS:
        hook = "monoquant_register_" + attribute
        for key, declared in getattr(registry, attribute).items():
            if registry.origins[hook, key] in names:
                assert f"`{declared.name}`" in page, f"{attribute}: {declared.name}"
                assert [i.name for i in option_infos(declared.options) if i.name not in page] == []
    assert "```" in page, "one example"


#: keys whose values are by names that are not ours
MAPS = ("files", "points", "counts", "probes", "schemes", "formats", "provides")
WHOLE = ("metadata", "facts", "encoding")  #: whose insides are not described


def paths(value: Any, path: str = "") -> Iterator[str]:
    """Keys of a document as docs/json.md writes them; a list without entries ends in ``[]``."""
    name = path.rpartition(".")[2]
    if isinstance(value, dict) and name not in WHOLE:
        for key, inner in value.items():
            yield from paths(inner, f"{path}.{'*' if name in MAPS else key}".lstrip("."))
    elif isinstance(value, list) and (not value or isinstance(value[0], dict)):
        for inner in value:
            yield from paths(inner, f"{path}[]")
        if not value:
            yield f"{path}[]"
    else:
        yield path


def test_json_of_every_command_is_documented(llama: Path, in_tmp: Path) -> None:
    np.savez("ids.npz", input_ids=np.random.default_rng(0).integers(0, 96, (8, 12)))
    sections = re.split(r"\n## ", (DOCS / "json.md").read_text())[1:]
    documented = {
        section.partition("\n")[0]: {
            path for row in re.findall(r"(?m)^\| (`.*?) \|", section) for path in re.findall(r"`(.+?)`", row)
        }
        for section in sections
    }
    mixed = f"{llama} --scheme int4 --group-size 32"
    commands = {
        "plan, and --dry-run": [f"plan {mixed}", f"plan {llama} --format gguf --scheme Q8_0 --tokenizer none"],
        "quantize and export": [f"quantize {mixed} -o int4", "export int4 -o copy"],
        "calibrate": [f"calibrate {llama} --data ids.npz -o stats.safetensors"],
        "inspect": ["inspect int4"],
        "compare": [f"compare {llama} int4"],
        "verify": [f"verify int4 --against {llama} --data ids.npz"],
        "doctor": ["doctor"],
        "plugins list": ["plugins list"],
        "schemes, formats, recipes and calibrators": ["schemes list", "formats list", "recipes list"],
    }
    assert commands.keys() == documented.keys()
    for title, lines in commands.items():
        found = {
            p.removeprefix("[].") for line in lines for p in paths(json.loads(command(f"monoquant {line} --json")))
        }
        empty = {p.removesuffix("[]") for p in found if p.endswith("[]")}
        found = {p for p in found if not p.endswith("[]")}
        wanted, inside = documented[title], tuple(f"{p}[]" for p in empty)
        assert found - wanted == set(), title
        assert [p for p in empty if p not in wanted and not any(w.startswith(f"{p}[]") for w in wanted)] == [], title
        assert [p for p in wanted - found if p not in empty and not p.startswith(inside)] == [], title


def test_every_environment_variable_is_documented() -> None:
    sources = [*(ROOT / "monoquant_core").rglob("*.py"), *ROOT.glob("plugins/*/src/**/*.py")]
    used = {
        name for path in sources for name in re.findall(r"environ[^\n]*[\"'](MONOQUANT_\w+)[\"']", path.read_text())
    }
    assert len(used) >= 2
    page = (DOCS / "cli.md").read_text()
    assert [name for name in used if f"`{name}`" not in page] == []


def test_architecture_has_every_module_in_its_layer() -> None:
    layers: list[set[str]] = module_at("layers_under_test", Path(__file__).with_name("test_imports.py")).LAYERS
    found: dict[str, int] = {}
    layer = 0
    for line in (DOCS / "architecture.md").read_text().splitlines():
        if row := re.match(r"\| (\d*) ?\| (`[a-z_`, ]+`) \| ", line):
            layer = int(row[1] or layer)
            found |= dict.fromkeys(re.findall(r"`(\w+)`", row[2]), layer)
    modules = {p.stem for p in (ROOT / "monoquant_core").glob("*.py")} - {"__init__"}
    assert found.keys() >= modules
    assert {name: level + 1 for level, names in enumerate(layers) for name in names if name in found} == found


def test_every_core_folder_is_in_the_architecture() -> None:
    page = (DOCS / "architecture.md").read_text()
    folders = [p.parent.relative_to(ROOT) for p in (ROOT / "monoquant_core").glob("*/__init__.py")]
    assert [str(f) for f in folders if f"`{f}/`" not in page] == []


# --- coherent ---


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert ROOT in linked.parents, f"{target} leaves the repository"
        assert linked.exists() or linked == MADE_BY_BENCH, f"{target} does not exist"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", linked.read_text())
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{target}: no such heading"


def test_every_page_is_reachable_from_the_index() -> None:
    seen, todo = set(), [DOCS / "index.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s:]+\.md)[^)]*\)", page.read_text())
        todo += [p for link in links if (p := (page.parent / link).resolve()).exists() and p not in seen]
    assert [ids(p) for p in DOCS.rglob("*.md") if p not in seen and p != MADE_BY_BENCH] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_pages_name_no_place_of_this_machine(page: Path) -> None:
    assert not re.search(r"/work/|/tmp/|/root/|/home/", page.read_text())


# --- examples run ---

RUNS = "<!-- runs -->"


def blocks(page: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Language and text of the examples that say that they run, and the lines that the page says they print."""
    for part in page.read_text().split(RUNS)[1:]:
        example = re.match(r"\n```(\w+)\n(.*?)```", part, re.DOTALL)
        assert example is not None, f"{page}: {part[:40]}"
        printed = re.search(r"\n\n```\n(.*?)```", part, re.DOTALL)
        yield example[1], example[2], printed[1].splitlines() if printed else []


def files_in(page: Path) -> dict[str, str]:
    """Examples that begin with the name of the file they are."""
    found = re.findall(r"```\w+\n# file: (\S+)\n(.*?)```", page.read_text(), re.DOTALL)
    return dict(found)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(line: str) -> str:
    """Run a command line here, of monoquant or of python; it must succeed."""
    words = shlex.split(line, comments=True)
    if words[0] == "python":
        return subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=True).stdout
    assert words[0] == "monoquant", line
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            status = main(words[1:])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert status == 0, line
    return printed.getvalue()


WITH_EXAMPLES = [page for page in PAGES if RUNS in page.read_text()]


def test_the_main_pages_have_examples_that_run() -> None:
    assert {ROOT / "README.md", DOCS / "quickstart.md", DOCS / "api.md"} <= set(WITH_EXAMPLES)


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=ids)
def test_examples_run(page: Path, in_tmp: Path, request: pytest.FixtureRequest) -> None:
    # The tutorials are about one model; the other pages are about any.
    about_minilm = ("quickstart.md", "howto-gguf.md", "calibration.md", "tutorial-encoder.md")
    fixture = "minilm" if page.name in about_minilm else "llama"
    (in_tmp / "model").symlink_to(request.getfixturevalue(fixture))
    (in_tmp / "text.txt").write_text("\n".join(other.read_text() for other in PAGES))
    for name, content in files_in(page).items():
        (in_tmp / name).write_text(content)
    namespace: dict[str, Any] = {"__name__": "example"}
    for language, example, shown in blocks(page):
        if language == "sh":
            lines = filter(None, example.replace("\\\n", " ").splitlines())
            printed = "".join(map(command, lines)).splitlines()
            # What onnxruntime computes depends on the processor, what files hold does not.
            exact = [
                s for s in shown if page.name == "quickstart.md" or s.startswith(("wrote ", "  size ", "  weights "))
            ]
            assert [s for s in exact if s not in printed and s.strip() != "..."] == []
        elif language == "toml":
            Path("recipe.toml").write_text(example)
            load_recipe("recipe.toml")
        else:
            assert language == "python"
            exec(compile(example, str(page), "exec"), namespace)


def test_the_quickstart_prints_what_the_readme_shows(minilm: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "quickstart.py", "--out", tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = re.search(r"(?ms)^model  on disk.*?^w8a8[^\n]*", (ROOT / "README.md").read_text())
    printed = re.search(r"(?ms)^model  on disk.*?^w8a8[^\n]*", done.stdout)
    assert shown is not None
    assert printed is not None, done.stdout
    # Sizes are exact, cosines depend on the processor's kernels, time and memory on the machine.
    sizes = [re.findall(r"^\w+ +([\d.]+) MB", table[0], re.MULTILINE) for table in (shown, printed)]
    assert sizes[0] == sizes[1]
    cosines = [[float(c) for c in re.findall(r"([\d.]+) (?:mean|worst)", table[0])] for table in (shown, printed)]
    assert len(cosines[1]) == 8
    # Inputs in 8 bits differ by kernels of onnxruntime, and most where a sentence is one word.
    assert cosines[1] == pytest.approx(cosines[0], abs=1e-2)
    assert cosines[1][:6] == pytest.approx(cosines[0][:6], abs=2e-3)
    assert min(cosines[1][0], cosines[1][4]) >= 0.999
    assert cosines[1][6] >= 0.99


def test_recipe_examples_parse() -> None:
    examples = re.findall(r"```toml\n(.*?)```", (DOCS / "recipes.md").read_text(), re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        assert load_recipe(tomllib.loads(example)).rules


@pytest.fixture(scope="module")
def ternary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The plugin of docs/plugins/writing.md."""
    path = tmp_path_factory.mktemp("ternary") / "monoquant_ternary.py"
    path.write_text(files_in(DOCS / "plugins" / "writing.md")[path.name])
    yield module_at("monoquant_ternary", path)
    del sys.modules["monoquant_ternary"]


def test_the_plugin_that_the_docs_write_works(ternary: ModuleType, llama: Path, in_tmp: Path) -> None:
    registry = load_registry(extra=(ternary,))
    assert not registry.problems
    with mq.quantize(llama, scheme="ternary", options={"group_size": 32}, registry=registry) as model:
        model.save("out", format_options={"convention": "generic"})
        name = "model.layers.0.mlp.down_proj.weight"
        made = dict(model.tensors())[name]
    assert isinstance(made, QuantizedTensor)
    assert set(made.codes.flatten().tolist()) == {-1, 0, 1}
    with mq.load("out") as loaded:  # the plugin is not in this registry
        read = dict(loaded.tensors())[name]
    assert isinstance(read, QuantizedTensor)
    assert read.equal(made)


def test_the_plugin_that_the_docs_write_passes_the_kit(ternary: ModuleType, tmp_path: Path) -> None:
    for name, content in files_in(DOCS / "plugins" / "testing.md").items():
        (tmp_path / name).write_text(content)
    (tmp_path / "monoquant_ternary.py").write_text(Path(str(ternary.__file__)).read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", "TestTernary", tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.findall(r"SKIPPED .*: (.*)", done.stdout) == ["has no with_ranges"]


def test_the_project_that_the_docs_write_has_its_entry_point() -> None:
    project = tomllib.loads(files_in(DOCS / "plugins" / "writing.md")["pyproject.toml"])["project"]
    assert project["entry-points"]["monoquant"] == {"ternary": "monoquant_ternary"}
