"""``inspect``: what is in a checkpoint or a finished file, from its headers."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from monoquant_core.cli import flags
from monoquant_core.cli.render import (
    Column,
    exact,
    fields,
    heading,
    layer_inputs,
    notes,
    out,
    out_json,
    plural,
    shape,
    size,
    table,
)
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.plugins import Registry


def register(app: typer.Typer, registry: Registry) -> None:
    """Add the command."""

    @app.command()
    def inspect(
        path: Annotated[str, typer.Argument(metavar="PATH", help=flags.SRC_HELP, show_default=False)],
        unsafe_pickle: flags.UnsafePickle = False,
        json: flags.Json = False,
    ) -> None:
        """Show the tensors of a checkpoint or a finished file: encodings, sizes, bits per weight, metadata."""
        from monoquant_core import api

        source = api.open_source(path, registry=registry, unsafe_pickle=unsafe_pickle)
        try:
            if json:
                out_json(as_dict(source.info, source.specs()))
            else:
                _show(source.info, source.specs())
        finally:
            source.close()


def stored(spec: TensorSpec) -> str:
    """How a tensor is stored: its encoding, or its dtype."""
    return str(spec.encoding) if spec.encoding is not None else spec.dtype


def sums(specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """Elements, bytes and bits per weight; tied names count once."""
    own = [spec for spec in specs if spec.tied_to is None]
    elements, nbytes = sum(spec.numel for spec in own), sum(spec.nbytes for spec in own)
    return {
        "tensors": len(specs),
        "quantized": sum(spec.encoding is not None for spec in own),
        "tied": len(specs) - len(own),
        "elements": elements,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / elements if elements else 0.0,
    }


def as_dict(info: ModelInfo, specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """JSON form; encodings are complete."""
    tensors = [
        {
            "name": spec.name,
            "shape": list(spec.shape),
            "dtype": spec.dtype,
            "stored": stored(spec),
            "encoding": spec.encoding.to_dict() if spec.encoding is not None else None,
            "activation": spec.activation.to_dict() if spec.activation is not None else None,
            "kind": spec.kind,
            "module": spec.module,
            "tied_to": spec.tied_to,
            "bytes": spec.nbytes,
        }
        for spec in specs
    ]
    return {
        "name": info.name,
        "model_type": info.model_type,
        "files": [str(path) for path in info.paths],
        "side_files": sorted(info.side_files),
        "metadata": dict(info.metadata),
        **{key: value for key, value in sums(specs).items() if key != "tensors"},
        "tensors": tensors,
        "notes": list(info.notes),
    }


def _show(info: ModelInfo, specs: Sequence[TensorSpec]) -> None:
    columns = [
        Column("tensor", fold=True),
        Column("shape"),
        Column("stored as", fold=True),
        Column("bytes", right=True),
        Column("kind"),
        Column("tied to", fold=True),
    ]
    rows = [
        [spec.name, shape(spec.shape), stored(spec), size(spec.nbytes), spec.kind, spec.tied_to or ""] for spec in specs
    ]
    counted = sums(specs)
    table(columns, rows, footer=["total", "", "", size(counted["bytes"]), "", ""])
    out()
    heading(info.name)
    pairs = [("model", info.model_type)] if info.model_type else []
    tied = f", {counted['tied']} tied" if counted["tied"] else ""
    pairs += [
        ("tensors", f"{plural(len(specs), 'tensor')}, {counted['quantized']:,} quantized{tied}"),
        ("weights", f"{counted['elements']:,}, {counted['bits_per_weight']:.2f} bits each"),
        *layer_inputs(spec.activation for spec in specs if spec.tied_to is None),
        ("bytes", exact(counted["bytes"])),
    ]
    if info.paths:
        pairs.append(("files", plural(len(info.paths), "file")))
    if info.side_files:
        pairs.append(("beside", ", ".join(sorted(info.side_files))))
    pairs += [(key, _short(value)) for key, value in info.metadata.items()]
    fields(pairs)
    notes(info.notes)


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters; see --json)"
