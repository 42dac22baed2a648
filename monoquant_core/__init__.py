"""monoquant: quantize any PyTorch model and export it to the file its runtime loads.

Names are loaded on first use (PEP 562), so that ``import monoquant_core`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monoquant_core.api import calibrate as calibrate
    from monoquant_core.api import compare as compare
    from monoquant_core.api import export as export
    from monoquant_core.api import load as load
    from monoquant_core.api import open_source as open_source
    from monoquant_core.api import plan as plan
    from monoquant_core.api import quantize as quantize
    from monoquant_core.api import verify as verify
    from monoquant_core.encoding import ActivationQuant as ActivationQuant
    from monoquant_core.encoding import ElementType as ElementType
    from monoquant_core.encoding import Encoding as Encoding
    from monoquant_core.errors import MonoquantError as MonoquantError
    from monoquant_core.model import ModelInfo as ModelInfo
    from monoquant_core.model import TensorSpec as TensorSpec
    from monoquant_core.planning import Plan as Plan
    from monoquant_core.plugins import load_registry as load_registry
    from monoquant_core.quantized import QuantizedModel as QuantizedModel
    from monoquant_core.quantized import Target as Target
    from monoquant_core.quantized import save_all as save_all
    from monoquant_core.recipe import Recipe as Recipe
    from monoquant_core.recipe import Rule as Rule
    from monoquant_core.report import Progress as Progress
    from monoquant_core.report import Report as Report
    from monoquant_core.statistics import Statistics as Statistics
    from monoquant_core.stats import TensorStats as TensorStats
    from monoquant_core.tensor import QuantizedTensor as QuantizedTensor

__version__ = "0.1.0"

_HOMES = {
    "QuantizedModel": "quantized",
    "Target": "quantized",
    "calibrate": "api",
    "compare": "api",
    "export": "api",
    "load": "api",
    "open_source": "api",
    "plan": "api",
    "quantize": "api",
    "save_all": "quantized",
    "verify": "api",
    "ActivationQuant": "encoding",
    "ElementType": "encoding",
    "Encoding": "encoding",
    "MonoquantError": "errors",
    "ModelInfo": "model",
    "TensorSpec": "model",
    "Plan": "planning",
    "load_registry": "plugins",
    "Recipe": "recipe",
    "Rule": "recipe",
    "Progress": "report",
    "Report": "report",
    "Statistics": "statistics",
    "TensorStats": "stats",
    "QuantizedTensor": "tensor",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604 - strings all


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"monoquant_core.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
