"""Failures that a user can act on. Everything else is a bug and keeps its traceback."""

from __future__ import annotations


class MonoquantError(Exception):
    """An expected failure: one line that names the file and the tensor, and a hint that says what to do.

    The command prints it as ``error:`` and ``hint:`` and exits with status 2.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class EncodingError(MonoquantError):
    """An encoding or a quantized tensor that cannot exist."""


class OptionError(MonoquantError):
    """An option that a plugin does not take, or a value that it does not allow."""


class PluginError(MonoquantError):
    """A plugin that was found and cannot be used."""

    def __init__(self, plugin: str, reason: str) -> None:
        super().__init__(f"plugin {plugin!r}: {reason}", hint="see 'monoquant plugins list'")
        self.plugin = plugin
        self.reason = reason

    def __reduce__(self) -> tuple[type[PluginError], tuple[str, str]]:
        return type(self), (self.plugin, self.reason)  # how other processes make it, which give it to this one


class UnknownNameError(MonoquantError):
    """A scheme, format, recipe or another declared name that no installed plugin provides."""


class SourceError(MonoquantError):
    """An input that cannot be read, or that is refused because it is malformed or unsafe."""


class RecipeError(MonoquantError):
    """A recipe that does not parse, or a rule that matches nothing."""


class PlanError(MonoquantError):
    """A plan that cannot be carried out, known before any tensor was read."""


class UnsupportedEncodingError(PlanError):
    """A format that cannot hold what a scheme or a finished file brings."""


class QuantizationError(MonoquantError):
    """A tensor whose values cannot be quantized, such as one with NaN or infinity."""


class CheckError(MonoquantError):
    """A written tensor that does not decode to what it should."""


class OutputError(MonoquantError):
    """A destination that cannot be written: occupied, read-only, full, or in use by another run."""


class CalibrationError(MonoquantError):
    """Statistics that are missing, empty or not finite."""


class DeviceError(MonoquantError):
    """A device that this machine does not have."""


class ExecutionError(MonoquantError):
    """A runtime that is not installed, does not load a file, or cannot run the inputs."""
