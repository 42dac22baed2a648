"""The format against the conformance kit: every sample encoding as onnx's own reference implementation reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from monoquant_onnx.exporter import OnnxExporter
from monoquant_onnx.plugin import OnnxOptions
from onnx.reference import ReferenceEvaluator

from monoquant_core.testing import ExporterConformance, PluginConformance
from monoquant_core.testing.samples import ShapeSample

OUT = ":out"


def as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


class TestPlugin(PluginConformance):
    plugin = "onnx"


class TestOneFile(ExporterConformance):
    """Files with everything in them."""

    suffix = ".onnx"
    limit = 1 << 30

    @pytest.fixture
    def exporter(self) -> OnnxExporter:
        return OnnxExporter(OnnxOptions(max_inline=self.limit))

    def read_back(self, path: Path) -> dict[str, torch.Tensor]:
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path)
        names = [output.name.removesuffix(OUT) for output in model.graph.output]
        return dict(zip(names, map(as_torch, ReferenceEvaluator(model).run(None, {})), strict=True))


class TestTwoFiles(TestOneFile):
    """Files with their data beside them, as above 2 GB. What does not depend on files is tested above."""

    limit = 0
    shapes = (
        ShapeSample("matrix", (48, 256), "linear", "Linear"),
        ShapeSample("odd matrix", (13, 77), "linear", "Linear"),
    )


for name in dir(TestTwoFiles):
    if name.startswith("test_") and name not in ("test_holds_means_it", "test_bytes_are_the_same"):
        setattr(TestTwoFiles, name, None)
