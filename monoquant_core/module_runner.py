"""Running nn.Modules and exported programs. What a weight is multiplied with is found where torch does it.

Two things watch: hooks of modules see what goes in and out, and a dispatch mode sees every matrix product and
convolution, and knows a weight by its memory. So the input of a weight is right where a module hands its weight to a
function (MultiheadAttention), multiplies with a transpose of it (GPT-2) or has several; a hook's input stands in where
the product was not seen, as with weights that are computed first.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from monoquant_core.errors import CalibrationError
from monoquant_core.runners import Batch, Input, Observe
from monoquant_core.tensor import dtype_name

INPUT, OUTPUT = ":input", ":output"

#: operators that multiply with a weight -> where their two operands stand
_PRODUCTS = {
    **{"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::matmul": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2)},
    **{"aten::linear": (0, 1), "aten::convolution": (0, 1), "aten::_convolution": (0, 1)},
}
_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")


def point_of(tensor: str) -> str:
    """The point of what a weight is multiplied with: ``layer1.conv:input`` for ``layer1.conv.weight``."""
    module, _, leaf = tensor.rpartition(".")
    return (module if leaf == "weight" else tensor) + INPUT


class ModuleGraph:
    """An nn.Module as something to run. Batches by name are its keyword arguments.

    :param name: for messages.
    """

    def __init__(self, module: torch.nn.Module, name: str = "") -> None:
        self.module, self.name = module, name or type(module).__name__
        self.inputs = _signature(module)

    def runner(self, points: Collection[str] | None = None, device: str = "") -> ModuleRunner:
        """A runner of the module, in evaluation mode while it runs.

        :raises CalibrationError: for a point that the module does not have.
        """
        return ModuleRunner(self, points, device)


class ProgramGraph:
    """An exported program as something to run."""

    def __init__(self, program: torch.export.ExportedProgram, name: str) -> None:
        self.program, self.name = program, name
        self.inputs = _program_inputs(program)

    def runner(self, points: Collection[str] | None = None, device: str = "") -> ProgramRunner:
        """A runner of the program.

        :raises CalibrationError: for a point that the program does not have.
        """
        return ProgramRunner(self, points, device)


class _Runner:
    """What both have in common: weights, the device, and how batches become arguments."""

    def __init__(self, module: torch.nn.Module, inputs: Sequence[Input], name: str, device: str) -> None:
        self.module, self.inputs, self.name = module, inputs, name
        self.points: Sequence[str] = ()
        self.notes: list[str] = []
        tensors = [*module.parameters(), *module.buffers()]
        self._home = tensors[0].device if tensors else torch.device("cpu")
        self._device = torch.device(device) if device else self._home
        self._float = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        self._stack = contextlib.ExitStack()
        self._observe: Observe | None = None
        self._wanted: set[str] = set()

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _move(self) -> None:
        if self._device != self._home:
            self.module.to(self._device)
            self._stack.callback(self.module.to, self._home)

    def run(self, batch: Batch, observe: Observe | None = None) -> Mapping[str, torch.Tensor]:
        """Run one batch; see :class:`~monoquant_core.runners.Runner`."""
        args, kwargs = self._arguments(batch)
        self._observe = observe
        try:
            with torch.no_grad():
                return _named(self._call(args, kwargs))
        except CalibrationError:
            raise
        except Exception as exc:  # a model may fail in any way
            reason = " ".join(str(exc).partition("While executing")[0].split())[:300]
            given = ", ".join([*map(_shown, args), *(f"{k}={_shown(v)}" for k, v in kwargs.items())])
            raise CalibrationError(
                f"{self.name}: it fails on a batch of {given}: {type(exc).__name__}: {reason}",
                hint=f"its inputs: {describe_inputs(self.inputs)}",
            ) from exc
        finally:
            self._observe = None

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _tell(self, point: str, values: Any, axis: int = -1) -> None:
        if self._observe is not None and point in self._wanted:
            found = _first_tensor(values)
            if found is not None and found.is_floating_point() and found.ndim:
                self._observe(point, found.detach(), axis if -found.ndim <= axis < found.ndim else -1)

    def _arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, on the device and in the dtypes that the model takes."""
        if isinstance(batch, Mapping):
            return (), {name: self._fit(name, value) for name, value in self._by_name(batch).items()}
        values = batch if isinstance(batch, tuple | list) else (batch,)
        named = [i.name for i in self.inputs]
        if len(values) > len(named) and named:
            raise CalibrationError(
                f"{self.name}: a batch of {len(values)} inputs, and it takes {len(named)}",
                hint=f"its inputs: {describe_inputs(self.inputs)}; leave out labels: [x for x, label in loader]",
            )
        names = [*named, *(str(i) for i in range(len(named), len(values)))]
        return tuple(self._fit(name, value) for name, value in zip(names, values, strict=False)), {}

    def _by_name(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        known = {i.name for i in self.inputs}
        unknown = [name for name in batch if name not in known] if "**" not in known else []
        missing = [i.name for i in self.inputs if i.required and i.name not in batch and i.name != "**"]
        if unknown or missing:
            what = f"has no input {unknown[0]!r}" if unknown else f"needs input {missing[0]!r}"
            raise CalibrationError(
                f"{self.name}: it {what}; the batch gives {', '.join(batch) or 'nothing'}",
                hint=f"its inputs: {describe_inputs(self.inputs)}",
            )
        return batch

    def _fit(self, name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        wanted = next((i.dtype for i in self.inputs if i.name == name), "")
        made = convert(value, wanted or (dtype_name(self._float) if value.is_floating_point() else ""), self.name, name)
        if made.dtype != value.dtype:
            note = f"input {name!r}: {dtype_name(value.dtype)} values are cast to {dtype_name(made.dtype)}"
            if note not in self.notes:
                self.notes.append(note)
        return made.to(self._device)


class ModuleRunner(_Runner):
    """Runs an nn.Module and watches its modules. The module is as it was once the runner is left."""

    def __init__(self, graph: ModuleGraph, points: Collection[str] | None, device: str) -> None:
        super().__init__(graph.module, graph.inputs, graph.name, device)
        self._weights = _Weights(graph.module)
        modules = dict(graph.module.named_modules())
        own = {path: module for path, module in modules.items() if _own_weights(module) and not _looks_up(module)}
        if points is None:
            self._wanted = {f"{path}{end}" for path in own for end in (INPUT, OUTPUT)} | set(self._weights.points)
            self.points = [p + INPUT for p, m in own.items() if isinstance(getattr(m, "weight", None), torch.Tensor)]
        else:
            possible = {f"{path}{end}" for path in modules for end in (INPUT, OUTPUT)} | set(self._weights.points)
            self._wanted, self.points = _chosen(points, possible, self.name), sorted(points)
        paths = {p.rpartition(":")[0] for p in self._wanted}
        # Modules of TorchScript take no hooks; what their weights are multiplied with is seen all the same.
        script = torch.jit.ScriptModule
        self._hooked = {p: m for p, m in modules.items() if p in paths and not isinstance(m, script)}
        self._seen: set[str] = set()

    def __enter__(self) -> ModuleRunner:
        try:
            self._move()
            training = [(m, m.training) for m in self.module.modules()]
            self._stack.callback(_restore_modes, training)
            self.module.eval()
            for path, module in self._hooked.items():
                self._stack.callback(module.register_forward_pre_hook(self._before(path)).remove)
                self._stack.callback(module.register_forward_hook(self._after(path), with_kwargs=True).remove)
            # The fused kernel of attention layers takes weights whole, out of sight.
            self._stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
        except BaseException:
            self._stack.close()
            raise
        return self

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _Products(self._weights, self._product):
            return self.module(*args, **kwargs)

    def _product(self, point: str, values: torch.Tensor, axis: int) -> None:
        self._seen.add(point)
        self._tell(point, values, axis)

    def _before(self, path: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            self._seen.discard(path + INPUT)

        return hook

    def _after(self, path: str) -> Any:
        axis = 1 if type(self._hooked[path]).__name__ in _CONVOLUTIONS else -1

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if path + INPUT not in self._seen:
                self._tell(path + INPUT, (*args, *kwargs.values()), axis)
            self._tell(path + OUTPUT, output, axis)

        return hook


class ProgramRunner(_Runner):
    """Runs an exported program node by node, so that the last value of every module is seen."""

    def __init__(self, graph: ProgramGraph, points: Collection[str] | None, device: str) -> None:
        module: Any = graph.program.module()
        super().__init__(module, graph.inputs, graph.name, device)
        self._weights = _Weights(module)
        ends = _module_ends(module)
        weights = {w.removesuffix(INPUT) for w in self._weights.points}
        possible = {f"{path}{OUTPUT}" for path in ends} | set(self._weights.points)
        if points is None:
            self._wanted = {p for p in possible if p.removesuffix(OUTPUT) in weights} | set(self._weights.points)
            embeddings = _looked_up(module)
            self._wanted -= {p[: -len(INPUT)] + OUTPUT for p in embeddings}
            self.points = [p for p in self._weights.points if p not in embeddings and p[: -len(INPUT)] in ends]
        else:
            self._wanted, self.points = _chosen(points, possible, self.name), sorted(points)
        self._ends = {node: path for path, node in ends.items()}

    def __enter__(self) -> ProgramRunner:
        self._move()
        return self

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = [i.name for i in self.inputs]
        given = dict(zip(names, args, strict=False)) | kwargs
        for spec in self.inputs:
            _check_shape(spec, given.get(spec.name), self.name)
        leaves = torch.utils._pytree.tree_leaves([given.get(name) for name in names])
        with _Products(self._weights, self._tell):
            return _Steps(self.module, self).run(*leaves)

    def ended(self, node: torch.fx.Node, value: Any) -> None:
        """A node was computed."""
        if node in self._ends:
            self._tell(self._ends[node] + OUTPUT, value, 1 if "conv" in str(node.target) else -1)


class _Steps(torch.fx.Interpreter):
    """Computes a graph node by node, and forgets values that are no longer needed."""

    def __init__(self, module: Any, runner: ProgramRunner) -> None:
        super().__init__(module)
        self._runner = runner

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        self._runner.ended(n, value)
        return value


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a weight lies in its storage, in elements."""

    point: str
    first: int
    stop: int


class _Weights:
    """The weights of a module, found by their memory."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._places: dict[int, list[_Place]] = {}
        self._module = module
        self.points: list[str] = [point_of(name) for name, _ in self._tensors()]

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        named = [*self._module.named_parameters(remove_duplicate=False), *self._module.named_buffers()]
        return ((n, t) for n, t in named if t.ndim >= 2 and t.is_floating_point() and t.numel())

    def locate(self) -> None:
        """Note where they are: moving a module to another device moves them."""
        self._places.clear()
        for name, tensor in self._tensors():
            first = int(tensor.storage_offset())
            extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            key = tensor.untyped_storage().data_ptr()
            self._places.setdefault(key, []).append(_Place(point_of(name), first, first + int(extent)))

    def points_of(self, tensor: torch.Tensor) -> list[str]:
        """The points of the weights whose memory a tensor is a part of."""
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.is_floating_point():
            return []
        try:
            places = self._places.get(tensor.untyped_storage().data_ptr(), ())
        except (RuntimeError, NotImplementedError):  # a tensor without storage
            return []
        return [p.point for p in places if p.first <= tensor.storage_offset() < p.stop]


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator, and tells what weights are multiplied with."""

    supports_higher_order_operators = True

    def __init__(self, weights: _Weights, tell: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights, self._tell = weights, tell
        weights.locate()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name if isinstance(func, torch._ops.OpOverload) else ""
        if name in _PRODUCTS and not (kwargs or {}):
            left, right = (args[i] for i in _PRODUCTS[name])
            for point in self._weights.points_of(right):
                self._tell(point, left, 1 if name.endswith("convolution") else -1)
            if not name.endswith("convolution"):
                for point in self._weights.points_of(left):
                    self._tell(point, right, -2)
        return func(*args, **(kwargs or {}))


def convert(value: torch.Tensor, dtype: str, model: str, name: str) -> torch.Tensor:
    """A value in the dtype that an input takes. Floats become other floats, integers other integers.

    :param dtype: torch's name; "" takes what comes.
    :raises CalibrationError: where that would need a meaning: integers as floats are pixels, perhaps, or not.
    """
    have = dtype_name(value.dtype)
    if not dtype or have == dtype:
        return value
    wanted: torch.dtype = getattr(torch, dtype)
    whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if value.is_floating_point() and wanted.is_floating_point:
        return value.to(wanted)
    if whole and not (wanted.is_floating_point or wanted.is_complex or wanted == torch.bool):
        made = value.to(wanted)
        if torch.equal(made.to(value.dtype), value):
            return made
    if have == "bool" and not wanted.is_floating_point:
        return value.to(wanted)
    if whole and wanted == torch.bool and bool(((value == 0) | (value == 1)).all()):
        return value.to(wanted)
    raise CalibrationError(
        f"{model}: input {name!r} takes {dtype}, and the data has {have}",
        hint="convert it as the model's own preprocessing does, such as images to float and normalized",
    )


def describe_inputs(inputs: Iterable[Input]) -> str:
    """The inputs of a model, for messages."""
    shown = []
    for i in inputs:
        shape = "" if i.shape is None else f"[{', '.join('*' if n is None else str(n) for n in i.shape)}]"
        shown.append(f"{i.name}{' ' if i.dtype or shape else ''}{i.dtype}{shape}{'' if i.required else ' (optional)'}")
    return ", ".join(shown) or "none"


def _signature(module: torch.nn.Module) -> list[Input]:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    found = []
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL:
            continue
        name = "**" if p.kind is p.VAR_KEYWORD else p.name
        found.append(Input(name, required=p.default is p.empty and p.kind is not p.VAR_KEYWORD))
    return found


def _program_inputs(program: torch.export.ExportedProgram) -> list[Input]:
    """Inputs by the names of the function that was exported, where each of them is one tensor."""
    names = [str(name) for name in program.graph_signature.user_inputs]
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    called = program.module_call_graph[0].signature
    given = list((called.forward_arg_names if called is not None else None) or ())
    spec: Any = program.call_spec.in_spec
    keys = list(spec.children()[1].context or ()) if spec is not None and len(spec.children()) == 2 else []
    own = [*(g for g in given if g not in keys), *keys]
    found = []
    for name, spelled in zip(names, own if len(own) == len(names) else names, strict=True):
        value = values.get(name)
        if isinstance(value, torch.Tensor):
            shape = tuple(n if isinstance(n, int) else None for n in value.shape)
            found.append(Input(spelled, dtype_name(value.dtype), shape))
        else:
            found.append(Input(spelled))
    return found


def _check_shape(spec: Input, value: Any, model: str) -> None:
    if spec.shape is None:
        return
    if not isinstance(value, torch.Tensor):
        raise CalibrationError(f"{model}: needs input {spec.name!r}", hint=f"it takes {describe_inputs([spec])}")
    fits = len(value.shape) == len(spec.shape) and all(
        want is None or want == have for want, have in zip(spec.shape, value.shape, strict=True)
    )
    if not fits:
        raise CalibrationError(
            f"{model}: input {spec.name!r} of shape {list(value.shape)} does not fit {describe_inputs([spec])}",
            hint="the program was exported for these shapes; export it with dynamic_shapes, or give --batch-size",
        )


def _own_weights(module: torch.nn.Module) -> bool:
    return any(p.ndim >= 2 and p.is_floating_point() for p in module.parameters(recurse=False))


def _looks_up(module: torch.nn.Module) -> bool:
    """Whether its inputs are indices, so that nothing is multiplied with its weight."""
    return "Embedding" in type(module).__name__


def _restore_modes(training: Sequence[tuple[torch.nn.Module, bool]]) -> None:
    for module, mode in training:
        module.training = mode


def _chosen(points: Collection[str], possible: set[str], model: str) -> set[str]:
    for point in points:
        if point not in possible:
            near = difflib.get_close_matches(point, possible, n=3)
            raise CalibrationError(
                f"{model}: there is no point {point!r}",
                hint=f"near: {', '.join(near)}" if near else "points are 'MODULE:input' and 'MODULE:output'",
            )
    return set(points)


def _module_ends(module: Any) -> dict[str, torch.fx.Node]:
    """Path of every module -> the node of its last value."""
    ends = {}
    for node in module.graph.nodes:
        stack = node.meta.get("nn_module_stack") if node.op == "call_function" else None
        for path, _ in (stack or {}).values():
            ends[path] = node
    return ends


def _looked_up(module: Any) -> set[str]:
    """Points of weights that a program looks rows up in."""
    found = set()
    for node in module.graph.nodes:
        if node.op == "call_function" and "embedding" in str(node.target):
            found |= {point_of(str(a.target)) for a in node.args if isinstance(a, torch.fx.Node) and a.op == "get_attr"}
    return found


def _first_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return next((t for v in value if (t := _first_tensor(v)) is not None), None)
    return None


def _named(output: Any) -> dict[str, torch.Tensor]:
    """Outputs by name: keys of a mapping, else ``output`` or ``output.0`` and so on."""
    if isinstance(output, torch.Tensor):
        return {"output": output}
    items = (
        output.items() if isinstance(output, Mapping) else enumerate(output if isinstance(output, tuple | list) else ())
    )
    named: dict[str, torch.Tensor] = {}
    for key, value in items:
        name = key if isinstance(key, str) else f"output.{key}"
        if isinstance(value, torch.Tensor):
            named[name] = value
        elif isinstance(value, tuple | list | Mapping):
            named |= {f"{name}.{k.removeprefix('output.')}": v for k, v in _named(value).items()}
    return named


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)}{list(value.shape)}"
    return type(value).__name__
