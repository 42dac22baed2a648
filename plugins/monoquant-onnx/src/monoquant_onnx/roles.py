"""What the nodes of a graph do with a weight, as far as that decides how it can be quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from monoquant_core.encoding import FULL, Encoding
from monoquant_core.rows import Shape

if TYPE_CHECKING:
    import onnx_ir as ir

    from monoquant_onnx.graph import OnnxGraph

What = Literal["gather", "matmul", "gemm", "conv", "output", "other"]


@dataclass(frozen=True, slots=True)
class Role:
    """What all uses of a weight have in common; "other" where that is nothing that matters."""

    what: What
    outputs_axis: int = 0  #: of a matmul, gemm or conv
    looked_up: bool = False  #: whether at least one use looks up its rows

    @property
    def transposed(self) -> bool:
        """Whether a Gemm multiplies with it transposed: ``[outputs, inputs]``."""
        return self.what == "gemm" and self.outputs_axis == 0


OTHER = Role("other")


def role_of(graph: OnnxGraph, initializer: str) -> Role:
    """The role of an initializer."""
    main = graph.model.graph
    if graph.model.graph.initializers[initializer].is_graph_output():
        return Role("output")
    found = {_role(node, index) if node.graph is main else OTHER for node, index in graph.uses(initializer)}
    if len(found) == 1:
        return found.pop()
    return Role("other", looked_up=any(role.what == "gather" for role in found))


def dynamic_reason(role: Role, shape: Shape, encoding: Encoding, dtype: str) -> str:
    """Why the inputs of a layer are not quantized at run time; "" where nothing speaks against it."""
    if role.what not in ("matmul", "gemm"):
        return "only the inputs of matrix products are quantized at run time; --data gives others a range"
    if dtype != "float32":
        return f"DynamicQuantizeLinear takes float32, and this is {dtype}"
    return _integer_reason(role, shape, encoding)


def static_reason(role: Role, shape: Shape, encoding: Encoding, dtype: str) -> str:
    """Why a layer is not computed on quantized inputs; "" where nothing speaks against it."""
    if role.what not in ("matmul", "gemm", "conv"):
        return "only convolutions and matrix products are computed in integers"
    if dtype != "float32":
        return f"integer products have float32 around them, and this is {dtype}"
    return _integer_reason(role, shape, encoding)


def _integer_reason(role: Role, shape: Shape, encoding: Encoding) -> str:
    if encoding.element.name != "int8" or encoding.zero_point is not None:
        return f"integer products want symmetric int8 weights, and these are {encoding.element.name}"
    wanted = tuple(1 if axis == role.outputs_axis else FULL for axis in range(len(shape)))
    if encoding.block not in (wanted, (FULL,) * len(shape)):
        return "integer products want one scale per output channel, or one for all"
    return "" if encoding.scale == "float32" else "integer products want scales that are numbers"


def _role(node: ir.Node, index: int) -> Role:
    if node.domain not in ("", "ai.onnx"):
        return OTHER
    op = node.op_type
    if op == "Gather" and index == 0 and _integer(node, "axis", 0) == 0:
        return Role("gather", looked_up=True)
    weight = node.inputs[index]
    rank = len(weight.shape) if weight is not None and weight.shape is not None else 0
    if op == "Conv" and index == 1:
        return Role("conv", 0)
    if op == "MatMul" and index == 1 and rank == 2:
        return Role("matmul", 1)
    plain = _number(node, "alpha", 1.0) == 1.0 and _number(node, "beta", 1.0) == 1.0
    if op == "Gemm" and index == 1 and plain and not _integer(node, "transA", 0):
        return Role("gemm", 0 if _integer(node, "transB", 0) else 1)
    return OTHER


def _integer(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return int(found.value) if found is not None else default


def _number(node: ir.Node, name: str, default: float) -> float:
    found = node.attributes.get(name)
    return float(found.value) if found is not None else default
