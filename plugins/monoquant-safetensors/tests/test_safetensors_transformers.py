"""Folders that transformers loads: no key missing or left over, and every weight exactly what the IR dequantizes to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import monoquant_core as mq
from monoquant_core.errors import PlanError, SourceError, UnsupportedEncodingError

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

SCHEMES = {
    "int8": ("int8", {}),
    "int8 per tensor": ("int8", {"granularity": "tensor"}),
    "int4 g32": ("int4", {"group_size": 32}),
    "int4 g128": ("int4", {}),
    "int3 g64": ("int3", {"group_size": 64, "rounding": "nearest"}),
    "w8a8": ("w8a8", {}),
    "fp8": ("fp8", {}),
    "fp8 per tensor": ("fp8", {"granularity": "tensor"}),
    "fp8 weights only": ("fp8", {"activations": "none"}),
}


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def bert(pretrained, tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("bert") / "model", "BertModel")


def load(path: Path, auto: type | None = None, **options):
    """The model as transformers loads it, decompressed by a forward pass."""
    cls = auto or (transformers.AutoModelForCausalLM if "Causal" in architecture(path) else transformers.AutoModel)
    model, found = cls.from_pretrained(path, output_loading_info=True, **options)
    assert not {key: value for key, value in found.items() if value}
    with torch.no_grad():
        output = model(torch.arange(5, 13)[None])[0]
    assert output.isfinite().all()
    return model


def architecture(path: Path) -> str:
    return json.loads((path / "config.json").read_text())["architectures"][0]


def quantization(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())["quantization_config"]


def check_exact(model, path: Path) -> int:
    """Every tensor of the folder against the loaded model's; how many of them were quantized."""
    loaded = model.state_dict()
    with mq.load(path) as ours:
        specs = {spec.name: spec for spec in ours.source.specs()}
        for name, value in ours.state_dict().items():
            assert torch.equal(loaded[name], value), name
    return sum(spec.encoding is not None for spec in specs.values())


def quantize(source, path: Path, scheme: str, options: dict | None = None, **more) -> Path:
    save = {key: more.pop(key) for key in ("format_options",) if key in more}
    with mq.quantize(source, scheme=scheme, options=options, **more) as model:
        model.save(path, **save)
    return path


@pytest.mark.parametrize("case", SCHEMES)
def test_llama_is_exact(llama, tmp_path, case):
    scheme, options = SCHEMES[case]
    path = quantize(llama, tmp_path / "out", scheme, options)
    assert check_exact(load(path), path) == 14


@pytest.mark.parametrize("case", ["int8", "int4 g128", "w8a8", "fp8"])
def test_bert_is_exact(bert, tmp_path, case):
    scheme, options = SCHEMES[case]
    path = quantize(bert, tmp_path / "out", scheme, options)
    assert check_exact(load(path), path) == 13  # the pooler too


@pytest.fixture(scope="module")
def calibrated(llama) -> mq.Statistics:
    ids = torch.randint(0, 96, (128, 12), generator=torch.Generator().manual_seed(0))
    return mq.calibrate(llama, [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(32)])


@pytest.mark.parametrize("case", ["w8a8", "w8a8 per tensor", "fp8", "fp8 per tensor"])
def test_static_activations_are_loaded(llama, calibrated, tmp_path, case):
    """Ranges that calibration found, as transformers has them, and as the file is read back."""
    scheme, _, tensor = case.partition(" per ")
    options = {"activations": "static"} | ({"granularity": "tensor"} if tensor else {})
    path = quantize(llama, tmp_path / "out", scheme, options, stats=calibrated)
    model = load(path)
    assert check_exact(model, path) == 14
    group = quantization(path)["config_groups"]["group_0"]["input_activations"]
    kind, largest = ("int", 127) if scheme == "w8a8" else ("float", 448)
    assert (group["type"], group["strategy"], group["dynamic"], group["symmetric"]) == (kind, "tensor", False, True)
    with mq.load(path) as back:
        specs = {spec.name: spec for spec in back.source.specs()}
    for name, module in model.named_modules():
        if f"{name}.weight" not in specs or specs[f"{name}.weight"].encoding is None:
            continue
        observed, activation = calibrated[f"{name}:input"], specs[f"{name}.weight"].activation
        expected = max(-float(observed.low), float(observed.high)) / largest
        assert module.input_scale.item() == pytest.approx(expected, rel=1e-6)
        assert activation.high == -activation.low == largest * module.input_scale.item()
    again = tmp_path / "again"
    with mq.load(path) as model:
        model.save(again)
    assert (again / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_static_activations_that_nothing_loads(llama, calibrated, tmp_path):
    """Packed weights with a static range: the format offers what it can hold, and says so."""
    with mq.quantize(llama, scheme="int4", stats=calibrated) as model:
        plan = model.plan("safetensors")
    assert all(s.placed.proposal is None or s.placed.proposal.activation is None for s in plan.steps)
    path = quantize(llama, tmp_path / "out", "w8a8", {"activations": "static"}, stats=calibrated)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["strategy"] = "channel"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(mq.MonoquantError, match="input_activations"):
        mq.load(path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["int8", "int4 g32", "fp8"])
def test_half_precision_is_exact(llama, tmp_path, case, dtype):
    """Scales are stored in the model's dtype: consumers multiply in it."""
    scheme, options = SCHEMES[case]
    half = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=getattr(torch, dtype))
    half.save_pretrained(tmp_path / "half")
    path = quantize(tmp_path / "half", tmp_path / "out", scheme, options)
    model = load(path)
    assert model.dtype == getattr(torch, dtype)
    check_exact(model, path)


def test_mixed_precision_is_exact(llama, tmp_path):
    rules = ["*.down_proj=int8", "re:layers\\.1\\.self_attn\\.(q|k|v)_proj=fp8"]
    path = quantize(llama, tmp_path / "out", "int4", {"group_size": 32}, set=rules, keep=["*.o_proj"])
    config = quantization(path)
    assert config["format"] == "mixed-precision"
    formats = [group["format"] for group in config["config_groups"].values()]
    assert sorted(formats) == ["float-quantized", "pack-quantized", "pack-quantized"]
    assert all("Linear" not in group["targets"] for group in config["config_groups"].values())
    assert set(config["ignore"]) == {"lm_head", r"re:.*\blayers\.\d+\.self_attn\.o_proj$"}
    assert check_exact(load(path), path) == 12


def test_dequantize_true_is_wrong_for_mixed_precision(llama, tmp_path):
    """What the note warns of. When this fails, transformers has been repaired: drop the note."""
    path = tmp_path / "out"
    with mq.quantize(llama, scheme="int4", options={"group_size": 32}, set=["*.down_proj=int8"]) as model:
        report = model.save(path)
    assert any("takes the first group for all modules" in note for note in report.notes)
    with pytest.raises((RuntimeError, AssertionError)):  # depending on which group is the first
        check_exact(load(path, quantization_config=transformers.CompressedTensorsConfig(dequantize=True)), path)


def test_asymmetric_loads_with_dequantize_only(llama, tmp_path):
    path = tmp_path / "out"
    with mq.quantize(llama, scheme="int4", options={"group_size": 32, "symmetric": False}) as model:
        report = model.save(path)
    assert any("only with CompressedTensorsConfig(dequantize=True)" in note for note in report.notes)
    loaded = load(path, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    assert check_exact(loaded, path) == 14
    with pytest.raises(RuntimeError):
        load(path)


def test_asymmetric_beside_others_is_refused(llama, tmp_path):
    asymmetric = {"group_size": 32, "symmetric": False}
    with mq.quantize(llama, scheme="int4", options=asymmetric, set=["*.down_proj=int8"]) as model:
        with pytest.raises(UnsupportedEncodingError, match="which transformers loads in no mode") as caught:
            model.save(tmp_path / "out")
        assert "model.layers.0.self_attn.q_proj" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_tied_head_is_written_once(llama, tmp_path):
    config = transformers.AutoConfig.from_pretrained(llama)
    config.tie_word_embeddings = True
    module = transformers.LlamaForCausalLM(config)
    path = quantize(module, tmp_path / "out", "int8")
    assert "lm_head" in quantization(path)["ignore"]
    loaded = load(path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with mq.load(path) as ours:
        assert "lm_head.weight" not in {spec.name for spec in ours.source.specs()}
    check_exact(loaded, path)


def test_tied_head_of_a_masked_language_model(pretrained, tmp_path):
    path = quantize(pretrained(tmp_path / "float", "BertForMaskedLM"), tmp_path / "out", "int8")
    assert check_exact(load(path, transformers.AutoModelForMaskedLM), path) > 5


def test_quantized_head_is_named(llama, tmp_path):
    path = quantize(llama, tmp_path / "out", "int8", set=["lm_head=int8"])
    config = quantization(path)
    assert config["ignore"] == []
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert check_exact(load(path), path) == 15


def test_shards_are_exact(llama, tmp_path):
    path = quantize(llama, tmp_path / "out", "int4", {"group_size": 32}, format_options={"max_shard_size": "100KB"})
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] <= sum((path / shard).stat().st_size for shard in shards)
    assert check_exact(load(path), path) == 14


@pytest.mark.parametrize("case", ["int8", "int4 g32", "fp8"])
def test_experts_are_exact(pretrained, tmp_path, case):
    """transformers joins the experts of a layer, and decompresses them while it loads."""
    pretrained(tmp_path / "float", "MixtralForCausalLM", num_local_experts=3)
    scheme, options = SCHEMES[case]
    path = quantize(tmp_path / "float", tmp_path / "out", scheme, options)
    assert r"re:.*\blayers\.\d+\.block_sparse_moe\.gate$" in quantization(path)["ignore"]
    loaded = load(path).state_dict()
    with mq.load(path) as model:
        ours = model.state_dict()
    for i in range(3):
        expert = [ours[f"model.layers.0.block_sparse_moe.experts.{i}.{w}.weight"] for w in ("w1", "w3", "w2")]
        assert torch.equal(loaded["model.layers.0.mlp.experts.gate_up_proj"][i], torch.cat(expert[:2]))
        assert torch.equal(loaded["model.layers.0.mlp.experts.down_proj"][i], expert[2])
    attention = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(loaded[attention], ours[attention])


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "intermediate_size": 128,
}


def test_matrices_and_tables_of_positions_are_exact(tmp_path):
    """DeBERTa multiplies with ``pos_key_proj`` and looks ``rel_embeddings`` up."""
    config = transformers.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"])
    transformers.DebertaV2Model(config).save_pretrained(tmp_path / "float")
    path = quantize(tmp_path / "float", tmp_path / "all", "int8")
    assert check_exact(load(path), path) == 16
    path = quantize(tmp_path / "float", tmp_path / "some", "int8", keep=["*.pos_*_proj"])
    assert check_exact(load(path), path) == 12


def test_a_head_that_transformers_renames(tmp_path):
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL)).save_pretrained(tmp_path / "float")
    path = quantize(tmp_path / "float", tmp_path / "out", "int8")
    loaded = load(path).state_dict()
    with mq.load(path) as ours:
        state = ours.state_dict()
    assert "embed_out.weight" in state
    assert all(torch.equal(loaded[name.replace("embed_out", "lm_head")], value) for name, value in state.items())


def test_towers_that_transformers_renames(tmp_path):
    """LLaVA's checkpoints say ``language_model.model.layers``, and its modules are ``model.language_model.layers``."""
    vision = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(**SMALL),
        image_token_index=95,
        tie_word_embeddings=False,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "float")
    rules = {"keep": ["vision_tower.*.1.*"], "set": ["language_model.*.0.mlp.*=int4:group_size=32"]}
    path = quantize(tmp_path / "float", tmp_path / "out", "int8", **rules)
    loaded = load(path, transformers.LlavaForConditionalGeneration).state_dict()
    with mq.load(path) as ours:
        for name, value in ours.state_dict().items():
            renamed = name.replace("language_model.model.", "language_model.")
            renamed = "lm_head.weight" if name == "language_model.lm_head.weight" else f"model.{renamed}"
            assert torch.equal(loaded[renamed], value), name


@pytest.mark.parametrize("scheme", ["int8", "w8a8"])
def test_layers_that_are_initialized_by_their_weights(tmp_path, scheme):
    """What the note warns of. When this fails, transformers has been repaired: see to the others of the list."""
    config = transformers.T5Config(d_model=64, d_ff=96, num_layers=1, num_heads=4, d_kv=16, vocab_size=96)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "float")
    with mq.quantize(tmp_path / "float", scheme=scheme) as model:
        report = model.save(tmp_path / "out")
    packed = scheme == "int8"
    assert any("packed weights of some of its layers only with" in note for note in report.notes) == packed
    if packed:
        with pytest.raises(AttributeError, match="weight"):
            load(tmp_path / "out", transformers.T5EncoderModel)
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if packed else {}
    assert check_exact(load(tmp_path / "out", transformers.T5EncoderModel, **how), tmp_path / "out") == 6


def test_matrices_that_transformers_splits(tmp_path):
    """What the note warns of. When this fails, transformers has been repaired: see to the others of the list."""
    transformers.NomicBertModel(transformers.NomicBertConfig(**SMALL)).save_pretrained(tmp_path / "float")
    with mq.quantize(tmp_path / "float", scheme="int8") as model:
        report = model.save(tmp_path / "out")
    assert any("quantized ones it cannot" in note for note in report.notes)
    with pytest.raises(RuntimeError):
        load(tmp_path / "out")
    with pytest.raises(SourceError, match="transformers does not load it") as caught:
        mq.verify(tmp_path / "out", tmp_path / "float")
    assert "notes of plan" in caught.value.hint


def test_layers_that_are_no_linear_get_the_generic_convention(tmp_path):
    """GPT-2 keeps its weights in Conv1D, as [in, out]."""
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "float")
    path = quantize(tmp_path / "float", tmp_path / "out", "int8")
    with mq.load(path) as model:
        encoded = [spec.name for spec in model.source.specs() if spec.encoding is not None]
    assert len(encoded) == 4
    with pytest.raises(OSError, match="safetensors"):  # and not a model with random weights
        transformers.AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("case", ["int8", "int4 g32", "int4 g128", "w8a8", "fp8"])
def test_minilm_is_exact(minilm, tmp_path, case):
    scheme, options = SCHEMES[case]
    path = quantize(minilm, tmp_path / "out", scheme, options)
    reference = transformers.AutoModel.from_pretrained(minilm)
    model = load(path)
    assert check_exact(model, path) == 37
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    sentences = ["A cat sits on the mat.", "Stock prices fell sharply on Monday.", "def add(a, b): return a + b"]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        ours, theirs = ((m(**batch)[0] * mask).sum(1) / mask.sum(1) for m in (model, reference))
    cosine = torch.nn.functional.cosine_similarity(ours, theirs).min()
    assert cosine >= {"int8": 0.999, "fp8": 0.99, "w8a8": 0.99, "int4 g32": 0.96, "int4 g128": 0.93}[case]


@pytest.fixture(scope="module")
def perplexity(shared):
    """Perplexity of a folder on unseen code: the last 127 tokens of windows of 256."""
    folder = shared / "models" / "tiny-llama"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (shared / "data" / "code_eval.txt").read_text()[:40_000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)[:32]
    assert len(windows) == 32

    def measure(path: Path) -> float:
        model = load(path)
        with torch.no_grad():
            logits = torch.cat([model(batch).logits[:, -128:-1].float() for batch in windows.split(8)])
        return float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, -127:]).exp())

    return measure


def test_tiny_llama_keeps_its_perplexity(shared, tmp_path, perplexity):
    folder = shared / "models" / "tiny-llama"
    reference = perplexity(folder)
    assert 10 < reference < 40
    int8 = quantize(folder, tmp_path / "int8", "int8")
    assert perplexity(int8) == pytest.approx(reference, rel=0.003)
    check_exact(load(int8), int8)
    int4 = quantize(folder, tmp_path / "int4", "int4", {"group_size": 64})
    assert perplexity(int4) == pytest.approx(reference, rel=0.03)
    check_exact(load(int4), int4)


def luke():
    """Two tables of which one does not have the usual name."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LukeConfig(vocab_size=96, entity_vocab_size=40, entity_emb_size=64, **sizes)
    return transformers.LukeModel(config), {"input_ids": torch.arange(5, 13)[None]}


def tapas():
    """Seven numbered tables of token types."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.TapasConfig(vocab_size=96, max_position_embeddings=32, **sizes)
    return transformers.TapasModel(config), {"input_ids": torch.arange(5, 13)[None]}


def layoutlm():
    """Linear layers that are named as positional."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    boxes = {"coordinate_size": 11, "shape_size": 10, "max_2d_position_embeddings": 32, "visual_embed": False}
    config = transformers.LayoutLMv3Config(vocab_size=96, **sizes, **boxes)
    ids = torch.arange(5, 13)[None]
    return transformers.LayoutLMv3Model(config), {"input_ids": ids, "bbox": torch.zeros(1, 8, 4, dtype=torch.long)}


@pytest.mark.parametrize("make", [luke, tapas, layoutlm], ids=lambda make: make.__name__)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_names_of_a_checkpoint_tell_what_is_linear(tmp_path, make, scheme):
    torch.manual_seed(0)
    model, inputs = make()
    model.eval().save_pretrained(tmp_path / "model")
    options = {"group_size": 32} if scheme == "int4" else None
    path = quantize(tmp_path / "model", tmp_path / "out", scheme, options)
    loaded, found = type(model).from_pretrained(path, output_loading_info=True)
    assert not {key: value for key, value in found.items() if value}
    with torch.no_grad():
        wanted, got = model(**inputs)[0], loaded.eval()(**inputs)[0]
    check_exact(loaded, path)
    assert torch.nn.functional.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("kind", ["GPT2", "OpenAIGPT", "ImageGPT"])
def test_matrices_of_other_layers_are_not_taken_for_linear(tmp_path, kind):
    """These have none: their Conv1D keeps ``[inputs, outputs]``."""
    config = getattr(transformers, f"{kind}Config")(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=32)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "model")
    with mq.quantize(tmp_path / "model", scheme="int8") as model:
        kinds = {d.spec.kind for d in model.plan().decisions if d.action == "quantize"}
        assert kinds == {"linear_transposed"}
        with pytest.raises(PlanError, match="nothing would be quantized"):
            model.save(tmp_path / "out", format_options={"convention": "compressed-tensors"})
