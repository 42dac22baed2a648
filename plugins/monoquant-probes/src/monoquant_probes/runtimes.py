"""Programs that run finished files: which are installed, and what they do with each format and scheme."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

from monoquant_core.declarations import NoOptions
from monoquant_core.probes import Finding, ProbeResult
from monoquant_probes import instructions
from monoquant_probes.names import CASTS, GGML_TYPES, WEIGHT_ONLY


def installed(*distributions: str) -> dict[str, str]:
    """Versions of those that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class RuntimeProbe:
    """Base of the probes here."""

    def __init__(self, options: NoOptions) -> None:
        del options


class TransformersProbe(RuntimeProbe):
    """transformers reads the compressed-tensors layout with the help of the library of that name."""

    def probe(self) -> ProbeResult:
        """Versions; nothing is imported."""
        found = installed("transformers", "compressed-tensors")
        missing = [name for name in ("transformers", "compressed-tensors") if name not in found]
        shown = ", ".join(f"{name} {number}" for name, number in found.items())
        if missing:
            finding = Finding("no", f"{' and '.join(missing)} not installed", f"pip install {' '.join(missing)}")
            summary = f"not here: {' and '.join(missing)} not installed" + (f" ({shown} is)" if shown else "")
            return ProbeResult(
                "transformers", False, summary, facts={"versions": found}, findings={"format:safetensors": finding}
            )
        # Both libraries decompress before the first product (transformers 5.23, compressed-tensors 0.20), except
        # float8 on GPUs from compute capability 8.9 on, with use_optimized_inference.
        whole = Finding("slow", "decompressed on the first forward pass: a smaller file, the speed and memory of float")
        simulated = Finding("slow", "decompressed, and activations quantized in simulation: a smaller file, no speed")
        found_schemes = {f"scheme:{name}": whole for name in WEIGHT_ONLY}
        found_schemes |= {"scheme:w8a8": simulated, "scheme:fp8": simulated}
        found_schemes |= {f"scheme:{name}": Finding("fast", "loaded as it is") for name in CASTS}
        return ProbeResult(
            "transformers",
            True,
            shown,
            facts={"versions": found},
            findings={"format:safetensors": whole, **found_schemes},
        )


class VllmProbe(RuntimeProbe):
    """vLLM has kernels for the compressed-tensors layout."""

    def probe(self) -> ProbeResult:
        """Its version, and the GPU that torch reports."""
        found = installed("vllm")
        if not found:
            finding = Finding("no", "vLLM not installed", "pip install vllm (Linux; see https://docs.vllm.ai)")
            return ProbeResult("vllm", False, "not here: not installed", findings={"format:safetensors": finding})
        number = found["vllm"]
        try:
            capability = _cuda_capability()
        except Exception as exc:  # noqa: BLE001 - a broken driver must not hide the rest
            return ProbeResult("vllm", True, f"vllm {number}; torch could not be asked for a GPU: {exc!r}")
        if capability is not None:
            where, schemes = f"compute capability {capability[0]}.{capability[1]}", vllm_findings(capability)
        elif "cpu" in number:  # the CPU build's version ends in +cpu
            where, schemes = "built for the CPU", vllm_cpu_findings()
        else:
            where, schemes = "no CUDA GPU, and not the CPU build", {}
        fast = any(finding.speed == "fast" for finding in schemes.values())
        reason = f"{where}; its kernels are listed by scheme" if schemes else f"{where}: what it runs on is not known"
        return ProbeResult(
            "vllm",
            True,
            f"vllm {number}, {where}",
            facts={"versions": found, "capability": list(capability) if capability else None},
            findings={"format:safetensors": Finding("fast" if fast else "slow", reason), **schemes},
        )


def vllm_cpu_findings() -> dict[str, Finding]:
    """Kernels of vLLM 0.33's CPU build."""
    kernel = Finding("fast", "vLLM's CPU build has a kernel")
    none = Finding("no", "vLLM's CPU build has kernels for 4-bit weights, int8 activations and float8 only")
    found = {f"scheme:{name}": kernel if name == "int4" else none for name in WEIGHT_ONLY}
    return {**found, **dict.fromkeys((f"scheme:{name}" for name in ("w8a8", "fp8", *CASTS)), kernel)}


def vllm_findings(capability: tuple[int, int]) -> dict[str, Finding]:
    """vLLM 0.33's choice of kernels by compute capability."""
    shown = f"compute capability {capability[0]}.{capability[1]}"

    def needs(least: tuple[int, int], otherwise: str = "") -> Finding:
        if capability >= least:
            return Finding("fast", f"kernels for {shown}")
        return Finding("slow" if otherwise else "no", otherwise or f"needs {least[0]}.{least[1]}, this is {shown}")

    found = {f"scheme:{name}": needs((7, 5)) for name in WEIGHT_ONLY}
    found["scheme:w8a8"] = needs((7, 5))
    if capability >= (10, 0):
        found["scheme:w8a8"] = Finding("no", f"vLLM has no int8 kernels from 10.0 on, this is {shown}; use fp8")
    found["scheme:fp8"] = needs((8, 9), "" if capability < (7, 5) else "weights only: float8 products need 8.9")
    found["scheme:float16"], found["scheme:bfloat16"] = needs((7, 0)), needs((8, 0))
    return found


def _cuda_capability() -> tuple[int, int] | None:
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return major, minor


class OnnxRuntimeProbe(RuntimeProbe):
    """ONNX Runtime, under whichever of its distribution names."""

    def probe(self) -> ProbeResult:
        """Its version, and its execution providers by asking it."""
        if find_spec("onnxruntime") is None:
            finding = Finding("no", "ONNX Runtime not installed", "pip install onnxruntime")
            return ProbeResult("onnxruntime", False, "not here: not installed", findings={"format:onnx": finding})
        try:
            import onnxruntime

            number, providers = onnxruntime.__version__, list(onnxruntime.get_available_providers())
        except Exception as exc:  # noqa: BLE001 - a native library may fail in any way while loading
            reason = f"installed, but does not import: {exc!r}"
            finding = Finding("no", reason)
            return ProbeResult("onnxruntime", False, f"not here: {reason}", findings={"format:onnx": finding})
        short = [name.removesuffix("ExecutionProvider") for name in providers]
        return ProbeResult(
            "onnxruntime",
            True,
            f"onnxruntime {number}, providers {', '.join(short)}",
            facts={"versions": {"onnxruntime": number}, "providers": providers},
            findings=onnx_findings(short, instructions.instruction_sets()[0]),
        )


def onnx_findings(providers: list[str], sets: tuple[str, ...]) -> dict[str, Finding]:
    """What onnxruntime makes of ONNX files.

    Measured with onnxruntime 1.32 on one core of an x86 processor with AVX2 and no VNNI: MiniLM, and a CNN of 20
    convolutions, which lost 4 points of accuracy with 8-bit weights times uint8, and none with 7-bit weights.

    :param providers: without the ending ExecutionProvider.
    """
    accelerated = [name for name in providers if name not in ("CPU", "Azure")]
    if accelerated:
        return {"format:onnx": Finding("fast", f"kernels of {', '.join(accelerated)}")}
    products = next((name for name in instructions.INT8_PRODUCTS if name in sets), "")
    if "neon" in sets:
        bits = "; --target arm keeps all 8 bits of calibrated weights"
    elif products:
        bits = "; --target vnni keeps all 8 bits of calibrated weights"
    else:
        bits = "; without VNNI calibrated weights need 7 bits, which --target auto gives them"
    speed: Literal["fast", "slow"] = "fast" if products or "avx2" in sets or "neon" in sets else "slow"
    by = products or "avx2" * ("avx2" in sets)
    kernels = f"integer products{f' by {by}' if by else ''}{bits}"
    blocks = "MatMulNBits: weights stay 4 bits; single tokens gain most (2.4 times float32 on AVX2, sequences 1.1)"
    bytes_ = (
        "MatMulNBits in products, faster than float32 for single tokens only; convolutions widen weights at every run"
    )
    return {
        "format:onnx": Finding(speed, kernels),
        "scheme:w8a8": Finding(speed, kernels),
        "scheme:int4": Finding(speed, blocks),
        "scheme:int8": Finding("slow", bytes_),
    }


class LlamaCppProbe(RuntimeProbe):
    """llama.cpp through its Python bindings."""

    BINDINGS = ("llama-cpp-python", "xllamacpp")

    def probe(self) -> ProbeResult:
        """Versions; nothing is imported."""
        found = installed(*self.BINDINGS)
        if not found:
            finding = Finding("no", "no Python binding of llama.cpp installed", "pip install xllamacpp")
            findings = {"format:gguf": finding, **{f"scheme:{name}": finding for name in GGML_TYPES}}
            return ProbeResult("llama.cpp", False, "not here: no binding installed", findings=findings)
        shown = ", ".join(f"{name} {number}" for name, number in found.items())
        sets, _ = instructions.instruction_sets()
        finding = ggml_finding(sets)
        findings = {"format:gguf": finding, **{f"scheme:{name}": finding for name in GGML_TYPES}}
        return ProbeResult("llama.cpp", True, shown, facts={"versions": found}, findings=findings)


def ggml_finding(sets: tuple[str, ...]) -> Finding:
    """What llama.cpp's CPU kernels make of every quantized type (ggml/src/ggml-cpu/arch, October 2026)."""
    for name in ("avx2", "neon"):
        if name in sets:
            return Finding("fast", f"{name} kernels for every type: inputs go to 8 bits, products are integers")
    return Finding("slow", "llama.cpp has only portable code for this processor's instruction sets")
