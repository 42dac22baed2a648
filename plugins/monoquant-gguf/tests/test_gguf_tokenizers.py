"""Token ids of llama.cpp and of the tokenizers library, for every kind of tokenizer."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monoquant_gguf.architectures.base import Model
from monoquant_gguf.container import read_array, read_header
from monoquant_gguf.metadata import Metadata, header
from monoquant_gguf.tokenizers import sentencepiece, write

import monoquant_core as mq
from monoquant_core.containers.reader import FileReader
from monoquant_core.errors import MonoquantError, PlanError, SourceError
from monoquant_core.model import ModelInfo

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

LLAMA3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
QWEN2 = LLAMA3.replace("{1,3}", "")
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

KOREAN = "한국어"

HARD = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\ttabs\r\n",
    "It's they'LL we've I'd",
    "1 12 123 1234 12345678 3.14",
    "Größe café naïve Ελλάδα Привет",
    "日本語のテスト 中文",
    KOREAN,
    "🎉 emoji 👩‍👩‍👧 zwj",
    "def f(x):\n    return x ** 2  # comment\n",
    "https://example.com/a?b=c&d=%20",
    "CamelCase snake_case SCREAMING 'quoted' \"double\"",
]


def texts(corpus: str, count: int = 190) -> list[str]:
    """Hard ones, and pieces of a corpus cut anywhere."""
    draw = random.Random(0)
    starts = [draw.randrange(len(corpus) - 300) for _ in range(count)]
    return HARD + [corpus[i : i + draw.randint(1, 250)] for i in starts]


@pytest.fixture
def same_ids(llamacpp: ModuleType, corpus: str) -> Callable[..., None]:
    """Compares the ids of all texts with those of llama.cpp, and with those of a folder made of the file again."""

    def check(file: Path, expected: Any, but: str = "", skip_spaces: bool = False) -> None:
        mq.export(file, file.parent / "again")
        again = tokenizers.Tokenizer.from_file(str(file.parent / "again" / "tokenizer.json"))
        again.no_truncation()
        compared = [t.lstrip(" ") if skip_spaces else t for t in texts(corpus) if t != (but or None)]
        assert len(compared) >= 200
        with llamacpp.Model(str(file), n_ctx=64) as model:
            assert [t for t in compared if model.tokenize(t, True, False) != expected(t)] == []
        assert [t for t in compared if again.encode(t).ids != expected(t)] == []

    return check


def tiny(folder: Path, vocab: int, kind: str = "Llama") -> None:
    """A model of one layer with a vocabulary of that size."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    getattr(transformers, {"Bert": "BertModel"}.get(kind, f"{kind}ForCausalLM"))(config).save_pretrained(folder)


def byte_level(corpus: str, pre: list[Any], *, ignore_merges: bool = False, normalizer: Any = None) -> Any:
    """A byte-level BPE with a pre-tokenizer, trained on the corpus."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(pre) if len(pre) > 1 else pre[0]
    made.decoder = tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([corpus[:150_000], corpus[-150_000:]], trainer)
    made.model.ignore_merges = ignore_merges
    return made


def split(pattern: str) -> list[Any]:
    """What tokenizer.json has for tiktoken's patterns."""
    pre = tokenizers.pre_tokenizers
    return [
        pre.Split(tokenizers.Regex(pattern), "isolated", False),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def plain(digits: bool) -> list[Any]:
    """GPT-2's, with or without digits one by one."""
    pre = tokenizers.pre_tokenizers
    return [*([pre.Digits(individual_digits=True)] if digits else []), pre.ByteLevel(add_prefix_space=False)]


BYTE_LEVEL = {
    "gpt-2": (lambda: plain(False), False),
    "smollm": (lambda: plain(True), False),
    "llama-bpe": (lambda: split(LLAMA3), True),
    "dbrx": (lambda: split(LLAMA3), False),
    "qwen2": (lambda: split(QWEN2), False),
    "gpt-4o": (lambda: split(O200K), False),
}


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_byte_level_bpe_is_recognised(pre: str, tmp_path: Path, corpus: str, same_ids: Callable[..., None]) -> None:
    steps, ignore = BYTE_LEVEL[pre]
    made = byte_level(corpus, steps(), ignore_merges=ignore)
    tiny(tmp_path / "model", made.get_vocab_size())
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf")
    assert metadata(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == pre
    same_ids(tmp_path / "m.gguf", lambda text: made.encode(text).ids)


def metadata(file: Path) -> dict[str, Any]:
    """The pairs of a file."""
    with FileReader(file) as reader:
        return read_header(reader).metadata


def test_an_unknown_pattern_names_the_closest(tmp_path: Path, corpus: str) -> None:
    made = byte_level(corpus, split(LLAMA3.replace("{1,3}", "{1,2}")))
    tiny(tmp_path / "model", made.get_vocab_size())
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    with pytest.raises(PlanError, match=r"no pre-tokenizer of llama.cpp does .* the closest is '(llama-bpe|dbrx)'"):
        mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf")


def test_a_normalizer_is_refused_but_for_nfc_which_is_said(tmp_path: Path, corpus: str) -> None:
    for normalizer, message in (("NFC", None), ("Lowercase", "normalizer Lowercase")):
        made = byte_level(corpus[:20_000], split(QWEN2), normalizer=getattr(tokenizers.normalizers, normalizer)())
        tiny(tmp_path / "model", made.get_vocab_size())
        made.save(str(tmp_path / "model" / "tokenizer.json"))
        if message is None:
            notes = mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf").notes
            assert any("does not normalize texts to NFC" in note for note in notes)
        else:
            with pytest.raises(PlanError, match=message):
                mq.export(tmp_path / "model", tmp_path / "n.gguf", "gguf")


@pytest.mark.parametrize("without", ["tokenizer.json", "tokenizer.model", ""])
@pytest.mark.parametrize("genuine", [False, True])
def test_sentencepiece(
    without: str, genuine: bool, tmp_path: Path, request: pytest.FixtureRequest, same_ids: Callable[..., None]
) -> None:
    """From both files or either: without tokenizer.model, the scores come from the ranks of the merges."""
    source = request.getfixturevalue("tiny_llama" if genuine else "small_llama")
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    if without:
        folder.chmod(0o755)
        (folder / without).unlink()
    file = tmp_path / "m.gguf"
    mq.export(folder, file, "gguf")
    with FileReader(file) as reader:
        scores = read_array(reader, read_header(reader).metadata["tokenizer.ggml.scores"])
    assert len(set(scores)) > len(scores) / 2
    assert scores.count(-1000.0) <= 1  # the converter gives it to every token without tokenizer.model
    reference = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    same_ids(file, lambda text: reference.encode(text).ids)


@pytest.mark.parametrize("prefix", ["metaspace", "none"])
def test_sentencepiece_like_json_with_and_without_a_prefix(
    prefix: str, tmp_path: Path, spm_like: Callable[[str], Any], same_ids: Callable[..., None]
) -> None:
    reference = spm_like(prefix)
    tiny(tmp_path / "model", reference.get_vocab_size())
    reference.save(str(tmp_path / "model" / "tokenizer.json"))
    report = mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf")
    assert metadata(tmp_path / "m.gguf")["tokenizer.ggml.add_space_prefix"] is (prefix == "metaspace")
    # Metaspace adds no second space where there is one; llama.cpp does, and that is said.
    assert any("texts that begin with one" in note for note in report.notes) is (prefix == "metaspace")
    same_ids(tmp_path / "m.gguf", lambda text: reference.encode(text).ids, skip_spaces=prefix == "metaspace")


def test_wordpiece(tmp_path: Path, minilm: Path, same_ids: Callable[..., None]) -> None:
    file = tmp_path / "m.gguf"
    mq.export(minilm, file, "gguf")
    reference = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    reference.no_padding()
    reference.no_truncation()
    same_ids(file, lambda text: reference.encode(text).ids, KOREAN)


@pytest.mark.xfail(
    strict=True, reason="never: llama.cpp takes the vowels of decomposed Hangul for accents and drops them"
)
def test_wordpiece_of_korean(tmp_path: Path, minilm: Path, llamacpp: ModuleType) -> None:
    mq.export(minilm, tmp_path / "m.gguf", "gguf")
    reference = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    reference.no_padding()
    with llamacpp.Model(str(tmp_path / "m.gguf"), n_ctx=64) as model:
        assert model.tokenize(KOREAN, True, False) == reference.encode(KOREAN).ids


@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpiece_trained_here(lowercase: bool, tmp_path: Path, corpus: str, same_ids: Callable[..., None]) -> None:
    made = tokenizers.BertWordPieceTokenizer(lowercase=lowercase)
    made.train_from_iterator(
        [corpus[:100_000], "".join(map(chr, range(0x3040, 0x3100)))], vocab_size=1500, show_progress=False
    )
    around = [(name, made.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    made.post_processor = tokenizers.processors.BertProcessing(*around)
    made.save(str(tmp_path / "tokenizer.json"))
    tiny(tmp_path / "model", made.get_vocab_size(), "Bert")
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "model")
    names = {f"{k}_token": f"[{k.upper()}]" for k in ("unk", "sep", "pad", "cls", "mask")}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(names))
    mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf")
    same_ids(tmp_path / "m.gguf", lambda text: made.encode(text).ids, KOREAN)


def test_added_tokens_chat_template_and_flags(tmp_path: Path, corpus: str, llamacpp: ModuleType) -> None:
    made = byte_level(corpus, split(QWEN2))
    made.add_special_tokens(["<|end|>"])
    made.add_tokens(["<tool>"])
    size = made.get_vocab_size()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tiny(tmp_path / "model", size + 5)  # an embedding of more rows than there are tokens
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|end|>"}, "chat_template": "{{ messages }}"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf")
    found = metadata(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.bos_token_id"] == 1
    assert found["tokenizer.ggml.eos_token_id"] == made.token_to_id("<|end|>")
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    text = "a <tool> b <|end|> c"
    with llamacpp.Model(str(tmp_path / "m.gguf"), n_ctx=64) as model:
        assert model.n_vocab == size + 5
        assert model.tokenize(text, True, True) == made.encode(text).ids


def test_a_model_without_tokenizer_is_refused_with_the_way_out(tmp_path: Path) -> None:
    tiny(tmp_path / "model", 100)
    with pytest.raises(PlanError, match=r"no tokenizer.json, tokenizer.model or vocab.txt") as caught:
        mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf")
    assert "--tokenizer none" in caught.value.hint
    mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf", format_options={"tokenizer": "none"})
    assert metadata(tmp_path / "m.gguf")["llama.vocab_size"] == 100


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path, corpus: str) -> None:
    made = byte_level(corpus[:20_000], plain(False))
    tiny(tmp_path / "model", 50)
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    with pytest.raises(PlanError, match="the model's embedding 50 rows"):
        mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf")


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"\x0a\x7f", b"\x0a\x02\x0a\x7f", b"{}", b"\x0b"])
def test_a_damaged_tokenizer_model_is_refused(data: bytes) -> None:
    with pytest.raises(SourceError, match=r"x: not a sentencepiece model"):
        sentencepiece.parse(data, "x")


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"type": "BPE", "byte_fallback": True, "vocab": [], "merges": []}},
        {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0}, "merges": ["a b c"]}},
        {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"a": -1}, "merges": []}},
        {"model": {"type": "Unigram", "vocab": []}},
        {"model": {"type": "WordPiece", "vocab": {"a": "b"}}},
        {"model": {"type": "WordPiece", "vocab": {}}, "added_tokens": [{"id": "x"}]},
        {"model": {"type": "WordPiece", "vocab": {"\ud800": 0}}},
        {"model": {"type": "WordPiece", "vocab": {"a": 0}, "continuing_subword_prefix": "@@"}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", 3]]}, "decoder": {"type": "ByteLevel"}},
        {
            "model": {"type": "BPE", "vocab": {}, "merges": []},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": 3},
        },
        {"model": 3},
    ],
)
def test_a_malformed_tokenizer_json_is_an_error(content: dict[str, Any], tmp_path: Path) -> None:
    tiny(tmp_path / "model", 100)
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MonoquantError) as caught:
        mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf")
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_tokenizer_files_are_data(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever they say, they are written or refused."""
    leaf = (
        st.none()
        | st.booleans()
        | st.integers(-2, 5)
        | st.sampled_from(["a", "<s>", "a b", "Sequence", "BPE", "\ud800"])
    )
    keys = st.sampled_from(
        ["type", "id", "content", "special", "single", "SpecialToken", "pattern", "processors", "a", "1"]
    )
    junk = st.recursive(leaf, lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3), max_leaves=8)
    model = data.draw(
        st.sampled_from(
            [
                {"type": "WordPiece", "vocab": {"[CLS]": 0, "a": 1}},
                {"type": "BPE", "byte_fallback": True, "vocab": {"<s>": 0, "a": 1, "aa": 2}, "merges": [["a", "a"]]},
            ]
        )
    )
    content: dict[str, Any] = {"model": dict(model)}
    if data.draw(st.booleans()):
        content["pre_tokenizer"] = {"type": "ByteLevel"}
    config: dict[str, Any] = {"bos_token": "<s>"}
    places = st.sampled_from(["added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"])
    others = st.sampled_from(["added_tokens_decoder", "bos_token", "chat_template", "add_bos_token", "strip_accents"])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(places)] = data.draw(junk)
        config[data.draw(others)] = data.draw(junk)
    if data.draw(st.booleans()):
        content["model"][data.draw(st.sampled_from([*content["model"], "unk_token"]))] = data.draw(junk)
    folder = tmp_path_factory.mktemp("fuzz")
    for name, text in (("tokenizer.json", content), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(text))
    files = {path.name: path for path in folder.iterdir()}
    with contextlib.suppress(MonoquantError):
        write(Model(ModelInfo("m", config={}), {}, files), 8, found := Metadata())
        assert header(found, [])
