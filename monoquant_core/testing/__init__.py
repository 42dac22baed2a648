"""The conformance kit: what every plugin must do, as test classes to subclass.

Switched on in a plugin's ``conftest.py`` with ``pytest_plugins = ["monoquant_core.testing.plugin"]``; needs pytest.
``monoquant conformance NAME`` runs the same checks on an installed plugin without any code.
"""

from __future__ import annotations

import pytest

# Before they are imported: asserts in the kit show values as those in a test file do.
pytest.register_assert_rewrite(
    *(f"{__name__}.{name}" for name in ("calibrators", "checks", "declarations", "exporters", "quantizers"))
)

from monoquant_core.testing.calibrators import CalibratorConformance  # noqa: E402
from monoquant_core.testing.declarations import PluginConformance  # noqa: E402
from monoquant_core.testing.exporters import ExporterConformance  # noqa: E402
from monoquant_core.testing.quantizers import QuantizerConformance  # noqa: E402

__all__ = ["CalibratorConformance", "ExporterConformance", "PluginConformance", "QuantizerConformance"]
