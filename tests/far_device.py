"""A device for tests that is not the CPU, in Python: ``pytest -p far_device`` makes it torch's accelerator.

Its memory is out of the CPU's reach, and it refuses to mix the two, as every accelerator does. It computes what IEEE
arithmetic defines as the CPU does, and what it leaves open in another way: a division by a number is a multiplication,
a product and a sum in one operation are one rounding, sums have another order, and functions another last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "far"


class FarTensor(torch.Tensor):
    """A tensor there; ``near`` is what it is made of."""

    near: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> FarTensor:
        """Of the same shape and strides."""
        made: FarTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=torch.device(NAME, 0),
        )
        made.near = near
        return made

    def data_ptr(self) -> int:
        """Of the memory that views share."""
        return self.near.data_ptr()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation there."""
        return _run(func, args, dict(kwargs or {}))


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    leaves: list[Any] = []
    tree_map(leaves.append, (list(args), kwargs))
    if name not in ("aten::copy_", "aten::_copy_from"):
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FarTensor) and leaf.ndim:
                raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got far:0 and cpu")
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    if any(device.index for device in devices):
        raise RuntimeError("invalid device ordinal")
    there = devices[0].type == NAME if devices else any(isinstance(leaf, FarTensor) for leaf in leaves)
    near_args, near_kwargs = tree_map(_near, (list(args), kwargs))
    if name in ("aten::div", "aten::div_") and not isinstance(args[1], FarTensor):
        made = _divide(func, *near_args, **near_kwargs)
    else:
        made = _OTHERWISE.get(name, _same)(func, *near_args, **near_kwargs)
    if isinstance(made, torch.Tensor) and made.dtype == torch.float32 and name not in _MOVES:
        # As accelerators give it: with all bits set.
        made.view(torch.int32).masked_fill_(made.isnan(), 0x7FFFFFFF)
    if name == "aten::copy_" and not isinstance(args[0], FarTensor):
        return args[0]
    written = [
        given
        for given, argument in zip([*args, *kwargs.values()], _arguments(func, args, kwargs), strict=True)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if written:
        return written[0] if len(func._schema.returns) == 1 else tuple(written)
    with torch.inference_mode(False):
        return tree_map(lambda x: FarTensor(x) if isinstance(x, torch.Tensor) and there else x, made)


def _arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    known = {a.name: a for a in func._schema.arguments}
    return [*func._schema.arguments[: len(args)], *(known[name] for name in kwargs)]


def _near(value: Any) -> Any:
    if isinstance(value, FarTensor):
        return value.near
    return torch.device("cpu") if isinstance(value, torch.device) else value


# What IEEE 754 leaves open ----------------------------------------------------------------------------------------


def _same(func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _divide(func: Any, a: torch.Tensor, b: Any, **kwargs: Any) -> Any:
    """By a number, or one that lies on the CPU: times its reciprocal."""
    if not a.is_floating_point() or "rounding_mode" in kwargs:
        return func(a, b, **kwargs)
    inverse = torch.tensor(float(b), dtype=a.dtype).reciprocal()
    return (torch.ops.aten.mul_ if func._schema.name.endswith("_") else torch.ops.aten.mul)(a, inverse, **kwargs)


def _backwards(func: Any, x: torch.Tensor, dims: Any = None, *rest: Any, **kwargs: Any) -> Any:
    """Sums of floats from the last element to the first, one half and then the other."""
    if x.is_floating_point() and x.ndim and x.numel():
        axes = [dims] if isinstance(dims, int) else list(dims or range(x.ndim))
        x = x.flip(axes)
    return func(x, *([] if dims is None else [dims]), *rest, **kwargs)


def _fused(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A product and a sum with one rounding."""
    wide = [a.double() if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a for a in args]
    out = kwargs.pop("out", None)
    if func._schema.name.endswith("_"):
        return args[0].copy_(func(*wide, **kwargs))
    made = getattr(torch.ops.aten, func._schema.name.removeprefix("aten::"))(*wide, **kwargs)
    narrow = made.to(args[0].dtype) if args[0].dtype == torch.float32 else made
    return narrow if out is None else out.copy_(narrow)


def _next(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Another last bit."""
    made = func(*args, **kwargs)
    return made.copy_(torch.nextafter(made, torch.full_like(made, torch.inf))) if made.is_floating_point() else made


#: what takes bits as they are, and gives views
_MOVES = frozenset(
    f"aten::{name}"
    for name in (
        *("copy_", "_to_copy", "to", "view", "expand", "slice", "select", "t", "transpose", "as_strided", "permute"),
        *("unsqueeze", "squeeze", "reshape", "_unsafe_view", "detach", "alias", "unbind", "split", "chunk", "narrow"),
        *("movedim", "empty", "empty_strided"),
    )
)

_OTHERWISE: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("aten::sum", "aten::mean"), _backwards),
    **dict.fromkeys(("aten::addcmul", "aten::addcmul_", "aten::dot"), _fused),
    **dict.fromkeys(("aten::log2", "aten::exp2", "aten::pow", "aten::exp", "aten::log"), _next),
}


class _Module:
    """What torch asks of ``torch.far``."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 1


def _tensor(data: Any, **kwargs: Any) -> torch.Tensor:
    """``torch.tensor``, which goes past Python's part of the dispatcher."""
    device = kwargs.pop("device", None)
    made = _MAKE(data, **kwargs)
    return made if device is None else made.to(device)


_MAKE, torch.tensor = torch.tensor, _tensor  # type: ignore[assignment]
_setup_privateuseone_for_python_backend(NAME, _Module())
_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
