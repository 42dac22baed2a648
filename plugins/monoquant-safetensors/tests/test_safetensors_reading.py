"""Finished files as sources: what compressed-tensors itself writes, round trips, and files that are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import monoquant_core as mq
from monoquant_core.api import installed
from monoquant_core.encoding import FLOAT8_E4M3FN, INT8, ActivationQuant
from monoquant_core.engine import RunOptions, write
from monoquant_core.errors import SourceError
from monoquant_core.model import TensorSpec
from monoquant_core.planner import make_plan
from monoquant_core.recipe import Recipe
from monoquant_core.rows import all_rows
from monoquant_core.tensor import QuantizedTensor, same_bits
from monoquant_core.testing.samples import ENCODINGS, MemorySource, normal, quantized

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
MODULES = {
    "model.layers.0.self_attn.q_proj": (96, 256),
    "model.layers.0.mlp.up_proj": (160, 256),
    "model.layers.0.mlp.down_proj": (256, 128),
}
FORMATS = {
    "W4A16": "pack-quantized",
    "W4A16_ASYM": "pack-quantized",
    "W3A16": "pack-quantized",
    "W8A16": "pack-quantized",
    "W4A8": "int-quantized",
    "W4AFP8": "pack-quantized",
    "W8A8": "int-quantized",
    "FP8": "float-quantized",
    "FP8_DYNAMIC": "float-quantized",
    "FP8_BLOCK": "float-quantized",
    "MXFP4A16": "mxfp4-pack-quantized",
    "MXFP8A16": "mxfp8-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
}


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def theirs(folder: Path, preset: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Write a folder with compressed-tensors' own compressor; the weights as it decompresses them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    scheme.format = FORMATS[preset]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": normal((256,)).to(dtype)}
    truth = {}
    for seed, (module, shape) in enumerate(MODULES.items()):
        weight = normal(shape, seed).to(dtype)
        state = {"weight": weight}
        if args.strategy in ("group", "tensor_group"):
            blocks = weight.unflatten(-1, (-1, args.group_size))
            low, high = blocks.amin(-1), blocks.amax(-1)
        elif args.strategy == "block":
            rows, columns = args.block_structure
            padded = torch.nn.functional.pad(weight, (0, -shape[1] % columns, 0, -shape[0] % rows))
            blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        elif args.strategy == "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        else:
            low, high = weight.amin().reshape(1), weight.amax().reshape(1)
        if args.strategy == "tensor_group":
            state["weight_global_scale"] = generate_gparam(weight.amin().reshape(1), weight.amax().reshape(1))
        more = {"global_scale": state["weight_global_scale"]} if args.strategy == "tensor_group" else {}
        state["weight_scale"], state["weight_zero_point"] = calculate_qparams(low, high, args, **more)
        if args.strategy != "tensor_group":
            state["weight_scale"] = state["weight_scale"].to(dtype)
        packed = compressor.compress(state, scheme)
        truth[f"{module}.weight"] = compressor.decompress(packed, scheme)["weight"]
        if scheme.input_activations is not None and not scheme.input_activations.dynamic:
            packed["input_scale"] = torch.tensor([0.017 + seed], dtype=dtype)
        tensors |= {f"{module}.{key}": value.contiguous() for key, value in packed.items()}
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=scheme.format,
        quantization_status="compressed",
        ignore=["lm_head"],
    ).model_dump()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": config}, default=str))
    return truth


@pytest.mark.parametrize("preset", FORMATS)
def test_reads_what_compressed_tensors_writes(tmp_path, preset):
    pytest.importorskip("compressed_tensors")
    dtype = torch.bfloat16 if preset.startswith("MX") else torch.float32
    truth = theirs(tmp_path / "theirs", preset, dtype)
    with mq.load(tmp_path / "theirs") as model:
        specs = {spec.name: spec for spec in model.source.specs()}
        assert {name for name, spec in specs.items() if spec.encoding is not None} == set(truth)
        for name, value in truth.items():
            read = model.source.read(name, all_rows(specs[name].shape))
            assert isinstance(read, QuantizedTensor)
            if preset == "NVFP4A16":  # they divide by the global scale, then round to bfloat16
                torch.testing.assert_close(read.dequantize(), value.float(), rtol=2**-7, atol=0)
            else:
                assert torch.equal(read.dequantize().to(value.dtype), value), name
            if preset != "FP8_BLOCK":  # whose blocks are 128 rows
                rows = (range(32), range(32, specs[name].shape[0]))
                pieces = [model.source.read(name, r).dequantize() for r in rows]
                assert torch.equal(torch.cat(pieces), read.dequantize())


def test_activations_are_kept(tmp_path):
    pytest.importorskip("compressed_tensors")
    found = {}
    for preset in ("W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "W4AFP8", "W4A16"):
        theirs(tmp_path / preset, preset)
        with mq.load(tmp_path / preset) as model:
            found[preset] = next(s.activation for s in model.source.specs() if s.encoding is not None)
    assert found["W8A8"] == ActivationQuant(INT8, "token", dynamic=True)
    assert found["FP8_DYNAMIC"] == found["W4AFP8"] == ActivationQuant(FLOAT8_E4M3FN, "token", dynamic=True)
    assert found["FP8_BLOCK"] == ActivationQuant(FLOAT8_E4M3FN, "group", dynamic=True, group_size=128)
    assert found["W4A16"] is None
    static = found["FP8"]
    assert (static.granularity, static.dynamic) == ("tensor", False)
    assert static.high == pytest.approx(-static.low)
    assert static.high > 0.017 * 448 - 1e-3


@pytest.mark.parametrize("preset", [p for p in FORMATS if p != "NVFP4A16"])
def test_rewritten_it_holds_the_same_tensors(tmp_path, preset):
    """Another's folder, read and written again: the same codes and parameters, static ranges included."""
    pytest.importorskip("compressed_tensors")
    theirs(tmp_path / "theirs", preset, torch.bfloat16 if preset.startswith("MX") else torch.float32)
    mq.export(tmp_path / "theirs", tmp_path / "ours")
    before, after = load_file(tmp_path / "theirs/model.safetensors"), load_file(tmp_path / "ours/model.safetensors")
    if preset == "W4A8":  # int4 in int8: packed now, as vLLM reads it
        assert {n for n in after if n.endswith("weight_packed")}
        assert mq.compare(tmp_path / "theirs", tmp_path / "ours")[0].max_error == 0
        return
    assert set(before) == set(after)
    for name, value in before.items():
        assert same_bits(after[name], value), name
    mq.export(tmp_path / "ours", tmp_path / "again")
    assert digests(tmp_path / "ours") == digests(tmp_path / "again")


@pytest.mark.parametrize("convention", ["compressed-tensors", "generic"])
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize(
    ("scheme", "options"),
    [("int8", {}), ("int4", {"group_size": 32}), ("int3", {"group_size": 64, "symmetric": False}), ("w8a8", {})],
)
def test_saved_loaded_and_saved_it_is_the_same(tmp_path, scheme, options, shard, convention):
    source = tmp_path / "source"
    source.mkdir()
    tensors = {f"{module}.weight": normal(shape, i) for i, (module, shape) in enumerate(MODULES.items())}
    tensors |= {"model.embed_tokens.weight": normal((64, 256)), "lm_head.weight": normal((64, 256), 9)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(CONFIG))
    (source / "tokenizer.json").write_text("{}")
    save = {"format_options": {"convention": convention, "max_shard_size": shard}}
    with mq.quantize(source, scheme=scheme, options=options) as model:
        model.save(tmp_path / "first", **save)
    with mq.load(tmp_path / "first") as model:
        model.save(tmp_path / "second", **save, threads=3)
        encoded = [spec.name for spec in model.source.specs() if spec.encoding is not None]
    assert sorted(encoded) == sorted(f"{module}.weight" for module in MODULES)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    assert "tokenizer.json" in digests(tmp_path / "second")


def test_generic_gives_back_every_encoding_activation_and_tie(tmp_path):
    """Codes, parameters and their nesting, bit for bit, through one file."""
    activation = ActivationQuant(INT8, "tensor", dynamic=False, low=-1.0, high=2.0)
    tensors = {label: quantized(encoding, (48, 256), i) for i, (label, encoding) in enumerate(ENCODINGS.items())}
    plain = {"float": normal((3, 5)), "whole": torch.arange(6), "truth": torch.tensor(True)}
    specs = [TensorSpec(n, t.shape, "float16", t.encoding, activation) for n, t in tensors.items()]
    specs += [TensorSpec(n, tuple(t.shape), str(t.dtype)[6:]) for n, t in plain.items()]
    specs += [
        TensorSpec("tied", (48, 256), "float16", ENCODINGS["nf4"], activation, tied_to="nf4"),
        TensorSpec("tied float", (3, 5), "float32", tied_to="float"),
    ]
    more = {"tied": tensors["nf4"], "tied float": plain["float"]}
    source = MemorySource({**tensors, **plain, **more}, specs=specs)
    options = {"convention": "generic"}
    path = tmp_path / "all.safetensors"
    plan = make_plan(
        source,
        registry=installed(),
        recipe=Recipe(base="none"),
        format="safetensors",
        format_options=options,
        destination=path.name,
        quantizing=False,
    )
    report = write(plan, source, path, RunOptions(threads=1))
    assert any("only monoquant reads this file" in note for note in report.notes)
    with mq.load(path) as model:
        found = {spec.name: spec for spec in model.source.specs()}
        assert set(found) == {spec.name for spec in specs}
        for spec in specs:
            assert (found[spec.name].encoding, found[spec.name].dtype) == (spec.encoding, spec.dtype)
            assert found[spec.name].tied_to == spec.tied_to
            read = model.source.read(spec.name, all_rows(spec.shape))
            expected = {**tensors, **plain, **more}[spec.name]
            if isinstance(expected, QuantizedTensor):
                assert read.equal(expected), spec.name
                assert found[spec.name].activation == activation
            else:
                assert same_bits(read, expected), spec.name


def test_generic_files_are_safetensors(tmp_path):
    """The library reads them; only what the parts mean is ours."""
    with mq.quantize({"a.weight": normal((8, 64)), "b": normal((3,))}, scheme="int4", options={"group_size": 32}) as m:
        m.save(tmp_path / "a.safetensors")
    parts = load_file(tmp_path / "a.safetensors")
    assert {n: (t.dtype, tuple(t.shape)) for n, t in parts.items()} == {
        "a.weight.codes": (torch.uint8, (8, 32)),
        "a.weight.scale": (torch.float32, (8, 2)),
        "b": (torch.float32, (3,)),
    }


@pytest.fixture
def folder(tmp_path):
    """A finished folder, and how to write it again with something changed."""
    tensors = {f"{module}.weight": normal(shape, i) for i, (module, shape) in enumerate(MODULES.items())}
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(CONFIG))
    with mq.quantize(source, scheme="int4", options={"group_size": 32}) as model:
        model.save(tmp_path / "out")
    return tmp_path / "out"


def rewrite(folder: Path, change: Callable[[dict, dict], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


Q = "model.layers.0.self_attn.q_proj"


def group(config: dict) -> dict:
    return config["config_groups"]["group_0"]


REFUSED = {
    "no scale": (lambda t, c: t.pop(f"{Q}.weight_scale"), f"{Q}.*weight_scale is missing"),
    "no shape": (lambda t, c: t.pop(f"{Q}.weight_shape"), "weight_shape, two integers, is missing"),
    "no codes": (lambda t, c: t.pop(f"{Q}.weight_packed"), "weight_packed is missing"),
    "wrong shape": (
        lambda t, c: t.update({f"{Q}.weight_shape": torch.tensor([96, 300])}),
        r"4-bit codes of shape \(96, 300\) do not fit \(96, 32\) words",
    ),
    "negative shape": (lambda t, c: t.update({f"{Q}.weight_shape": torch.tensor([96, -8])}), "do not fit"),
    "wrong scale": (lambda t, c: t.update({f"{Q}.weight_scale": torch.ones(96, 4)}), r"float32 \(96, 4\), expected"),
    "integer scale": (lambda t, c: t.update({f"{Q}.weight_scale": torch.ones(96, 8).int()}), "a scale of int32"),
    "three axes": (
        lambda t, c: t.update({f"{Q}.weight_packed": torch.zeros(2, 96, 32, dtype=torch.int32)}),
        "two axes expected",
    ),
    "g_idx": (lambda t, c: t.update({f"{Q}.weight_g_idx": torch.zeros(256).int()}), "weight_g_idx is not supported"),
    "zero points": (
        lambda t, c: group(c)["weights"].update(symmetric=False),
        "weight_zero_point'?: missing",
    ),
    "frozen": (lambda t, c: c.update(quantization_status="frozen"), "quantization_status is 'frozen'"),
    "sparse": (lambda t, c: c.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    "rotated": (lambda t, c: c.update(transform_config={"config_groups": {"u": {}}}), "rotated weights"),
    "marlin": (lambda t, c: group(c).update(format="marlin-24"), "'marlin-24' of int weights is not supported"),
    "actorder": (lambda t, c: group(c)["weights"].update(actorder="group"), "actorder 'group' permutes"),
    "outputs": (lambda t, c: group(c).update(output_activations={}), "output_activations are not supported"),
    "local": (
        lambda t, c: group(c).update(input_activations={"num_bits": 4, "type": "float", "dynamic": "local"}),
        "input_activations",
    ),
    "attention heads": (lambda t, c: group(c)["weights"].update(strategy="attn_head"), "group_size 32 with strategy"),
    "seven and a half": (lambda t, c: group(c)["weights"].update(num_bits=7.5), "num_bits 7.5"),
    "nine": (lambda t, c: group(c)["weights"].update(num_bits=9), "num_bits 9"),
    "a list": (lambda t, c: group(c).update(weights=[4]), "an object expected"),
    "no groups": (lambda t, c: c.update(config_groups={}), "config_groups is {}"),
    "preset": (lambda t, c: c.update(config_groups={"W4A16": ["Linear"]}), "no group with targets"),
    "untargeted": (lambda t, c: group(c).update(targets=["re:.*other"]), "no config group of config.json targets"),
    "slow expression": (lambda t, c: group(c).update(targets=["re:(a+)+$"]), "too intricate an expression"),
    "bad expression": (lambda t, c: group(c).update(targets=["re:("]), "not a regular expression"),
    "floats beside a scale": (
        lambda t, c: t.update({"x.weight": torch.ones(2, 2), "x.weight_scale": torch.ones(2, 1)}),
        "x.weight.*the weight is not compressed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(folder, case):
    change, message = REFUSED[case]
    with pytest.raises(SourceError, match=message) as caught:
        mq.load(rewrite(folder, change))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_zero_points_of_symmetric_weights_must_be_zero(folder):
    """Old versions of compressed-tensors wrote them; they are not taken on trust."""

    def add(value: int) -> Callable[[dict, dict], None]:
        return lambda t, c: t.update({f"{Q}.weight_zero_point": torch.full((96, 8), value, dtype=torch.int8)})

    with mq.load(rewrite(folder, add(0))) as model:
        assert len(model.state_dict()) == 3
    with (
        mq.load(rewrite(folder, add(1))) as model,
        pytest.raises(SourceError, match="q_proj.*zero points other than zero"),
    ):
        model.state_dict()


def test_groups_are_chosen_by_name_then_expression_then_class(folder):
    def change(tensors, config):
        base = group(config)
        eight = {**base, "targets": [Q], "weights": {**base["weights"], "num_bits": 8}}
        never = {**base, "targets": ["re:.*q_proj"], "weights": {**base["weights"], "num_bits": 2}}
        config["config_groups"] = {"a": base, "b": never, "c": eight}
        tensors[f"{Q}.weight_packed"] = torch.zeros(96, 64, dtype=torch.int32)

    with mq.load(rewrite(folder, change)) as model:
        bits = {spec.name: spec.encoding.element.bits for spec in model.source.specs()}
    assert bits == {f"{module}.weight": 8 if module == Q else 4 for module in MODULES}


GENERIC = {
    "version": (lambda d: d.update(version=2), "version 2, this reader knows 1"),
    "not JSON": (None, "not valid JSON"),
    "no tensors": (lambda d: d.pop("tensors"), "encodings, tensors and ties expected"),
    "encoding out of range": (lambda d: d["tensors"]["a.weight"].update(encoding=3), "impossible description"),
    "encoding of nothing": (lambda d: d["encodings"].__setitem__(0, {}), "element, block and scale expected"),
    "other shape": (lambda d: d["tensors"]["a.weight"].update(shape=[8, 96]), r"uint8 \(8, 32\), expected"),
    "strange shape": (lambda d: d["tensors"]["a.weight"].update(shape=[8, -64]), "impossible"),
    "strange dtype": (lambda d: d["tensors"]["a.weight"].update(dtype="float7"), "unknown dtype 'float7'"),
    "missing part": (
        lambda d: d["tensors"].update({"c.weight": d["tensors"]["a.weight"]}),
        "c.weight.codes'?: missing",
    ),
    "tied to a number": (lambda d: d.update(ties={"c": 3}), "a tensor's name is a string, got 3"),
    "a name that clears the screen": (
        lambda d: d["tensors"].update({"\x1b[2J": d["tensors"]["a.weight"]}),
        "impossible tensor name",
    ),
    "tied to nothing": (lambda d: d.update(ties={"c": "d"}), "cannot be tied to 'd'"),
    "table of another": (
        lambda d: d["encodings"][0].update(element={"name": "int4", "bits": 5, "kind": "int", "signed": True}),
        "int4",
    ),
}


@pytest.mark.parametrize("case", GENERIC)
def test_generic_metadata_is_data(tmp_path, case):
    path = tmp_path / "a.safetensors"
    with mq.quantize({"a.weight": normal((8, 64)), "b": normal((3,))}, scheme="int4", options={"group_size": 32}) as m:
        m.save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change, message = GENERIC[case]
    if change is None:
        metadata["monoquant"] = "{"
    else:
        data = json.loads(metadata["monoquant"])
        change(data)
        metadata["monoquant"] = json.dumps(data)
    save_file(load_file(path), path, metadata)
    with pytest.raises(SourceError, match=message) as caught:
        mq.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("bits", "name"), [(2, "t_reading_three"), (9, "t_reading_wide")])
def test_generic_codes_beyond_the_table_are_refused(tmp_path, bits, name):
    values = [-1.0, 0.0, 1.0] if bits == 2 else [float(i) for i in range(300)]
    element = {"name": name, "bits": bits, "kind": "codebook", "signed": True, "table": values}
    content = {
        "version": 1,
        "encodings": [{"element": element, "block": [1, -1], "scale": "float32"}],
        "tensors": {"a.weight": {"encoding": 0, "dtype": "float32", "shape": [4, 8]}},
        "ties": {},
    }
    codes = torch.full((4, 2), 0b10_10_10_10, dtype=torch.uint8) if bits == 2 else torch.full((4, 8), 299).int()
    tensors = {"a.weight.codes": codes, "a.weight.scale": torch.ones(4, 1)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"monoquant": json.dumps(content)})
    with mq.load(path) as model:
        assert torch.equal(model.state_dict()["a.weight"], torch.full((4, 8), values[-1]))
    codes[3, 1] += 1
    save_file(tensors, path, {"monoquant": json.dumps(content)})
    with (
        mq.load(path) as model,
        pytest.raises(SourceError, match=r"a\.weight\.codes: codes .* are outside 0\.\.") as caught,
    ):
        model.state_dict()
    assert str(path) in str(caught.value)
