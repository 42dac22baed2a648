"""The graph of a ``.pt2`` file, loaded by torch from a copy that can run no code.

``torch.export.load`` trusts its file: it unpickles sample inputs, opens compiled libraries, evaluates the expressions
of dynamic shapes and compiles Python source that it makes from the names in the graph. So it is given a copy that has
only the graph and plain tensors, and every text of the graph is checked before: names are names, operators are
operators, expressions are arithmetic. Imports no torch until the graph is loaded.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from monoquant_core.containers.archive import Archive
from monoquant_core.containers.entries import parse_json, shown
from monoquant_core.containers.reader import FileReader
from monoquant_core.errors import SourceError

if TYPE_CHECKING:
    import torch

MAX_JSON = 1 << 28  #: bytes of a graph or a table of weights
COPY_BYTES = 1 << 22

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)
_PLAIN = re.compile(r"[\w .:,;<>\[\]/+*@-]*", re.ASCII)
_OPERATOR = re.compile(
    r"torch\.ops\.(?!higher_order)[a-z]\w*\.(?!__(?!and__|or__|xor__|iand__|ior__|ixor__|[il]?[lr]shift__))\w+\.(?!__)\w+"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|map_impl|associative_scan|wrap_with_\w+)"
    r"|(_operator|math)\.[a-z]\w*|torch\.sym_[a-z]\w*|torch\.(_sym_[a-z]\w*)",
    re.ASCII,
)
#: operators that touch files
_FILES = re.compile(r"\.(from_file|save)\.")
#: how sympy writes a symbol of a dynamic extent
_SYMBOL = re.compile(r"Symbol\('[A-Za-z]\w*'(, [a-z]+=(True|False))*\)", re.ASCII)
#: what sympy writes an expression of symbols with
_EXPRESSION = re.compile(r"(?:[A-Za-z_]\w*|\d+(?:\.\d*)?|[-+*/%(),<>=!&|~' ])*", re.ASCII)
_FUNCTIONS = {
    *("Add", "Mul", "Pow", "Integer", "Rational", "Float", "Max", "Min", "Abs", "Eq", "Ne", "Equality", "Unequality"),
    *("StrictLessThan", "StrictGreaterThan", "LessThan", "GreaterThan", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not"),
    *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv"),
    *("LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt"),
    *("RoundToInt", "RoundDecimal", "ToFloat", "Identity", "true", "false", "True", "False", "precision"),
    "IsNonOverlappingAndDenseIndicator",
}


class Pt2Graph:
    """The graph of a ``.pt2`` file that has been found free of pickles; loaded when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._program: torch.export.ExportedProgram | None = None
        self._lock = threading.Lock()

    def load(self) -> torch.export.ExportedProgram:
        """The program, with its weights; the same one every time.

        :raises SourceError: when the file carries code in any form, or torch does not take its graph.
        """
        with self._lock:
            if self._program is None:
                self._program = self._load()
        return self._program

    def _load(self) -> torch.export.ExportedProgram:
        import torch

        with FileReader(self.path) as reader, tempfile.TemporaryFile() as copy:
            write_safe_copy(reader, copy)
            copy.seek(0)
            said = _Said()
            logger = logging.getLogger("torch.export")
            logger.addFilter(said)  # it logs a traceback before it raises
            try:
                return torch.export.load(copy)
            except Exception as exc:  # torch's reader fails in many ways
                lines = [line.strip() for line in (said.text or str(exc)).splitlines() if line.strip()]
                reason = shown(lines[-1][:190] if lines else type(exc).__name__)
                hint = f"it was exported by another version of torch than {torch.__version__}, perhaps"
                raise SourceError(f"{self.path}: torch cannot load its graph: {reason}", hint=hint) from exc
            finally:
                logger.removeFilter(said)


class _Said(logging.Filter):
    """Keeps what is logged, in place of the log."""

    text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text = str(record.exc_info[1])
        self.text = text
        return False


def write_safe_copy(reader: FileReader, out: IO[bytes]) -> None:
    """Write an archive with the checked graph and the plain tensors of another, and nothing else.

    :raises SourceError: for a pickle, or a text in the graph that could be code.
    """
    archive = Archive(reader)
    models = [n for n in archive.names() if n.startswith("models/") and n.endswith(".json")]
    if len(models) != 1:
        raise SourceError(f"{reader.path}: an archive with one exported program expected, it has {len(models)}")
    model = models[0].removeprefix("models/").removesuffix(".json")
    graph = parse_json(archive.read(models[0], MAX_JSON), f"{reader.path}: {models[0]}")
    check_graph(graph, f"{reader.path}: {models[0]}")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as copy:
        for name in ("archive_format", "archive_version", "byteorder", ".data/version", "version"):
            if name in archive:
                copy.writestr(archive.root + name, archive.read(name, 1024))
        copy.writestr(archive.root + models[0], json.dumps(graph))
        copy.writestr(f"{archive.root}data/sample_inputs/{model}.pt", b"")
        for folder, kind in (("weights", "weight"), ("constants", "tensor")):
            _copy_tensors(archive, model, folder, kind, copy)


def _copy_tensors(archive: Archive, model: str, folder: str, kind: str, copy: zipfile.ZipFile) -> None:
    table = f"data/{folder}/{model}_{folder}_config.json"
    if table not in archive:
        raise SourceError(f"{archive.reader.path}: it has no record {table!r}")
    where = f"{archive.reader.path}: {table}"
    content = archive.read(table, MAX_JSON)
    entries = parse_json(content, where).get("config")
    if not isinstance(entries, dict):
        raise SourceError(f"{where}: it has no 'config'")
    records: dict[str, None] = {}
    for name, payload in entries.items():
        record = payload.get("path_name") if isinstance(payload, dict) else None
        if not isinstance(record, str) or payload.get("use_pickle") is not False:
            raise SourceError(f"{where}: {shown(name)}: stored as a pickle, which may run code")
        if not re.fullmatch(rf"{kind}_\d+", record):
            # constants of other kinds are objects of C++ classes, which are unpickled
            raise SourceError(f"{where}: {shown(name)}: {shown(record)} is no record of a tensor")
        if not _PATH.fullmatch(name):
            raise SourceError(f"{where}: {shown(name)}: a name with other characters than letters, digits and '_'")
        records[record] = None
    copy.writestr(archive.root + table, content)
    for record in records:
        offset, size = archive.place(f"data/{folder}/{record}")
        with copy.open(zipfile.ZipInfo(f"{archive.root}data/{folder}/{record}"), "w", force_zip64=True) as target:
            for start in range(0, size, COPY_BYTES):
                target.write(archive.reader.read(offset + start, min(COPY_BYTES, size - start), record))


def check_graph(graph: dict[str, Any], where: str) -> None:
    """Refuse a serialized graph with a text that torch would run, and take out what it need not have.

    :raises SourceError: naming the text.
    """
    graph["guards_code"] = []  # Python source that torch compiles: checks of the inputs' shapes
    try:
        _check(graph, "", where)
    except RecursionError as exc:
        raise SourceError(f"{where}: nested too deeply") from exc


def _check(value: Any, key: str, where: str) -> None:
    if isinstance(value, list):
        for item in value:
            _check(item, key, where)
    elif isinstance(value, dict):
        if key == "metadata":
            _clean_metadata(value)
        for name, item in value.items():
            if not _is_key(name, key):
                raise SourceError(f"{where}: {shown(name)} is not a name")
            _check(item, name, where)
            if name == "out_spec" and isinstance(item, str) and item:
                value[name] = json.dumps(_plain_tree(json.loads(item)))
    elif isinstance(value, str) and (problem := _problem(value, key)):
        raise SourceError(
            f"{where}: {key}: {shown(value)} is {problem}", hint="export the model again; nothing of it was run"
        )


def _is_key(name: object, parent: str) -> bool:
    """Whether a dictionary of that name may have that key."""
    if not isinstance(name, str):
        return False
    if parent == "range_constraints":
        return _is_arithmetic(name)
    return (_PLAIN if parent == "treespec_namedtuple_fields" else _PATH).fullmatch(name) is not None


def _problem(text: str, key: str) -> str:
    """Why a text of the graph may not be given to torch; "" if it may."""
    if key in ("target", "as_operator"):
        if not _OPERATOR.fullmatch(text):
            return "no operator that a graph may call"
        return "an operator that reads or writes files" if _FILES.search(text) else ""
    if key == "expr_str":
        return "" if _is_arithmetic(text) else "no arithmetic expression"
    if key in ("in_spec", "out_spec"):
        return _treespec_problem(text)
    if key in ("as_string", "as_strings"):
        return ""  # a value, which torch quotes
    if key in ("name", "as_name", "forward_arg_names", "field_names"):
        return "" if not text or _NAME.fullmatch(text) else "not a name"
    if key.endswith("_name") or key == "fqn":
        return "" if not text or _PATH.fullmatch(text) else "not a path of names"
    if key == "class_fqn":
        return "an object of another class than Tensor"
    return "" if _PLAIN.fullmatch(text) else "not plain text"


def _is_arithmetic(text: str) -> bool:
    """Whether evaluating it computes a number and nothing else, soon."""
    rest = _SYMBOL.sub("s0", text)
    if len(rest) > 4000 or not _EXPRESSION.fullmatch(rest) or "'" in re.sub(r"Float\('[\d.e-]*'", "", rest):
        return False
    names = re.findall(r"[A-Za-z_]\w*", re.sub(r"'[^']*'", "", rest))
    if any(not re.fullmatch(r"[a-z]+\d+", name) and name not in _FUNCTIONS for name in names):
        return False
    powers = len(re.findall(r"Pow|\*\*", rest))
    return powers == 0 or (powers <= 2 and all(len(n) <= 2 for n in re.findall(r"\d+", rest)))


def _clean_metadata(metadata: dict[str, Any]) -> None:
    """Keep what says which module a node belongs to; traces of the source are texts of any kind."""
    stack = metadata.get("nn_module_stack")
    metadata.clear()
    if isinstance(stack, str) and _PLAIN.fullmatch(stack):
        metadata["nn_module_stack"] = stack


def _treespec_problem(text: str) -> str:
    """Contexts of a tree may name a Python module to import: of enums, and of a defaultdict's factory."""
    if not text:
        return ""
    try:
        return _tree_problem(json.loads(text), 0)
    except (ValueError, RecursionError):
        return "not a tree of arguments"


def _tree_problem(value: Any, depth: int) -> str:
    if depth > 50:
        return "nested too deeply"
    if isinstance(value, dict):
        if "__enum__" in value or "default_factory_module" in value:
            return "a tree of arguments that imports a module"
        return next((p for k, v in value.items() if (p := _text_problem(k) or _tree_problem(v, depth + 1))), "")
    if isinstance(value, list):
        return next((p for item in value if (p := _tree_problem(item, depth + 1))), "")
    if isinstance(value, str):
        try:
            inner = json.loads(value)  # contexts are JSON in JSON
        except ValueError:
            return _text_problem(value)
        return _tree_problem(inner, depth + 1) if isinstance(inner, dict | list) else _text_problem(value)
    return ""


def _plain_tree(tree: Any) -> Any:
    """A tree of outputs whose classes of other libraries are dictionaries with the same keys.

    Else torch would need the library that the model came from, and had to be told of its classes by importing it.
    """
    if isinstance(tree, list):
        return [_plain_tree(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    tree = {key: _plain_tree(value) for key, value in tree.items()}
    kind, context = tree.get("type"), tree.get("context")
    if isinstance(kind, str) and kind.startswith("transformers.") and isinstance(context, str):
        keys, children = json.loads(context), tree.get("children_spec")
        if isinstance(keys, list) and isinstance(children, list) and len(keys) == len(children):
            tree["type"] = "builtins.dict"
    return tree


def _text_problem(text: str) -> str:
    return "" if _PLAIN.fullmatch(text.strip('"')) else "a tree of arguments with odd names"
