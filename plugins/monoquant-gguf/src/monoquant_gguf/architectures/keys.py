"""What a GGUF file says of its model, for the config.json that is made of it again. Imports no torch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from monoquant_core.containers.entries import shown
from monoquant_core.errors import SourceError


class Keys:
    """The pairs of one architecture, without its name before them; what was asked for is remembered."""

    def __init__(
        self,
        path: str,
        architecture: str,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        vector: Callable[[str], Sequence[float]],
    ) -> None:
        """
        :param shapes: of the file's tensors.
        :param vector: reads a vector of float32.
        """
        self.path, self.architecture, self.metadata, self.shapes = path, architecture, metadata, shapes
        self._vector = vector
        self._asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``{architecture}.{key}``."""
        self._asked.add(f"{self.architecture}.{key}")
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number.

        :raises SourceError: naming the key, when it is missing or something else.
        """
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise SourceError(
                f"{self.path}: {self.architecture}.{key} is {'missing' if value is None else shown(value)}, "
                "and config.json needs a positive whole number"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, as short as float32 can be written.

        :raises SourceError: naming the key, when it is missing or something else.
        """
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e38:  # what float32 holds
            raise SourceError(
                f"{self.path}: {self.architecture}.{key} is {'missing' if value is None else shown(value)}, "
                "and config.json needs a positive number"
            )
        return shortest(float(value))

    def optional(self, key: str) -> float | None:
        """A positive number, or None where there is no such pair."""
        return None if self.get(key) is None else self.number(key)

    def has(self, tensor: str) -> bool:
        """Whether the file has a tensor of that name."""
        return tensor in self.shapes

    def vector(self, tensor: str) -> list[float]:
        """A tensor of positive factors.

        :raises SourceError: when it is something else.
        """
        values = [float(value) for value in self._vector(tensor)]
        if not all(0 < value < 1e38 for value in values):
            raise SourceError(f"{self.path}: {tensor} holds something else than factors of rope")
        return values

    @property
    def not_asked(self) -> list[str]:
        """Pairs of the architecture that nobody asked for."""
        return [k for k in self.metadata if k.startswith(f"{self.architecture}.") and k not in self._asked]


def shortest(value: float) -> float:
    """The number of fewest decimal digits that is the same float32."""
    stored = struct.pack("<f", value)
    return next(n for digits in range(1, 18) if struct.pack("<f", n := float(f"{value:.{digits}g}")) == stored)
