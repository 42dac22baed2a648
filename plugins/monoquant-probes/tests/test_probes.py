"""The probes: what they make of what operating systems and torch say, and that they never raise."""

from __future__ import annotations

import os
import platform
import sys
import types
from pathlib import Path

import pytest
from monoquant_probes import cpu, instructions, memory, runtimes, torch_devices
from monoquant_probes.plugin import monoquant_register_probes

from monoquant_core import memory as core_memory
from monoquant_core.cli.doctor import judge, run_probes
from monoquant_core.declarations import NoOptions, ProbeDeclaration
from monoquant_core.plugins import load_registry
from monoquant_core.probes import Finding, ProbeResult

# First lines of real /proc/cpuinfo files and of `sysctl hw.optional machdep.cpu` on real machines, shortened.
HASWELL = """processor\t: 0
model name\t: Intel(R) Core(TM) i7-4770 CPU @ 3.40GHz
flags\t\t: fpu vme sse sse2 ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes xsave avx f16c rdrand avx2 bmi2
processor\t: 1
flags\t\t: avx512f
"""
SAPPHIRE_RAPIDS = """flags\t\t: avx f16c avx2 fma avx512f avx512_bf16 avx512_vnni avx_vnni amx_bf16 avx512_fp16 amx_int8
"""
GRAVITON3 = """processor\t: 0
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm asimddp sve i8mm bf16
CPU implementer\t: 0x41
"""
M2 = """hw.optional.floatingpoint: 1
hw.optional.neon: 1
hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_FP16: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 0
machdep.cpu.brand_string: Apple M2
"""
INTEL_MAC = """hw.optional.avx2_0: 1
machdep.cpu.features: FPU SSE4.2 AVX1.0 F16C FMA
machdep.cpu.leaf7_features: AVX2 AVX512F AVX512VNNI
"""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (instructions.cpuinfo_flags(HASWELL), ("avx", "avx2", "fma", "f16c")),
        (
            instructions.cpuinfo_flags(SAPPHIRE_RAPIDS),
            (
                *("avx", "avx2", "fma", "f16c", "avx512", "avx_vnni", "avx512_vnni"),
                *("avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
            ),
        ),
        (instructions.cpuinfo_flags(GRAVITON3), ("neon", "dotprod", "i8mm", "arm_bf16", "arm_fp16", "sve")),
        (instructions.sysctl_flags(M2), ("neon", "dotprod", "i8mm", "arm_bf16", "arm_fp16")),
        (instructions.sysctl_flags(INTEL_MAC), ("avx", "avx2", "fma", "f16c", "avx512", "avx512_vnni")),
        (instructions.cpuinfo_flags("nothing of use"), ()),
    ],
    ids=["haswell", "sapphire rapids", "graviton 3", "m2", "intel mac", "unknown"],
)
def test_instruction_sets_of_real_machines(flags: set[str], expected: tuple[str, ...]) -> None:
    assert instructions.named(flags) == expected


@pytest.mark.parametrize(
    ("text", "scheme", "speed", "says"),
    [
        (HASWELL, "w8a8", "slow", "saturate"),
        (SAPPHIRE_RAPIDS, "w8a8", "fast", "amx_int8"),
        (GRAVITON3, "w8a8", "fast", "i8mm"),
        ("", "w8a8", "slow", "no int8 dot product"),
        (HASWELL, "bfloat16", "slow", "widened"),
        (GRAVITON3, "bfloat16", "fast", "arm_bf16"),
        (HASWELL, "float16", "slow", "f16c"),
        (SAPPHIRE_RAPIDS, "float16", "fast", "avx512_fp16"),
        (SAPPHIRE_RAPIDS, "int4", "slow", "widened"),
        (SAPPHIRE_RAPIDS, "fp8", "slow", "float8"),
    ],
)
def test_what_a_processor_makes_of_a_scheme(text: str, scheme: str, speed: str, says: str) -> None:
    finding = cpu.findings(instructions.named(instructions.cpuinfo_flags(text)))[f"scheme:{scheme}"]
    assert finding.speed == speed
    assert says in finding.reason


def test_memory_of_proc_and_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       16000 kB\nMemFree: 1 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    groups, inner = tmp_path / "groups", tmp_path / "groups" / "slice" / "job"
    inner.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/slice/job\n")
    monkeypatch.setattr(core_memory, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(core_memory, "CONTROL_GROUPS", groups)
    assert memory.memory() == (16_384_000, 8_192_000)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("500000\n")
    assert memory.memory() == (16_384_000, 8_192_000)
    (inner.parent / "memory.max").write_text("4000000\n")
    (inner.parent / "memory.current").write_text("1000000\n")
    assert memory.memory() == (4_000_000, 3_000_000)
    (tmp_path / "cgroup").write_text("5:cpu:/\n4:memory,hugetlb:/job\n")  # version 1
    (groups / "memory" / "job").mkdir(parents=True)
    (groups / "memory" / "job" / "memory.limit_in_bytes").write_text("2000000\n")
    (groups / "memory" / "job" / "memory.usage_in_bytes").write_text("500000\n")
    assert memory.memory() == (2_000_000, 1_500_000)


@pytest.mark.skipif(sys.platform != "linux", reason="compares with Linux's own numbers")
def test_this_machine_is_what_the_system_says() -> None:
    result = cpu.CpuProbe(NoOptions()).probe()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert result.present
    assert result.facts["architecture"] == platform.machine()
    assert 1 <= result.facts["usable_cores"] <= (os.cpu_count() or 1)
    assert 0 < result.facts["memory_available"] <= result.facts["memory_total"] <= total


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="torch names x86 levels")
def test_torch_agrees_on_the_vector_width() -> None:
    import torch

    sets, _ = instructions.instruction_sets()
    level = torch.backends.cpu.get_cpu_capability()
    assert {"AVX512": "avx512", "AVX2": "avx2"}.get(level, "avx") in (*sets, "avx")


def test_without_proc_torch_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", "win32")
    sets, asked = instructions.instruction_sets()
    assert asked.startswith("torch (")
    assert set(sets) <= set(instructions.SPELLINGS)


@pytest.mark.parametrize(
    ("capability", "fast"),
    [
        ("6.1", ("float32",)),
        ("7.0", ("float32", "float16")),
        ("7.5", ("float32", "float16", "int8")),
        ("8.6", ("float32", "float16", "int8", "bfloat16")),
        ("8.9", ("float32", "float16", "int8", "bfloat16", "float8_e4m3fn")),
        ("12.0", ("float32", "float16", "int8", "bfloat16", "float8_e4m3fn")),
    ],
)
def test_compute_capabilities(capability: str, fast: tuple[str, ...]) -> None:
    probe = torch_devices.CudaProbe(NoOptions())
    assert probe.fast_elements(types.ModuleType("torch"), {"capability": capability}) == fast
    assert probe.findings({}, fast)["scheme:fp8"].speed == ("fast" if "float8_e4m3fn" in fast else "slow")


@pytest.mark.parametrize(
    ("architecture", "has", "lacks"),
    [("gfx906:sramecc+", "float16", "int8"), ("gfx942", "int8", "float8_e4m3fn"), ("gfx950", "float8_e4m3fn", "int4")],
)
def test_amd_architectures(architecture: str, has: str, lacks: str) -> None:
    fast = torch_devices.RocmProbe(NoOptions()).fast_elements(types.ModuleType("torch"), {"architecture": architecture})
    assert has in fast
    assert lacks not in fast


@pytest.mark.parametrize(
    "probe", [torch_devices.CudaProbe, torch_devices.RocmProbe, torch_devices.MpsProbe, torch_devices.XpuProbe]
)
def test_devices_are_what_torch_says(probe: type[torch_devices.TorchProbe]) -> None:
    import torch

    there = {
        "cuda": torch.cuda.is_available() and torch.version.cuda is not None,
        "rocm": torch.cuda.is_available() and torch.version.hip is not None,
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
    }
    result = probe(NoOptions()).probe()
    assert result.present is there[result.device]
    assert result.present or result.summary.startswith("not here: ")
    if result.present:
        assert result.memory_bytes
        assert result.facts["devices"]


def test_a_driver_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def broken() -> bool:
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    result = torch_devices.CudaProbe(NoOptions()).probe()
    assert not result.present
    assert "CUDA driver initialization failed" in result.summary


@pytest.mark.parametrize(
    ("capability", "speeds"),
    [
        ((7, 0), {"int4": "no", "w8a8": "no", "fp8": "no", "float16": "fast", "bfloat16": "no"}),
        ((7, 5), {"int4": "fast", "int8": "fast", "w8a8": "fast", "fp8": "slow", "bfloat16": "no"}),
        ((8, 0), {"int4": "fast", "w8a8": "fast", "fp8": "slow", "bfloat16": "fast"}),
        ((9, 0), {"int4": "fast", "w8a8": "fast", "fp8": "fast"}),
        ((10, 0), {"int4": "fast", "w8a8": "no", "fp8": "fast"}),
    ],
)
def test_vllm_by_compute_capability(capability: tuple[int, int], speeds: dict[str, str]) -> None:
    findings = runtimes.vllm_findings(capability)
    assert {name: findings[f"scheme:{name}"].speed for name in speeds} == speeds


def test_runtimes_have_the_versions_that_pip_installed() -> None:
    from importlib.metadata import version

    result = runtimes.TransformersProbe(NoOptions()).probe()
    pytest.importorskip("compressed_tensors")
    assert result.facts["versions"] == {name: version(name) for name in ("transformers", "compressed-tensors")}
    assert result.findings["format:safetensors"].speed == "slow"


@pytest.mark.parametrize(
    ("probe", "key"),
    [
        (runtimes.TransformersProbe, "format:safetensors"),
        (runtimes.VllmProbe, "format:safetensors"),
        (runtimes.LlamaCppProbe, "format:gguf"),
    ],
)
def test_a_missing_runtime_says_what_to_install(
    probe: type[runtimes.RuntimeProbe], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "installed", lambda *names: {})
    result: ProbeResult = probe(NoOptions()).probe()  # type: ignore[attr-defined]
    assert not result.present
    assert result.findings[key].speed == "no"
    assert result.findings[key].install.startswith("pip install ")


@pytest.mark.parametrize(("text", "speed"), [(HASWELL, "fast"), (GRAVITON3, "fast"), ("flags\t\t: sse2 avx", "slow")])
def test_llama_cpp_has_kernels_for_these_processors(text: str, speed: str) -> None:
    sets = instructions.named(instructions.cpuinfo_flags(text))
    assert runtimes.ggml_finding(sets).speed == speed


def test_every_installed_scheme_is_known_to_a_probe() -> None:
    registry = load_registry()
    unknown = [name for name, said in judge(run_probes(registry), "scheme", registry.schemes).items() if not said]
    assert unknown == []


def test_onnxruntime_is_asked_for_its_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    result = runtimes.OnnxRuntimeProbe(NoOptions()).probe()
    assert result.facts["providers"] == onnxruntime.get_available_providers()


@pytest.mark.parametrize(
    ("text", "speed", "said", "narrow"),
    [
        (HASWELL, "fast", "avx2", True),
        ("flags\t\t: avx2 avx512f avx512_vnni", "fast", "avx512_vnni", False),
        (GRAVITON3, "fast", "i8mm", False),
        ("flags\t\t: sse2 avx", "slow", "integer products", True),
    ],
)
def test_what_onnxruntime_makes_of_each_mode(text: str, speed: str, said: str, narrow: bool) -> None:
    found = runtimes.onnx_findings(["CPU"], instructions.named(instructions.cpuinfo_flags(text)))
    assert found["scheme:w8a8"].speed == found["format:onnx"].speed == speed
    assert said in found["scheme:w8a8"].reason
    assert ("7 bits" in found["scheme:w8a8"].reason) is narrow
    assert "MatMulNBits" in found["scheme:int4"].reason
    assert found["scheme:int8"].speed == "slow"


def test_onnxruntime_with_an_accelerator_is_judged_by_it() -> None:
    found = runtimes.onnx_findings(["CUDA", "CPU"], ())
    assert found["format:onnx"] == Finding("fast", "kernels of CUDA")
    assert not [key for key in found if key.startswith("scheme:")]


def test_a_runtime_that_does_not_import_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise OSError('libonnxruntime.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    result = runtimes.OnnxRuntimeProbe(NoOptions()).probe()
    assert not result.present
    assert "cannot open shared object file" in result.findings["format:onnx"].reason


def test_every_declared_probe_answers() -> None:
    for declared in monoquant_register_probes():
        assert isinstance(declared, ProbeDeclaration)
        result = declared.load()(declared.options()).probe()
        assert isinstance(result, ProbeResult)
        assert result.device == declared.name
        assert result.summary
        assert all(isinstance(f, Finding) and f.reason for f in result.findings.values())
        assert {key.partition(":")[0] for key in result.findings} <= {"scheme", "format"}
