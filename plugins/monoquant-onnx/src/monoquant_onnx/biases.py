"""Biases of layers that are computed in integers: int32, in steps of the input's scale times the weight's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from monoquant_core.encoding import Encoding
from monoquant_core.rows import all_rows
from monoquant_onnx.static import Pairs, scale_and_zero_point

if TYPE_CHECKING:
    import torch

    from monoquant_onnx.data import Data
    from monoquant_onnx.graph import OnnxGraph

REASON = "int32 in steps of the input's scale times the weight's, as integer layers add it"
LIFTED = "channels that are next to nothing beside their bias get a scale at which int32 holds that"

LARGEST = (1 << 31) - 1
ROOM = 1 << 30  #: codes of biases that lifted channels aim at

Apply = Callable[["Sequence[torch.Tensor]"], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Bias:
    """The bias of a layer."""

    name: str  #: of the initializer
    shape: tuple[int, ...]
    input_scale: float  #: float32


def find(graph: OnnxGraph, weight: str, pairs: Pairs) -> Bias | None:
    """The bias that belongs to a weight alone; None where there is none, or the input is not quantized.

    :param pairs: the graph's; the range of the input is what it is quantized with, not what is known of it.
    """
    uses = graph.uses(weight)
    if len(uses) != 1:
        return None
    node = uses[0][0]
    value = node.inputs[2] if len(node.inputs) > 2 else None
    taken = node.inputs[0]
    if value is None or taken is None or value.name not in graph.data or len(list(value.uses())) != 1:
        return None
    data, found = graph.data[value.name], pairs.range_of(taken)
    if found is None or len(data.shape) != 1 or data.dtype != "float32":
        return None
    scale, _ = scale_and_zero_point(found)
    return Bias(value.name, data.shape, float(scale))


def scales(input_scale: float) -> Apply:
    """``[weight scale] -> bias scale``, float32."""

    def apply(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        return inputs[-1] * torch.tensor(input_scale, dtype=torch.float32)

    return apply


def codes(input_scale: float) -> Apply:
    """``[bias, weight scale] -> int32``, to nearest.

    The transform raises QuantizationError when int32 is too narrow.
    """

    def apply(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        from monoquant_core.errors import QuantizationError

        bias, step = inputs[0].double(), scales(input_scale)(inputs).double()
        steps = torch.round(bias / step)
        if bool((steps.abs() > LARGEST).any()):
            channel = int(steps.abs().argmax())
            raise QuantizationError(
                f"bias[{channel}] is {steps.abs().max():.3g} steps of its weight's scale, more than int32 holds",
                hint="leave the layer's weight as it is: --keep",
            )
        return steps.to(torch.int32)

    return apply


def lifted(input_scale: float, bias: Data, encoding: Encoding, axis: int) -> Apply:
    """``[weight] -> weight``, where channels whose bias int32 could not hold are all zeros but for one element.

    That element is a millionth of what shows: it sets the channel's scale.

    :param axis: of the output channels.
    """
    high = encoding.codes_range[1]

    def apply(inputs: Sequence[torch.Tensor]) -> torch.Tensor:

        (weight,) = inputs
        least = bias.read(all_rows(bias.shape)).float().abs() / (input_scale * ROOM) * high
        flat = weight.movedim(axis, 0).flatten(1)
        if encoding.block[axis] != 1 or not bool((low := flat.abs().amax(1) < least).any()):
            return weight
        changed = weight.clone()
        channels = changed.movedim(axis, 0)
        channels[low] = 0
        first = channels
        while first.ndim > 1:
            first = first.select(1, 0)
        first[low] = least[low]
        return changed

    return apply
