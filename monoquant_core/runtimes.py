"""What a runtime is: a program that opens a finished file and runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Runtime(Protocol):
    """Runs finished files, for verification."""

    def run(self, path: Path, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Outputs by name for inputs by name.

        :raises MonoquantError: when the runtime is not installed, or does not load the file; its own words are in it.
        """
        ...
