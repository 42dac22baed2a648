"""Archives of torch.export.save, read from their JSON and raw weights.

``torch.export.load`` is not used: it unpickles the sample inputs, and whatever else the archive calls a pickle,
without restriction. Here sample inputs are never looked at and other pickles are refused. Imports no torch.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from monoquant_core.containers.archive import Archive
from monoquant_core.containers.entries import TensorEntry, check_name, parse_json, shown, strided_entry, tensor_at
from monoquant_core.containers.reader import FileReader
from monoquant_core.errors import SourceError

if TYPE_CHECKING:
    import torch

MAX_JSON = 1 << 28  #: bytes of a graph or a table of weights
_STRIDED = 7  #: torch._export.serde.schema.Layout.Strided
_HINT = "save it again with this torch's torch.export.save; if you trust who made the file, pass --unsafe-pickle"

#: torch._export.serde.schema.ScalarType -> torch's name
DTYPES = {
    **{1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 28: "uint16", 34: "uint32", 35: "uint64"},
    **{6: "float16", 7: "float32", 8: "float64", 13: "bfloat16", 12: "bool"},
    **{9: "complex32", 10: "complex64", 11: "complex128"},
    **{29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu"},
}

#: operator -> the torch.nn class whose weight it takes, for weights that modules of the user's own hold
OPERATORS = {
    **{f"conv{n}d": f"Conv{n}d" for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": f"ConvTranspose{n}d" for n in (1, 2, 3)},
    **{"linear": "Linear", "embedding": "Embedding", "embedding_bag": "EmbeddingBag"},
    **{"layer_norm": "LayerNorm", "group_norm": "GroupNorm", "batch_norm": "BatchNorm2d", "rms_norm": "RMSNorm"},
}


@dataclass
class Program:
    """The weights of an exported program."""

    entries: dict[str, TensorEntry] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  #: name -> first name of the same storage
    modules: dict[str, str] = field(default_factory=dict)  #: name -> class of the module that owns it
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  #: of records that had to be unpickled
    notes: list[str] = field(default_factory=list)


def read_program(reader: FileReader, *, unsafe_pickle: bool = False) -> Program:
    """Find the parameters and buffers of a ``.pt2`` file.

    :param unsafe_pickle: unpickle weights that are stored so, instead of refusing them.
    :raises SourceError: when the file is damaged, holds weights as pickles, or several programs.
    """
    archive = Archive(reader)
    model = _model(archive)
    archive.check_byte_order()
    program = Program()
    names, left_out = _signature(archive, model)
    _read_constants(archive, model, unsafe_pickle, program)
    table = f"data/weights/{model}_weights_config.json"
    if table not in archive and f"data/weights/{model}.pt" in archive:
        _read_pickled_weights(archive, f"data/weights/{model}.pt", unsafe_pickle, program)
    else:
        _read_weights(archive, table, unsafe_pickle, program)
    missing = [name for name in names if name not in program.entries and name not in program.tensors]
    if missing:
        raise SourceError(
            f"{tensor_at(reader.path, missing[0])}: the program uses it, and the archive lacks its values"
        )
    program.modules = {name: owner for name, owner in names.items() if owner}
    if left_out:
        text = ", ".join(left_out[:8]) + (f" and {len(left_out) - 8} more" if len(left_out) > 8 else "")
        program.notes.append(f"{reader.path}: left out, constants and no part of the state: {text}")
    return program


def _model(archive: Archive) -> str:
    path = archive.reader.path
    if "archive_format" not in archive:
        if "serialized_exported_program.json" in archive or "serialized_state_dict.pt" in archive:
            raise SourceError(
                f"{path}: written by torch before 2.8, with pickled weights",
                hint="load it with torch and save it again",
            )
        raise SourceError(
            f"{path}: a zip archive that torch.export.save did not write: it has no archive_format",
            hint="it has what torch.save writes: give it the suffix .pt" if "data.pkl" in archive else "",
        )
    form, version = archive.read("archive_format", 64), b"0"
    if "archive_version" in archive:
        version = archive.read("archive_version", 64)
    if (form, version) != (b"pt2", b"0"):
        raise SourceError(f"{path}: archive format {shown(form)} version {shown(version)}, b'pt2' and b'0' are known")
    models = [n[len("models/") : -len(".json")] for n in archive.names() if n.startswith("models/") and ".json" in n]
    if len(models) != 1:
        found = ", ".join(models) or "none"
        raise SourceError(f"{path}: an archive with one exported program expected, it has {found}")
    return models[0]


def _signature(archive: Archive, model: str) -> tuple[dict[str, str], list[str]]:
    """Names of the state with the classes of their modules, and names of constants."""
    where = f"{archive.reader.path}: models/{model}.json"
    program = parse_json(archive.read(f"models/{model}.json", MAX_JSON), where)
    inputs: dict[str, str] = {}
    constants: list[str] = []
    try:
        module = program["graph_module"]
        for spec in module["signature"]["input_specs"]:
            (kind, value), *_ = spec.items()
            name = value.get(f"{kind}_name")
            if kind == "parameter" or (kind == "buffer" and value["persistent"]):
                inputs[value["arg"]["name"]] = check_name(archive.reader.path, name)
            elif kind in ("buffer", "tensor_constant"):
                constants.append(check_name(archive.reader.path, name))
        owners = _owners(inputs, map(_use, module["graph"]["nodes"]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as exc:
        raise SourceError(f"{where}: not a graph of torch.export: {type(exc).__name__}: {shown(str(exc))}") from exc
    return {name: owners.get(name, "") for name in inputs.values()}, constants


def program_modules(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Tensor -> class of the module that owns it, of a program in memory: as :func:`read_program` finds in its file."""
    signature = program.graph_signature
    uses = []
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None:
            names = [argument.name for argument in schema.arguments]
            given = [*zip(names, node.args, strict=False), *node.kwargs.items()]
            arguments = [(name, value.name) for name, value in given if hasattr(value, "name")]
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            uses.append(_Use(schema.name.rpartition("::")[2], stack, arguments))
    return _owners({**signature.inputs_to_parameters, **signature.inputs_to_buffers}, uses)


class _Use(NamedTuple):
    """What a node of a graph does with which tensors."""

    operator: str  #: "conv1d"
    stack: list[tuple[str, str]]  #: path and class of the modules that it is in, from outside to inside
    arguments: list[tuple[str, str]]  #: of tensors: name in the operator's schema, and in the graph


def _owners(inputs: dict[str, str], uses: Iterable[_Use]) -> dict[str, str]:
    """Class of the module that owns each tensor: torch.nn's own by their stack, others by what is done with the weight.

    :param inputs: name in the graph -> name in the state.
    """
    owners: dict[str, str] = {}
    state = set(inputs.values())
    for use in uses:
        for argument, value in use.arguments:
            name = inputs.get(value)
            if name is None:
                continue
            own = f"{use.stack[-1][0]}.{name.rpartition('.')[2]}" if use.stack else ""
            if own in state:  # of tied tensors the graph takes one, whichever module asks
                name = own
            kind = dict(use.stack).get(name.rpartition(".")[0], "")
            if not kind.startswith("torch.nn.") and argument == "weight":
                kind = OPERATORS.get(use.operator, kind)
            if kind:
                owners.setdefault(name, kind.rpartition(".")[2])
    return owners


def _use(node: Any) -> _Use:
    """The same of a serialized node."""
    operator = node["target"].removeprefix("torch.ops.aten.").partition(".")[0]
    values = [
        (argument["name"], argument["arg"].get("as_tensor") if isinstance(argument["arg"], dict) else None)
        for argument in node["inputs"]
    ]
    tensors = [(name, value["name"]) for name, value in values if isinstance(value, dict)]
    return _Use(operator, _stack(node["metadata"].get("nn_module_stack", "")), tensors)


def _stack(text: str) -> list[tuple[str, str]]:
    """Path and class of the modules that a node is in: ``key,path,class;key,path,class``."""
    parts = [part.split(",") for part in text.split(";")]
    return [(path, kind) for _, path, kind in (part for part in parts if len(part) == 3)]


def _read_weights(archive: Archive, table: str, unsafe_pickle: bool, program: Program) -> None:
    path = archive.reader.path
    places: dict[str, tuple[int, int]] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, payload in _table(archive, table).items():
        where = tensor_at(path, check_name(path, name))
        record, pickled, meta = payload
        if pickled:
            if not unsafe_pickle:
                raise SourceError(f"{where}: stored as a pickle, which may run code", hint=_HINT)
            program.tensors[name] = _unpickle(archive, f"data/weights/{record}", program, name)
            continue
        if record not in places:
            places[record] = archive.place(f"data/weights/{record}")
        entry = _entry(where, archive, places[record], meta)
        program.entries[name] = entry
        if entry.nbytes:
            key = (entry.offset, entry.shape, entry.strides, entry.dtype)
            if (original := first.setdefault(key, name)) != name:
                program.tied[name] = original


def _read_constants(archive: Archive, model: str, unsafe_pickle: bool, program: Program) -> None:
    """Refuse constants that are pickles: not weights, but a file that has them asks for code to be run."""
    path, table = archive.reader.path, f"data/constants/{model}_constants_config.json"
    pickled = (
        [name for name, (_, is_pickle, _) in _table(archive, table).items() if is_pickle] if table in archive else []
    )
    if pickled and not unsafe_pickle:
        raise SourceError(
            f"{path}: constant {shown(pickled[0])}: stored as a pickle, which may run code",
            hint="export the model without it; --unsafe-pickle leaves it out, unread",
        )
    if pickled:
        program.notes.append(f"{path}: left out, pickled and not read: {', '.join(map(shown, pickled[:8]))}")


def _table(archive: Archive, record: str) -> dict[str, tuple[str, bool, Any]]:
    """Tensor name -> its record, whether that is a pickle, and its description."""
    where = f"{archive.reader.path}: {record}"
    table = parse_json(archive.read(record, MAX_JSON), where).get("config")
    if not isinstance(table, dict):
        raise SourceError(f"{where}: it has no 'config'")
    result = {}
    for name, payload in table.items():
        record_name = payload.get("path_name") if isinstance(payload, dict) else None
        if not isinstance(record_name, str) or type(payload.get("use_pickle")) is not bool:
            raise SourceError(f"{where}: {shown(name)}: path_name and use_pickle expected, got {shown(payload)}")
        result[name] = (record_name, payload["use_pickle"], payload.get("tensor_meta"))
    return result


def _entry(where: str, archive: Archive, place: tuple[int, int], meta: Any) -> TensorEntry:
    try:
        dtype = DTYPES.get(meta["dtype"])
        shape, strides = (tuple(n["as_int"] for n in meta[key]) for key in ("sizes", "strides"))
        first, layout = meta["storage_offset"]["as_int"], meta["layout"]
        if any(type(n) is not int for n in (*shape, *strides, first)):
            raise TypeError("integers expected")
    except (KeyError, TypeError) as exc:
        raise SourceError(f"{where}: not a description of a plain tensor: {shown(meta)}") from exc
    if dtype is None:
        raise SourceError(f"{where}: unknown dtype {shown(meta['dtype'])}")
    if layout != _STRIDED:
        raise SourceError(f"{where}: is not a dense tensor", hint="export the model with plain tensors")
    record = (archive.reader.path, *place)
    return strided_entry(where, dtype, shape, strides, first, record, file_size=archive.reader.size)


def _read_pickled_weights(archive: Archive, record: str, unsafe_pickle: bool, program: Program) -> None:
    """Weights of torch 2.8 and earlier: one pickle."""
    path = archive.reader.path
    if not unsafe_pickle:
        raise SourceError(f"{path}: {record}: weights stored as a pickle, which may run code", hint=_HINT)
    from monoquant_core.containers.in_memory import find_state

    program.tensors, notes = find_state(str(path), _unpickle(archive, record, program))
    program.notes += notes


def _unpickle(archive: Archive, record: str, program: Program, name: str = "") -> Any:
    import torch

    path = archive.reader.path
    program.notes.append(f"{path}: {record}: unpickled with --unsafe-pickle; code in it has run")
    try:
        value = torch.load(io.BytesIO(archive.read(record, archive.reader.size)), "cpu", weights_only=False)
    except Exception as exc:  # a pickle may fail in any way
        raise SourceError(f"{path}: {record}: cannot be unpickled: {type(exc).__name__}: {shown(str(exc))}") from exc
    if name and not isinstance(value, torch.Tensor):
        raise SourceError(f"{tensor_at(path, name)}: its pickle is a {type(value).__name__}")
    return value
