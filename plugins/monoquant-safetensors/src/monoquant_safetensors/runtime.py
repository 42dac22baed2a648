"""compressed-tensors folders in transformers, for verification."""

from __future__ import annotations

from pathlib import Path

from monoquant_core.containers.folder import read_config
from monoquant_core.declarations import NoOptions
from monoquant_core.errors import MonoquantError, SourceError
from monoquant_core.graphs import module_of
from monoquant_core.model import Source
from monoquant_core.module_runner import ModuleGraph
from monoquant_core.runners import Runner
from monoquant_core.sources import open_source
from monoquant_core.verification import reference

EXACT = 1e-4  #: transformers decompresses weights to the values of the IR and multiplies floats, as the reference does
SIMULATED = 0.2  #: it quantizes the inputs of layers to 8 bits, which the reference does not

HINT = "the notes of plan and of the report say what transformers loads only with dequantize=True, or not at all"


class TransformersRuntime:
    """Loads a folder with the class that its config.json names, as its users do."""

    def __init__(self, options: NoOptions) -> None:
        del options

    def recognises(self, path: Path) -> bool:
        """A model folder that config.json says transformers reads."""
        try:
            return path.is_dir() and isinstance((read_config(path) or {}).get("model_type"), str)
        except MonoquantError:
            return False

    def open(self, path: Path) -> Runner:
        """The folder in transformers.

        :raises CalibrationError: without transformers.
        :raises SourceError: when it does not load, or with keys missing or left over.
        """
        source = open_source(path)
        try:
            return ModuleGraph(module_of(source), str(path)).runner(())
        except SourceError as exc:
            raise SourceError(str(exc), hint=exc.hint or HINT) from exc
        finally:
            source.close()

    def reference(self, original: Source, finished: Source | None) -> Runner:
        """The original model, with the dequantized values of the finished folder where it is given."""
        return reference(original, finished)

    def tolerance(self, finished: Source) -> float:
        """Exact where only weights are quantized."""
        return SIMULATED if any(spec.activation is not None for spec in finished.specs()) else EXACT
