"""Kinds, fuse groups and ties, on names that real checkpoints use."""

import pytest

from monoquant_core.kinds import KEPT_KINDS, annotate, fuse_group, kind_of
from monoquant_core.model import ModelInfo, TensorSpec


def spec(name: str, *shape: int, module: str = "", dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, shape, dtype, module=module)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.embed_tokens.weight", (100, 8), "embedding"),
        ("embeddings.word_embeddings.weight", (100, 8), "embedding"),
        ("embeddings.token_type_embeddings.weight", (2, 8), "embedding"),
        ("embeddings.position_embeddings.weight", (64, 8), "position"),
        ("transformer.wte.weight", (100, 8), "embedding"),
        ("transformer.wpe.weight", (100, 8), "position"),
        ("shared.weight", (100, 8), "embedding"),
        ("vit.embeddings.cls_token", (1, 1, 8), "embedding"),
        ("vit.embeddings.patch_embeddings.projection.weight", (8, 3, 16, 16), "conv"),
        ("pos_embed", (1, 197, 8), "position"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), "position"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (32,), "position"),
        ("model.layers.0.input_layernorm.weight", (8,), "norm"),
        ("encoder.rel_embeddings.weight", (64, 8), "position"),
        ("encoder.layer.0.attention.self.pos_key_proj.weight", (8, 8), "linear"),
        ("encoder.layers.0.self_attn.linear_pos.weight", (8, 8), "linear"),
        ("embeddings.task_type_embeddings.weight", (3, 8), "embedding"),
        ("model.decoder.embed_tokens.1.weight", (100, 8), "embedding"),
        ("time_embed.0.weight", (8, 8), "linear"),
        ("input_blocks.1.0.emb_layers.1.weight", (8, 8), "linear"),
        ("model.norm.weight", (8,), "norm"),
        ("encoder.layer.0.output.LayerNorm.weight", (8,), "norm"),
        ("h.0.ln_1.weight", (8,), "norm"),
        ("bn1.running_mean", (8,), "state"),
        ("layer.bias", (8,), "bias"),
        ("attn.in_proj_bias", (8,), "bias"),
        ("h.0.attn.bias", (1, 1, 16, 16), "bias"),
        ("lm_head.weight", (100, 8), "head"),
        ("cls.predictions.decoder.weight", (100, 8), "head"),
        ("cls.predictions.transform.dense.weight", (8, 8), "linear"),
        ("classifier.weight", (2, 8), "head"),
        ("score.weight", (2, 8), "head"),
        ("model.layers.0.mlp.gate.weight", (4, 8), "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", (4, 8), "router"),
        ("model.layers.0.block_sparse_moe.router.layer.weight", (4, 8), "router"),
        ("char_embeddings.HashBucketCodepointEmbedder_3.weight", (64, 8), "embedding"),
        ("model.layers.0.mlp.gate_proj.weight", (4, 8), "linear"),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 8, 16), "experts"),
        ("backbone.layers.0.mixer.A_log", (8, 16), "state"),
        ("backbone.layers.0.mixer.conv1d.weight", (8, 1, 4), "conv"),
        ("conv1.weight", (8, 3, 3, 3), "conv"),
        ("decoder.deconv1.weight", (8, 3, 3, 3), "conv_transpose"),
        ("lstm.weight_ih_l0", (32, 8), "recurrent"),
        ("layer1.0.weight", (8, 8), "linear"),
        ("time_embedding.linear_1.weight", (8, 8), "linear"),
        ("w", (8, 8), "linear"),
        ("scale", (), "vector"),
        ("tokens_embed.weight", (100, 8), "embedding"),
        ("entity_embeddings.entity_embeddings.weight", (100, 8), "embedding"),
        ("embeddings.token_type_embeddings_3.weight", (3, 8), "embedding"),
        ("xpath_embeddings.xpath_tag_sub_embeddings.7.weight", (100, 8), "embedding"),
        ("mask_decoder.iou_token.weight", (2, 8), "embedding"),
        ("quantizer.layers.0.codebook.embed", (100, 8), "embedding"),
        ("encoder.embedding_hidden_mapping_in.weight", (8, 8), "linear"),
        ("embeddings.patch_embedding.weight", (8, 8), "linear"),
        ("encoder.stages.2.cls_token", (1, 1, 8), "embedding"),
        ("qformer.query_tokens", (1, 4, 8), "embedding"),
        ("resampler.latents", (4, 8), "embedding"),
        ("attention.self.query.weight", (8, 8), "linear"),
        ("layers.0.grn.weight", (1, 1, 1, 8), "vector"),
        ("layers.0.layer_scale", (8, 1, 1), "vector"),
        ("attn.logit_scale", (4, 1, 1), "vector"),
        ("decoder.snake1.alpha", (1, 8, 1), "vector"),
        ("conv.weight_g", (8, 1, 1), "vector"),
        ("conv.weight_v", (8, 4, 3), "conv"),
        ("conv.parametrizations.weight.original0", (8, 1, 1), "vector"),
        ("attn.attention_biases", (4, 16), "bias"),
        ("attn.slope_rate", (8, 1, 1), "vector"),
        ("attn.key_decay", (8, 16, 1), "state"),
        ("ctc_head.weight", (32, 8, 1), "head"),
        ("codebooks_head.weight", (4, 8, 100), "head"),
        ("block_sparse_moe.input_linear.weight", (4, 128, 64), "experts"),
        ("mixer.x_proj_weight", (2, 16, 64), "experts"),
        ("stft.forward_basis", (130, 1, 64), "conv"),
        ("encoder.long_conv.weight", (64, 4, 128), "conv"),
        ("decoder.block.0.conv_t1.weight", (8, 4, 16), "conv_transpose"),
        ("decoder.0.convtr.convtr.weight", (8, 4, 16), "conv_transpose"),
        ("mask_decoder.upscale_conv1.weight", (8, 4, 2, 2), "conv_transpose"),
        ("encoder.conv.up_conv.weight", (8, 4, 1), "conv"),
    ],
)
def test_kind_by_name(name, shape, kind):
    assert kind_of(spec(name, *shape)) == kind


@pytest.mark.parametrize(
    ("module", "name", "shape", "kind"),
    [
        ("Linear", "up.weight", (8, 8), "linear"),
        ("NonDynamicallyQuantizableLinear", "attn.out_proj.weight", (8, 8), "linear"),
        ("ConvTranspose2d", "up.weight", (8, 4, 3, 3), "conv_transpose"),
        ("Conv2d", "embed.weight", (8, 4, 3, 3), "conv"),
        ("Embedding", "words.weight", (8, 4), "embedding"),
        ("Embedding", "position_embeddings.weight", (8, 4), "position"),
        ("BertLayerNorm", "x.weight", (8,), "norm"),
        ("LlamaRMSNorm", "x.weight", (8,), "norm"),
        ("BatchNorm2d", "x.weight", (8,), "norm"),
        ("LSTM", "rnn.weight_hh_l0", (8, 4), "recurrent"),
        ("Conv1D", "h.0.attn.c_attn.weight", (8, 24), "linear_transposed"),
        ("Linear", "lm_head.weight", (100, 8), "head"),
        ("Linear", "embed_action.weight", (8, 4), "linear"),
        ("Linear", "rows.weight", (8, 1), "linear"),
        ("Conv1d", "conv.weight_g", (8, 1, 1), "vector"),
        ("Conv1d", "conv.weight_v", (8, 4, 3), "conv"),
        ("Conv2d", "depthwise.weight", (8, 1, 1, 1), "conv"),
        ("GraniteMoeParallelExperts", "mlp.input_linear.weight", (4, 16, 8), "experts"),
        ("GptOssExperts", "mlp.experts.gate_up_proj_bias", (4, 16), "bias"),
    ],
)
def test_the_module_decides_where_it_is_known(module, name, shape, kind):
    assert kind_of(spec(name, *shape, module=module)) == kind


def test_last_plain_layer_of_several_is_the_head():
    specs = annotate([spec("conv1.weight", 8, 3, 3, 3), spec("fc.weight", 10, 8)], ModelInfo("m"))
    assert [s.kind for s in specs] == ["conv", "head"]
    alone = annotate([spec("fc.weight", 10, 8)], ModelInfo("m"))
    assert [s.kind for s in alone] == ["linear"]


def test_only_the_last_of_a_sequence_called_classifier_is_the_head():
    names = ["features.0.weight", "classifier.0.weight", "classifier.3.weight", "classifier.6.weight"]
    specs = annotate([spec(names[0], 8, 3, 3, 3), *(spec(n, 8, 8) for n in names[1:])], ModelInfo("vgg"))
    assert [s.kind for s in specs] == ["conv", "linear", "linear", "head"]


def test_fuse_groups():
    prefix = "model.layers.3.self_attn"
    assert {fuse_group(spec(f"{prefix}.{x}_proj.weight", 8, 8)) for x in "qkv"} == {f"{prefix}.qkv"}
    assert fuse_group(spec(f"{prefix}.o_proj.weight", 8, 8)) is None
    assert fuse_group(spec(f"{prefix}.q_proj.bias", 8)) is None
    experts = {fuse_group(spec(f"m.experts.{i}.{p}.weight", 8, 8)) for i in (0, 1, 11) for p in ("w1", "w2", "w3")}
    assert experts == {"m.experts"}


def test_a_declared_tie_is_a_tie_only_when_declared_and_of_one_shape():
    specs = [spec("model.embed_tokens.weight", 100, 8), spec("lm_head.weight", 100, 8)]
    tied = annotate(specs, ModelInfo("m", {"tie_word_embeddings": True}))
    assert [s.tied_to for s in tied] == [None, "model.embed_tokens.weight"]
    assert [s.tied_to for s in annotate(specs, ModelInfo("m", {"tie_word_embeddings": False}))] == [None, None]
    other = [specs[0], spec("lm_head.weight", 90, 8)]
    assert [s.tied_to for s in annotate(other, ModelInfo("m", {"tie_word_embeddings": True}))] == [None, None]


def test_every_kept_kind_has_a_reason():
    assert all(len(reason) > 5 for reason in KEPT_KINDS.values())


@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"])
def test_models_whose_matrices_lie_transposed(model_type):
    info = ModelInfo("m", {"model_type": model_type})
    for owner in ("attn.c_attn", "crossattention.q_attn", "attn.c_proj", "mlp.c_fc"):
        assert kind_of(spec(f"h.0.{owner}.weight", 8, 24), info) == "linear_transposed"
        assert kind_of(spec(f"h.0.{owner}.weight", 8, 24), ModelInfo("m", {"model_type": "gpt_neo"})) == "linear"


ARCHITECTURES = (
    *("albert", "bert", "canine", "deberta-v2", "distilbert", "electra", "layoutlmv3", "luke", "mamba", "markuplm"),
    *("mobilebert", "opt", "prophetnet", "roc_bert", "sam", "tapas", "wav2vec2-bert", "wav2vec2-conformer", "wavlm"),
)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_alone_do_not_take_other_layers_for_linear(model_type):
    """Of models of the transformers library: what a checkpoint's names say against what the modules are."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    state, modules = model.state_dict(), dict(model.named_modules(remove_duplicate=False))
    info = ModelInfo(model_type, {"model_type": model_type})
    specs = annotate([spec(n, *t.shape, dtype=str(t.dtype).removeprefix("torch.")) for n, t in state.items()], info)
    linear = {
        s.name
        for s in specs
        if s.is_float and s.name.endswith(".weight") and len(s.shape) == 2 and s.kind not in KEPT_KINDS
    }
    found = {name: modules[name.removesuffix(".weight")] for name in linear}
    wrong = [name for name, module in found.items() if not isinstance(module, torch.nn.Linear)]
    assert wrong == []
    every = [n for n, m in modules.items() if isinstance(m, torch.nn.Linear)]
    assert len(linear) > len(every) / 2
