"""What calibrators do with observed values and with their own state."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from monoquant_core.errors import CalibrationError


def as_float32(values: torch.Tensor) -> torch.Tensor:
    """Observed values as they are counted; what float32 cannot hold becomes infinite.

    :raises CalibrationError: for complex numbers.
    """
    if values.is_complex():
        raise CalibrationError(f"{values.dtype} values have no range")
    return values.detach().to(torch.float32)


def by_channel(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Observed values as float32 ``[channels, values of one]``.

    :raises CalibrationError: where there is no such axis.
    """
    if not -values.ndim <= axis < values.ndim:
        raise CalibrationError(f"values of shape {tuple(values.shape)} have no axis {axis} of channels")
    return as_float32(values).movedim(axis, 0).flatten(1) if values.ndim > 1 else as_float32(values).unsqueeze(1)


def limits(values: torch.Tensor, axes: int | tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest values along some axes, on the CPU.

    :raises CalibrationError: for NaN and infinity.
    """
    low, high = values.amin(axes).cpu(), values.amax(axes).cpu()
    # NaN is the minimum and the maximum of everything that has it.
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise CalibrationError("NaN or infinity was observed, of which no range can be made")
    return low, high


def same_channels(old: torch.Tensor, new: torch.Tensor) -> None:
    """:raises CalibrationError: if two tensors of something per channel have other lengths."""
    if len(old) != len(new):
        raise CalibrationError(f"{len(new)} channels, where {len(old)} were observed before")


def checked_state(
    state: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, torch.Tensor]:
    """Copies of the tensors of a state.

    :param wanted: dtype and shape of each.
    :raises CalibrationError: naming what is missing, unknown, or another.
    """
    if state.keys() != wanted.keys():
        raise CalibrationError(f"a state of {', '.join(sorted(state))}, where {', '.join(sorted(wanted))} are expected")
    for name, (dtype, shape) in wanted.items():
        found = state[name]
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise CalibrationError(f"a state whose {name} is {found.dtype} {tuple(found.shape)}, not {dtype} {shape}")
    return {name: state[name].clone() for name in wanted}
