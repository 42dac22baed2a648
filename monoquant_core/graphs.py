"""What of a source can be run: its module, its program, or the graph of its format. Imports no torch until asked."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monoquant_core.containers.pt2_graph import Pt2Graph
from monoquant_core.errors import CalibrationError, SourceError
from monoquant_core.model import Source
from monoquant_core.rows import all_rows
from monoquant_core.runners import Runnable

if TYPE_CHECKING:
    import torch

    from monoquant_core.tensor import QuantizedTensor

SEQUENCE = 16  #: extent of made-up inputs where a graph leaves it open

_HINT = (
    "run it from what has a graph: pkg.mod:factory with --weights, a .pt2 program, an .onnx file, or the folder of a "
    "transformers model"
)
#: buffers that old checkpoints hold and models compute
_COMPUTED = re.compile(r"(^|\.)(position_ids|inv_freq|rotary_emb\.inv_freq|masked_bias|attn\.bias)$")


def runnable_of(source: Source) -> Runnable:
    """Something that runs what the source holds.

    :raises CalibrationError: when it has only tensors, or what would run it is not installed.
    :raises SourceError: when its graph cannot be loaded.
    """
    graph = source.info.graph
    if graph is not None and hasattr(graph, "runner") and hasattr(graph, "inputs"):
        runnable: Runnable = graph
        return runnable
    from monoquant_core.module_runner import ModuleGraph, ProgramGraph

    if isinstance(graph, Pt2Graph):
        return ProgramGraph(graph.load(), source.info.name)
    if graph is not None and hasattr(graph, "graph_signature"):
        return ProgramGraph(graph, source.info.name)
    return ModuleGraph(module_of(source), source.info.name)


def module_of(source: Source) -> torch.nn.Module:
    """The source as an nn.Module with its weights, in evaluation mode where it was made here.

    :raises CalibrationError: when there is none, or transformers, which would make it, is not installed.
    :raises SourceError: when its weights and its module do not fit.
    """
    graph = source.info.graph
    if isinstance(graph, Pt2Graph):
        graph = graph.load()
    if graph is not None and hasattr(graph, "graph_signature"):
        module: torch.nn.Module = graph.module()
        return module
    if graph is not None and hasattr(graph, "state_dict") and callable(graph):
        found: torch.nn.Module = graph
        return found
    if source.info.model_type is not None and Path(source.info.name).is_dir():
        return _pretrained(source)
    raise CalibrationError(f"{source.info.name}: has tensors and nothing that says how to run them", hint=_HINT)


def load_weights(module: torch.nn.Module, source: Source, needed: Collection[str] | None = None) -> None:
    """Copy a source's tensors into a module, dequantized. Parameters and errors as of :func:`put_weights`."""
    shapes = {spec.name: spec.shape for spec in source.specs()}
    put_weights(module, source.info.name, shapes, lambda name: source.read(name, all_rows(shapes[name])), needed)


def put_weights(
    module: torch.nn.Module,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], QuantizedTensor | torch.Tensor],
    needed: Collection[str] | None = None,
) -> None:
    """Copy tensors into those of a module that have the same names.

    Buffers that models compute may be missing on either side, and so may all names but one of a tied tensor.

    :param name: where the tensors come from, for messages.
    :param read: gives one of them; called when all are known to fit.
    :param needed: tensors that the module must have. By default it must have all, and get all of its own; with names,
        what does not fit otherwise is passed over.
    :raises SourceError: when names or shapes differ, or the module holds no data; it is unchanged then.
    """
    import torch

    from monoquant_core.containers.in_memory import describe, find_state
    from monoquant_core.tensor import QuantizedTensor

    kind = type(module).__name__
    target, _ = find_state(kind, module.state_dict(keep_vars=True))
    own = {spec.name: spec for spec in describe(kind, target)}
    strict, wanted = needed is None, shapes if needed is None else needed
    given = {own[n].tied_to or n for n in shapes if n in own}
    computed = {n for n, _ in module.named_buffers(remove_duplicate=False) if _computed(n)}
    missing = [n for n, spec in own.items() if (spec.tied_to or n) not in given and n not in computed]
    unexpected = [n for n in wanted if n not in own and not _computed(n, shapes[n])]
    differing = [n for n in wanted if n in own and own[n].shape != shapes[n]]
    others = [f"{n} {list(shapes[n])} for {list(own[n].shape)}" for n in sorted(differing)]
    problems = [
        *([f"it lacks {_few(sorted(missing))}"] if missing and strict else []),
        *([f"the module has no {_few(sorted(unexpected))}"] if unexpected else []),
        *([f"other shapes: {_few(others)}"] if others else []),
    ]
    if not given and not problems:
        problems = ["no tensor has the name of one of the module's"]
    if problems:
        raise SourceError(f"{name}: does not fit {kind}: {'; '.join(problems)}")
    with torch.no_grad():
        for n, shape in shapes.items():
            if n in own and own[n].shape == shape:
                value = read(n)
                target[n].copy_(value.dequantize() if isinstance(value, QuantizedTensor) else value)


def made_up_batch(runnable: Runnable, samples: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of the right shapes and dtypes without meaning: to trace a graph, never to calibrate.

    Token ids are below the vocabulary's size where the model says it, other integers 0 or 1, floats normal.

    :raises CalibrationError: when the model does not say what it takes.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    config = getattr(getattr(runnable, "module", None), "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    named = {i.name for i in runnable.inputs}
    if isinstance(vocabulary, int) and "input_ids" in named:
        ids = torch.randint(0, vocabulary, (samples, SEQUENCE), generator=generator)
        batch = {"input_ids": ids}
        if "attention_mask" in named:
            batch["attention_mask"] = torch.ones_like(ids)
        if "token_type_ids" in named and getattr(config, "type_vocab_size", None):
            batch["token_type_ids"] = torch.zeros_like(ids)
        if "decoder_input_ids" in named and getattr(config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = ids.flip(1)[:, 1:]  # of another length: the two need not be equal
        return batch
    size, channels = (getattr(config, key, None) for key in ("image_size", "num_channels"))
    if isinstance(size, int) and isinstance(channels, int) and "pixel_values" in named:
        return {"pixel_values": torch.randn((samples, channels, size, size), generator=generator)}
    batch = {}
    for given in runnable.inputs:
        if given.shape is None or not given.dtype:
            if not given.required:
                continue
            raise CalibrationError(
                f"{getattr(runnable, 'name', 'the model')}: nothing tells what its input {given.name!r} is",
                hint="give example inputs with --data",
            )
        free = [SEQUENCE if n is None else n for n in given.shape]
        shape = [samples if given.shape[0] is None else free[0], *free[1:]] if free else []
        dtype: Any = getattr(torch, given.dtype)
        if dtype.is_floating_point:
            batch[given.name] = torch.randn(shape, generator=generator).to(dtype)
        else:
            batch[given.name] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    return batch


def _pretrained(source: Source) -> torch.nn.Module:
    """A model of the transformers library, by the class that its config.json names. No code of the folder is run."""
    with _quietly():
        return _from_folder(source)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Libraries that transformers imports warn of what concerns nobody here."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _from_folder(source: Source) -> torch.nn.Module:
    folder, config = source.info.name, source.info.config or {}
    try:
        import transformers
    except ImportError as exc:
        raise CalibrationError(
            f"{folder}: running it needs the transformers library", hint="pip install transformers"
        ) from exc
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    known = isinstance(name, str) and re.fullmatch(r"[A-Z]\w*", name)
    kind = getattr(transformers, str(name), None) if known else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CalibrationError(
            f"{folder}: config.json names {name!r}, which transformers {transformers.__version__} does not have",
            hint="name your own class: pkg.mod:factory with --weights",
        )
    bars: Any = transformers.utils.logging
    shows = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    pretrained: Any = kind
    try:
        model, loaded = pretrained.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, dtype="auto"
        )
    except Exception as exc:  # its reader fails in many ways
        reason = f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"
        raise SourceError(f"{folder}: transformers does not load it: {reason}") from exc
    finally:
        if shows:
            bars.enable_progress_bar()
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(n if isinstance(n, str) else n[0] for n in loaded.get(what, ()))
        names = [n for n in names if not _COMPUTED.search(n)]
        if names:
            raise SourceError(f"{folder}: does not fit {name}: {what.replace('_', ' ')}: {_few(names)}")
    module: torch.nn.Module = model.eval()
    return module


def _computed(name: str, shape: tuple[int, ...] = ()) -> bool:
    """Whether a tensor is a buffer that models compute, and not the bias of a layer that is called ``attn``."""
    return _COMPUTED.search(name) is not None and not (name.endswith("attn.bias") and len(shape) == 1)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
