"""``--format safetensors``: which of the two conventions a model gets. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from monoquant_core.errors import PlanError
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_safetensors.compressed_tensors import CompressedTensorsExporter
from monoquant_safetensors.generic import GenericExporter
from monoquant_safetensors.plugin import SafetensorsOptions
from monoquant_safetensors.recipe import is_linear
from monoquant_safetensors.sizes import parse_size


class SafetensorsExporter(GenericExporter):
    """The generic convention, until :meth:`resolve` has seen the model."""

    def __init__(self, options: SafetensorsOptions) -> None:
        super().__init__(parse_size(options.max_shard_size, owner="--max-shard-size"))
        self._convention = options.convention
        self.of_checkpoints = options.convention != "generic"

    def resolve(self, specs: Sequence[TensorSpec], info: ModelInfo) -> CompressedTensorsExporter | GenericExporter:
        """The convention for this model.

        :raises PlanError: when compressed-tensors was asked for and the source is no transformers model folder.
        """
        if self._convention == "generic":
            return GenericExporter(self._max_shard)
        if info.model_type is not None and (
            self._convention != "auto" or any(is_linear(spec) and spec.kind != "head" for spec in specs)
        ):
            return CompressedTensorsExporter(self._max_shard, specs, info)
        if self._convention == "auto":
            return GenericExporter(self._max_shard)
        raise PlanError(
            f"{info.name}: compressed-tensors is for model folders of transformers: config.json with a model_type",
            hint="--convention generic holds any model",
        )
