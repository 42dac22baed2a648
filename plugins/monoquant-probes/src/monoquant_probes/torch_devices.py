"""Accelerators, as torch sees them. torch is imported when a probe runs, never before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from monoquant_core.declarations import NoOptions
from monoquant_core.probes import Finding, ProbeResult
from monoquant_probes.names import WEIGHT_ONLY, gigabytes

if TYPE_CHECKING:
    from types import ModuleType


class TorchProbe:
    """One kind of accelerator. Subclasses say how to ask torch for it."""

    device: ClassVar[str]

    def __init__(self, options: NoOptions) -> None:
        del options

    def probe(self) -> ProbeResult:
        """Ask torch. Never raises: drivers fail in many ways, and each is a reason."""
        try:
            import torch

            reason = self.absent(torch)
            devices = [] if reason else self.devices(torch)
            if not devices:
                return self._nothing(reason or "torch sees no device")
            return self._result(torch, devices)
        except Exception as exc:  # noqa: BLE001
            return self._nothing(f"torch could not be asked: {exc!r}")

    def absent(self, torch: ModuleType) -> str:
        """Why there is none; empty when there is."""
        raise NotImplementedError

    def devices(self, torch: ModuleType) -> list[dict[str, Any]]:
        """Facts of every device: at least name and memory_total."""
        raise NotImplementedError

    def fast_elements(self, torch: ModuleType, device: dict[str, Any]) -> tuple[str, ...]:
        """Element types that it multiplies by itself."""
        raise NotImplementedError

    def findings(self, device: dict[str, Any], fast: tuple[str, ...]) -> dict[str, Finding]:
        """What it makes of each scheme; without more knowledge, what its arithmetic says."""
        found = {f"scheme:{name}": _WIDENED for name in WEIGHT_ONLY}
        for scheme, element in _ELEMENTS.items():
            if element in fast:
                found[f"scheme:{scheme}"] = Finding("fast", f"{element} products in hardware")
            else:
                found[f"scheme:{scheme}"] = Finding("slow", f"no {element} products that torch reports: widened first")
        return found

    def _nothing(self, reason: str) -> ProbeResult:
        return ProbeResult(self.device, False, f"not here: {reason}")

    def _result(self, torch: ModuleType, devices: list[dict[str, Any]]) -> ProbeResult:
        first = devices[0]
        fast = self.fast_elements(torch, first)
        shown = [
            f"{d['name']}, {gigabytes(d.get('memory_free') or d.get('memory_total'))} free" + _capability(d)
            for d in devices
        ]
        return ProbeResult(
            self.device,
            True,
            "; ".join(shown),
            fast_elements=fast,
            memory_bytes=first.get("memory_free") or first.get("memory_total"),
            facts={"torch": torch.__version__, "devices": devices},
            findings=self.findings(first, fast),
        )


_WIDENED = Finding(
    "slow", "torch has no kernel for packed integer weights: widened to float; a runtime such as vLLM brings kernels"
)
_ELEMENTS = {"w8a8": "int8", "fp8": "float8_e4m3fn", "float16": "float16", "bfloat16": "bfloat16"}


def _capability(device: dict[str, Any]) -> str:
    return f", compute capability {device['capability']}" if "capability" in device else ""


class CudaProbe(TorchProbe):
    """NVIDIA GPUs."""

    device = "cuda"

    def absent(self, torch: ModuleType) -> str:
        """Built without CUDA, built for AMD, or no GPU or driver."""
        if torch.version.cuda is None:
            return f"torch {torch.__version__} was built without CUDA"
        return "" if torch.cuda.is_available() else "no NVIDIA GPU, or no driver, that torch can use"

    def devices(self, torch: ModuleType) -> list[dict[str, Any]]:
        """Name, compute capability, memory."""
        return _cuda_devices(torch)

    def fast_elements(self, torch: ModuleType, device: dict[str, Any]) -> tuple[str, ...]:
        """From the compute capability: 7.0 float16, 7.5 int8, 8.0 bfloat16, 8.9 float8."""
        capability = tuple(map(int, device["capability"].split(".")))
        needed = {"float16": (7, 0), "int8": (7, 5), "bfloat16": (8, 0), "float8_e4m3fn": (8, 9)}
        return ("float32", *(element for element, least in needed.items() if capability >= least))


class RocmProbe(TorchProbe):
    """AMD GPUs; torch calls them cuda as well."""

    device = "rocm"

    def absent(self, torch: ModuleType) -> str:
        """Built without ROCm, or no GPU or driver."""
        if torch.version.hip is None:
            return f"torch {torch.__version__} was built without ROCm"
        return "" if torch.cuda.is_available() else "no AMD GPU, or no driver, that torch can use"

    def devices(self, torch: ModuleType) -> list[dict[str, Any]]:
        """Name, architecture, memory."""
        devices = _cuda_devices(torch)
        for index, device in enumerate(devices):
            device["architecture"] = getattr(torch.cuda.get_device_properties(index), "gcnArchName", "")
            del device["capability"]  # a number of AMD's own that means something else
        return devices

    def fast_elements(self, torch: ModuleType, device: dict[str, Any]) -> tuple[str, ...]:
        """Matrix cores of CDNA and RDNA 3 on; float8 of the e4m3fn kind from gfx950 and gfx12 on (gfx942 has fnuz)."""
        architecture = device["architecture"].partition(":")[0]
        fast = ["float32", "float16"]
        if architecture.startswith(("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")):
            fast += ["bfloat16", "int8"]
        if architecture.startswith(("gfx95", "gfx12")):
            fast += ["float8_e4m3fn"]
        return tuple(fast)


class MpsProbe(TorchProbe):
    """Apple GPUs."""

    device = "mps"

    def absent(self, torch: ModuleType) -> str:
        """Built without Metal, or no GPU."""
        if not torch.backends.mps.is_built():
            return f"torch {torch.__version__} was built without Metal"
        return "" if torch.backends.mps.is_available() else "macOS 14 and a GPU of Apple's are needed"

    def devices(self, torch: ModuleType) -> list[dict[str, Any]]:
        """One, that shares the machine's memory."""
        return [{"name": "Apple GPU", "memory_total": int(torch.mps.recommended_max_memory())}]

    def fast_elements(self, torch: ModuleType, device: dict[str, Any]) -> tuple[str, ...]:
        """Metal multiplies floats."""
        return ("float32", "float16")


class XpuProbe(TorchProbe):
    """Intel GPUs."""

    device = "xpu"

    def absent(self, torch: ModuleType) -> str:
        """Built without XPU, or no GPU or driver."""
        if torch.version.xpu is None:
            return f"torch {torch.__version__} was built without XPU"
        return "" if torch.xpu.is_available() else "no Intel GPU, or no driver, that torch can use"

    def devices(self, torch: ModuleType) -> list[dict[str, Any]]:
        """Name, memory and the capabilities that torch reports."""
        found = []
        for index in range(torch.xpu.device_count()):
            properties = torch.xpu.get_device_properties(index)
            found.append(
                {
                    "name": properties.name,
                    "memory_total": int(properties.total_memory),
                    "has_fp16": bool(getattr(properties, "has_fp16", False)),
                    "matrix_engine": bool(getattr(properties, "has_subgroup_matrix_multiply_accumulate", False)),
                }
            )
        return found

    def fast_elements(self, torch: ModuleType, device: dict[str, Any]) -> tuple[str, ...]:
        """What the device properties name."""
        fast = ["float32", *(["float16"] if device["has_fp16"] else [])]
        return tuple(fast + (["bfloat16", "int8"] if device["matrix_engine"] else []))


def _cuda_devices(torch: ModuleType) -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_total": int(total),
                "memory_free": int(free),
            }
        )
    return found
