"""What monoquant-probes registers."""

from __future__ import annotations

from collections.abc import Iterable

from monoquant_core.declarations import ProbeDeclaration
from monoquant_core.hookspecs import hookimpl


@hookimpl
def monoquant_register_probes() -> Iterable[ProbeDeclaration]:
    """Hardware first, then the programs that run finished files."""
    return [
        ProbeDeclaration("cpu", "Instruction sets, cores and memory", "monoquant_probes.cpu:CpuProbe"),
        ProbeDeclaration("cuda", "NVIDIA GPUs that torch sees", "monoquant_probes.torch_devices:CudaProbe"),
        ProbeDeclaration("rocm", "AMD GPUs that torch sees", "monoquant_probes.torch_devices:RocmProbe"),
        ProbeDeclaration("mps", "Apple GPUs that torch sees", "monoquant_probes.torch_devices:MpsProbe"),
        ProbeDeclaration("xpu", "Intel GPUs that torch sees", "monoquant_probes.torch_devices:XpuProbe"),
        ProbeDeclaration(
            "transformers", "transformers with compressed-tensors", "monoquant_probes.runtimes:TransformersProbe"
        ),
        ProbeDeclaration("vllm", "vLLM", "monoquant_probes.runtimes:VllmProbe"),
        ProbeDeclaration(
            "onnxruntime", "ONNX Runtime and its execution providers", "monoquant_probes.runtimes:OnnxRuntimeProbe"
        ),
        ProbeDeclaration("llama.cpp", "Python bindings of llama.cpp", "monoquant_probes.runtimes:LlamaCppProbe"),
    ]
