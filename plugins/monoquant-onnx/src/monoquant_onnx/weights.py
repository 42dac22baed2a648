"""Weights in a graph that is being rewritten: DequantizeLinear, lookups of quantized rows, and integer products."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from monoquant_core.encoding import ElementType, Encoding
from monoquant_onnx.editing import Editor
from monoquant_onnx.layouts import Layout
from monoquant_onnx.roles import Role

FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True, slots=True)
class Weight:
    """A quantized weight, as its arrays lie in the file."""

    name: str
    role: Role
    encoding: Encoding
    layout: Layout
    dtype: ir.DataType  #: of what the graph computes with
    arrays: dict[str, ir.Value]  #: by label: "", "_scale", "_zero_point", ...
    row: int  #: elements of a row

    @property
    def codes(self) -> ir.Value:
        """Its initializer, which has kept its name."""
        return self.arrays[""]


def scale_of(edit: Editor, weight: Weight) -> ir.Value:
    """The scale as a float: the initializer, or what is computed of it."""
    scale, encoding = weight.arrays["_scale"], weight.encoding.scale
    if isinstance(encoding, Encoding):
        assert weight.layout.nested is not None
        point = weight.arrays.get("_scale_zero_point")
        return _dequantized(edit, scale, weight.arrays["_scale_scale"], point, weight.layout.nested)
    if isinstance(encoding, ElementType):
        turned = edit.op("Cast", [scale], [f"{scale.name}_float"], [FLOAT], to=int(FLOAT))
        edit.at_start(turned)
        return turned.outputs[0]
    return scale


def dequantize(edit: Editor, weight: Weight, uses: list[tuple[ir.Node, int]]) -> None:
    """Put DequantizeLinear between a weight and the nodes that take it."""
    codes, scale, point, layout = weight.codes, scale_of(edit, weight), weight.arrays.get("_zero_point"), weight.layout
    if (
        layout.axis == 0 and not layout.block_size and len(scale.shape or ()) == 2
    ):  # a table: its scales are looked up as rows, too
        layout = Layout(1, layout.block_size or weight.row, layout.grid, layout.nested, layout.opset)
    elif weight.role.transposed and layout.block_size:
        # onnxruntime turns the constants when it loads, and then joins DequantizeLinear and product into MatMulNBits;
        # a product with the transposed weight it leaves apart.
        codes, scale = _turned(edit, codes), _turned(edit, scale)
        point = _turned(edit, point) if point is not None else None
        layout = Layout(1 - (layout.axis or 0), layout.block_size, layout.grid[::-1], layout.nested, layout.opset)
        for node, _ in uses:
            node.attributes["transB"] = ir.AttrInt64("transB", 0)
    value = _dequantized(edit, codes, scale, point, layout, name=weight.name)
    value = _cast(edit, value, weight.dtype)
    for node, index in uses:
        node.replace_input_with(index, value)


def look_up(edit: Editor, weight: Weight, nodes: list[ir.Node]) -> None:
    """Dequantize the rows that a Gather finds instead of the whole table.

    Scales of rows are looked up with the same indices: blocks along the last axis of whatever shape the indices have.
    """
    for node in nodes:
        found = node.outputs[0]
        rows, indices = found.shape, node.inputs[1]
        params = [weight.arrays["_scale"], weight.arrays.get("_zero_point")]
        attributes: dict[str, int] = {}
        made: list[ir.Node] = []
        if weight.layout.axis is not None:
            for number, param in enumerate(params):
                if param is not None:
                    gather = edit.op(
                        "Gather", [param, indices], [f"{found.name}_{number}"], [param.dtype or FLOAT], axis=0
                    )
                    made.append(gather)
                    params[number] = gather.outputs[0]
            attributes = {"axis": -1, "block_size": weight.layout.block_size or weight.row}
        inputs = [found, params[0], *([params[1]] if params[1] is not None else [])]
        last = edit.op("DequantizeLinear", inputs, [f"{found.name}_float"], [FLOAT], shape=rows, **attributes)
        made.append(last)
        if weight.dtype != FLOAT:
            made.append(edit.op("Cast", last.outputs, [f"{found.name}_cast"], [weight.dtype], to=int(weight.dtype)))
        edit.after(found, *made)
        edit.redirect(found, made[-1].outputs[0], keep=made)
        found.type = ir.TensorType(weight.codes.dtype or ir.DataType.INT8)


def cast(edit: Editor, value: ir.Value, dtype: ir.DataType, uses: list[tuple[ir.Node, int]]) -> None:
    """Put a Cast to what the graph computes with between an initializer and the nodes that take it."""
    result = _cast(edit, value, dtype)
    for node, index in uses:
        node.replace_input_with(index, result)


def multiply(
    edit: Editor, weight: Weight, quantized: dict[str, list[ir.Value]], uses: list[tuple[ir.Node, int]]
) -> None:
    """Products of integers, with inputs that are quantized at run time: once for all products that share them.

    :param quantized: what was quantized so far, by the name of the float value.
    """
    codes = _turned(edit, weight.codes) if weight.role.transposed else weight.codes
    scale = weight.arrays["_scale"]
    for node, _ in uses:
        x, result = node.inputs[0], node.outputs[0]
        assert x is not None
        assert x.name is not None
        if x.name not in quantized:
            names = [f"{x.name}_quantized", f"{x.name}_scale", f"{x.name}_zero_point"]
            types = [ir.DataType.UINT8, FLOAT, ir.DataType.UINT8]
            made = edit.op("DynamicQuantizeLinear", [x], names, types)
            edit.after(x, made)
            quantized[x.name] = list(made.outputs)
        inputs, input_scale, point = quantized[x.name]
        name = result.name
        product = edit.op(
            "MatMulInteger", [inputs, codes, point], [f"{name}_int32"], [ir.DataType.INT32], shape=result.shape
        )
        floats = edit.op("Cast", product.outputs, [f"{name}_float"], [FLOAT], shape=result.shape, to=int(FLOAT))
        scales = edit.op("Mul", [input_scale, scale], [f"{name}_scale"], [FLOAT])
        scaled = edit.op("Mul", [floats.outputs[0], scales.outputs[0]], [f"{name}_scaled"], [FLOAT], shape=result.shape)
        chain = [product, floats, scales, scaled]
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = [scaled.outputs[0], node.inputs[2]]
            chain.append(edit.op("Add", bias, [f"{name}_sum"], [FLOAT], shape=result.shape))
        edit.graph.insert_before(node, chain)
        edit.redirect(result, chain[-1].outputs[0])
        edit.graph.remove(node, safe=True)


def _dequantized(
    edit: Editor, codes: ir.Value, scale: ir.Value, point: ir.Value | None, layout: Layout, name: str | None = None
) -> ir.Value:
    attributes: dict[str, int] = {}
    if layout.axis is not None:
        attributes["axis"] = layout.axis
    if layout.block_size:
        attributes["block_size"] = layout.block_size
    inputs = [codes, scale] if point is None else [codes, scale, point]
    made = edit.op(
        "DequantizeLinear", inputs, [f"{name or codes.name}_dequantized"], [FLOAT], shape=codes.shape, **attributes
    )
    edit.at_start(made)
    return made.outputs[0]


def _turned(edit: Editor, value: ir.Value) -> ir.Value:
    """A transposed matrix."""
    shape = ir.Shape(list(value.shape)[::-1]) if value.shape is not None else None
    made = edit.op("Transpose", [value], [f"{value.name}_transposed"], [value.dtype or FLOAT], shape=shape, perm=[1, 0])
    edit.at_start(made)
    return made.outputs[0]


def _cast(edit: Editor, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    if dtype == value.dtype:
        return value
    made = edit.op("Cast", [value], [f"{value.name}_cast"], [dtype], shape=value.shape, to=int(dtype))
    edit.at_start(made)
    return made.outputs[0]
