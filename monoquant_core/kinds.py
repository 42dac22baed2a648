"""What kind of tensor a name, a shape and a module class say it is, and which tensors belong together.

Imports no torch. The tables below are the place to teach monoquant a new naming convention.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from monoquant_core.model import ModelInfo, TensorSpec

#: kinds that the default recipe keeps, with the reason it gives
KEPT_KINDS = {
    "norm": "normalization: tiny, and sensitive to rounding",
    "bias": "bias: tiny, and added at full precision",
    "vector": "a vector or scalar: tiny",
    "embedding": "embedding: looked up, not multiplied",
    "position": "positional: tiny, and sensitive to rounding",
    "router": "router: decides which expert runs",
    "head": "output head: its errors go straight into the result",
    "head_transposed": "output head: its errors go straight into the result",  # [inputs, outputs], as in ONNX graphs
    "state": "state-space parameter or buffer: enters exponentials or masks",
}

#: kinds that hold the bulk of the weights
WEIGHT_KINDS = ("linear", "linear_transposed", "conv", "conv_transpose", "recurrent", "experts", "")

HEADS = ("head", "head_transposed")

_MODULE_KINDS = (  # class name -> kind; the first that matches
    (re.compile(r"Embedding(Bag)?$"), "embedding"),
    (re.compile(r"Norm(\d?d)?$|Norm2d|BatchNorm"), "norm"),
    (re.compile(r"ConvTranspose\dd$"), "conv_transpose"),
    (re.compile(r"Conv[123]d$"), "conv"),
    (re.compile(r"^Conv1D$"), "linear_transposed"),  # GPT-2 stores [in, out]
    (re.compile(r"^(LSTM|GRU|RNN)(Cell)?$"), "recurrent"),
    (re.compile(r"Linear$|^MultiheadAttention$"), "linear"),
    (re.compile(r"Experts$"), "experts"),
)

_EMBEDDINGS = re.compile(  # tables that are looked up, and learned tokens
    r"embed(s|ding|dings|der|ders)?(\d|_|$)|(^|_)embs?(_|$)|(^|_)tokens?$|^(wte|shared|codebook|query_feat|queries_features)$",
    re.I,
)
_LISTED_EMBEDDINGS = re.compile(
    r"(^|\.)(\w*embeddings|embed_tokens|input_embeds_layers|point_embed)\.\d+$"
)  # one per codebook
_QUERIES = re.compile(r"^(query|latents?|latents?_\w+)$")  # parameters that a model asks its inputs with
_POSITIONS = re.compile(
    r"(^|[._])(pos|position|positions|positional|wpe|rotary|rope|inv_freq|rel_pos)([._]|$)"
    r"|relative_attention|pos_?emb|position_embedding|relative_position|(^|[._])rel(ative)?_emb"
)
#: layers that embeddings or positions go through: "pos_key_proj", "linear_pos", "patch_embedding"
_MAPPINGS = re.compile(r"proj|mapping|transform|linear|dense|patch|(^|_)(fc|mlp|conv)\d*(_|$)", re.I)
_NORMS = re.compile(
    r"(^|_)(norm|norms|layernorm|layer_norm|ln|bn|batchnorm|groupnorm|rmsnorm)(\d*|_f|_\w)$|norm\d*$|^ln_", re.I
)
_ROUTERS = re.compile(r"^(gate|router|shared_expert_gate|wg)$")
_STATE = re.compile(
    r"^(A_log|A|D|dt_bias|causal_mask|attn_mask|masked_bias|running_mean|running_var|position_ids|\w+_decay)$"
)
_HEADS = re.compile(
    r"^(lm_head|embed_out|output_projection|classifier|score|qa_outputs|logits|head|heads|decoder_head|seq_relationship|predictions)$"
)
_WEAK_HEADS = re.compile(
    r"^((model|module|net)\.)?(fc|linear|output|out|out_proj|proj_out)\.weight$"
)  # only as the last of several
_TRANSPOSED = re.compile(
    r"conv_?trans|conv_?tr?(\d|_|\.)|trans(posed?)?_?conv|deconv|up_?conv(?!\w*block)|upscale_conv", re.I
)
_CONV1D = (
    "gpt2",
    "openai-gpt",
    "imagegpt",
    "decision_transformer",
    "clvp",
)  #: model types whose matrices lie [in, out]

_FUSED = (  # runtimes join these into one matrix: all members get one scheme
    (re.compile(r"^(.*)\.experts\.\d+\.(gate_proj|up_proj|down_proj|w[123])\.weight$"), "experts"),
    (re.compile(r"^(.*)\.(q_proj|k_proj|v_proj)\.weight$"), "qkv"),
    (re.compile(r"^(.*)\.(query|key|value)\.weight$"), "qkv"),
    (re.compile(r"^(.*)\.(gate_proj|up_proj)\.weight$"), "gate_up"),
)

_TIED_INPUTS = re.compile(r"(^|\.)(embed_tokens|wte|tok_embeddings|word_embeddings|shared|embed_in)\.weight$")


def annotate(specs: Sequence[TensorSpec], info: ModelInfo) -> list[TensorSpec]:
    """Fill in ``kind``, ``fuse`` and the ties that the config declares, where the source did not.

    The module's class decides the kind where it is known; else the name and the rank do.
    """
    result = [dataclasses.replace(s, kind=s.kind or kind_of(s, info), fuse=s.fuse or fuse_group(s)) for s in specs]
    return _tie_by_config(_weak_head(_last_of_sequence(result, info)), info)


def kind_of(spec: TensorSpec, info: ModelInfo | None = None) -> str:
    """The kind of one tensor; "" when nothing tells."""
    *path, leaf = spec.name.split(".")
    owner = path[-1] if path else leaf
    rank = len(spec.shape)
    if leaf == "bias" or leaf.endswith(("_bias", "_biases")) or leaf.startswith("bias_"):
        return "bias"
    if _STATE.match(leaf):
        return "state"
    is_head = owner.endswith("_head") or any(_HEADS.match(part) for part in path[-2:])
    if is_head and rank >= 2 and "Norm" not in spec.module:
        return "head"
    kind = next((kind for pattern, kind in _MODULE_KINDS if pattern.search(spec.module)), "")
    if kind == "embedding" and _POSITIONS.search(spec.name):
        return "position"
    if kind in ("linear", "") and rank == 2 and (_ROUTERS.match(owner) or path[-2:-1] == ["router"]):
        return "router"
    if kind in ("linear", "conv", "conv_transpose") and leaf != "weight" and _is_vector(spec.shape):
        return "vector"  # such as weight_g of a weight norm
    if kind and (kind != "experts" or rank == 3):
        return kind if rank >= 2 or kind == "norm" else "vector"
    return _kind_by_name(spec, path, leaf, info)


def fuse_group(spec: TensorSpec) -> str | None:
    """The name of the group of tensors that a runtime joins with this one."""
    if len(spec.shape) != 2:
        return None
    for pattern, label in _FUSED:
        if found := pattern.match(spec.name):
            return f"{found.group(1)}.{label}"
    return None


def _is_vector(shape: tuple[int, ...]) -> bool:
    """Whether every output channel has one number, whatever the number of axes."""
    return math.prod(shape[1:]) == 1 or (len(shape) > 2 and sum(n > 1 for n in shape) < 2)


def _kind_by_name(spec: TensorSpec, path: list[str], leaf: str, info: ModelInfo | None) -> str:
    rank, owner = len(spec.shape), path[-1] if path else leaf
    subject = owner if leaf == "weight" else leaf
    if _NORMS.search(owner) and rank <= 2:
        return "norm"
    if _POSITIONS.search(spec.name) and not (rank == 2 and _MAPPINGS.search(owner)):
        return "position"
    if rank < 2:
        return "vector"
    looked_up = _EMBEDDINGS.search(subject) is not None and not _MAPPINGS.search(subject)
    if (rank == 2 or spec.shape[0] == 1) and (looked_up or _LISTED_EMBEDDINGS.search(".".join(path))):
        return "embedding"
    if _is_vector(spec.shape):
        return "vector"
    if "weight" not in leaf and (_QUERIES.match(leaf) or (rank > 2 and spec.shape[0] == 1)):
        return "embedding"  # learned queries and prompts, alike for every sample of a batch
    if rank == 3 and ("expert" in spec.name or _is_stack(spec)):
        return "experts"
    if rank in (3, 4, 5):
        transposed = _TRANSPOSED.search(spec.name) and math.prod(spec.shape[2:]) > 1
        return "conv_transpose" if transposed else "conv"
    if leaf.startswith(("weight_ih", "weight_hh")):
        return "recurrent"
    if info is not None and info.model_type in _CONV1D and owner in ("c_attn", "q_attn", "c_proj", "c_fc"):
        return "linear_transposed"
    return "linear" if rank == 2 else ""


def _is_stack(spec: TensorSpec) -> bool:
    """Whether it is one matrix for each expert, head or codebook: no convolution's kernel is that long."""
    return spec.shape[1] > 1 and spec.shape[2] >= 64 and "conv" not in spec.name.lower()


def _last_of_sequence(specs: list[TensorSpec], info: ModelInfo) -> list[TensorSpec]:
    """Of ``classifier.0``, ``.3`` and ``.6`` only the last is the head: VGG keeps most of its weights there."""
    numbered: dict[str, list[tuple[int, int]]] = {}
    for i, spec in enumerate(specs):
        if spec.kind in HEADS and (found := re.match(r"(.*)\.(\d+)\.weight$", spec.name)):
            numbered.setdefault(found.group(1), []).append((int(found.group(2)), i))
    for members in numbered.values():
        for _, i in sorted(members)[:-1]:
            kind = kind_of(dataclasses.replace(specs[i], name="layer.weight"), info)
            specs[i] = dataclasses.replace(specs[i], kind="linear_transposed" if specs[i].transposed else kind)
    return specs


def _weak_head(specs: list[TensorSpec]) -> list[TensorSpec]:
    """A last layer called ``fc`` or ``linear`` is the head of a classifier, if there are other layers before it."""
    weights = [i for i, s in enumerate(specs) if s.kind in WEIGHT_KINDS and len(s.shape) >= 2 and s.is_float]
    if len(weights) > 1 and not any(s.kind in HEADS for s in specs):
        last = weights[-1]
        if _WEAK_HEADS.match(specs[last].name):
            kind = "head_transposed" if specs[last].transposed else "head"
            specs[last] = dataclasses.replace(specs[last], kind=kind)
    return specs


def _tie_by_config(specs: list[TensorSpec], info: ModelInfo) -> list[TensorSpec]:
    if not (info.config or {}).get("tie_word_embeddings"):
        return specs
    embedding = next((s for s in specs if _TIED_INPUTS.search(s.name) and s.tied_to is None), None)
    if embedding is None:
        return specs
    return [
        dataclasses.replace(s, tied_to=embedding.name)
        if s.tied_to is None and re.search(r"(^|\.)lm_head\.weight$", s.name) and s.shape == embedding.shape
        else s
        for s in specs
    ]
