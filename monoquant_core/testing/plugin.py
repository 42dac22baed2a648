"""The pytest plugin of the kit: ``pytest_plugins = ["monoquant_core.testing.plugin"]`` in your ``conftest.py``."""

from __future__ import annotations

import re
from typing import Any

import pytest

from monoquant_core.declarations import Declaration
from monoquant_core.exporters import Exporter
from monoquant_core.model import ModelInfo
from monoquant_core.options import build
from monoquant_core.plugins import Registry, load_registry
from monoquant_core.testing import (
    CalibratorConformance,
    ExporterConformance,
    PluginConformance,
    QuantizerConformance,
)
from monoquant_core.testing.declarations import declared_by, variants

_chosen = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--monoquant-plugin``, which ``monoquant conformance`` uses."""
    parser.addoption("--monoquant-plugin", default="", help="Entry-point name of an installed plugin to check.")


def pytest_configure(config: pytest.Config) -> None:
    """Remember the plugin to check, for the test file that is bundled."""
    global _chosen  # noqa: PLW0603
    _chosen = config.getoption("--monoquant-plugin")


@pytest.fixture(scope="session")
def monoquant_registry() -> Registry:
    """The plugins installed in this environment."""
    return load_registry()


def chosen_plugin() -> str:
    """What ``--monoquant-plugin`` names, or nothing."""
    return _chosen


def conformance_classes(plugin: str) -> dict[str, type]:
    """Test classes for everything that an installed plugin declares: ``globals().update(conformance_classes("int"))``.

    Schemes, calibrators and formats run with their default options and with each option changed alone.
    """
    registry = load_registry()
    classes: dict[str, type] = {"TestPlugin": type("TestPlugin", (PluginConformance,), {"plugin": plugin})}
    for hook, declaration in declared_by(registry, plugin):
        make = _CLASSES.get(hook)
        if make is not None:
            word = hook.removeprefix("monoquant_register_").removesuffix("s").title()
            name = f"Test{word}_{re.sub('[^0-9A-Za-z]', '_', declaration.name)}"
            classes.setdefault(name, make(name, declaration))
    return classes


def _bound(name: str, base: type, fixture: str, declaration: Declaration, *, called: bool, **members: Any) -> type:
    """A conformance class whose fixture goes through the declaration's options, each changed alone."""
    options = dict(variants(declaration))

    @pytest.fixture(params=list(options), name=fixture)
    def bound(self: Any, request: pytest.FixtureRequest) -> Any:
        def construct() -> Any:
            return declaration.load()(build(declaration.options, options[request.param], owner=declaration.name))

        return construct() if called else construct

    return type(name, (base,), {fixture: bound, **members})


def _quantizer(name: str, declaration: Declaration) -> type:
    return _bound(name, QuantizerConformance, "quantizer", declaration, called=True)


def _calibrator(name: str, declaration: Declaration) -> type:
    return _bound(name, CalibratorConformance, "make", declaration, called=False)


def _exporter(name: str, declaration: Declaration) -> type:
    @pytest.fixture(autouse=True)
    def takes_the_sample(self: ExporterConformance, exporter: Exporter, info: ModelInfo) -> None:
        # Formats for certain architectures need an ``info`` of such a model, which a class of their own gives.
        if reason := self.refusal(exporter, info):
            pytest.skip(f"takes other models than the kit's: {reason}")

    members = {"suffix": getattr(declaration, "suffix", ""), "takes_the_sample": takes_the_sample}
    return _bound(name, ExporterConformance, "exporter", declaration, called=True, **members)


_CLASSES = {
    "monoquant_register_schemes": _quantizer,
    "monoquant_register_calibrators": _calibrator,
    "monoquant_register_exporters": _exporter,
}
