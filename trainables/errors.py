"""The exceptions of shiftgrad: one tree, each class beside the standard type it also is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class _MessageAlone:
    """In a notebook (and in IPython) the message stands alone, without the calls inside shiftgrad that led to it.

    ``%debug`` still goes through these calls.
    """

    def _render_traceback_(self) -> list[str]:  # the name that IPython asks for
        return [f"{type(self).__name__}: {self}"]


class ShiftgradError(_MessageAlone, Exception):
    """Base of every error that shiftgrad raises on purpose."""


class Interrupted(_MessageAlone, KeyboardInterrupt):
    """A sweep was stopped (Ctrl-C, a notebook's interrupt, a signal) and has cleaned up; says how to go on."""


@dataclass(frozen=True, order=True)
class Fault:
    """One thing that is wrong with what the user gave.

    ``key`` is the dotted path in the sweep file (``runs[1].defense.layer``) or a file name with a line,
    ``message`` says what is wrong and what is allowed, with the value that was given.
    """

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class ConfigError(ShiftgradError, ValueError):
    """What the user gave cannot be meant. Carries every fault, not only the first."""

    def __init__(self, faults: Iterable[Fault], heading: str = "nothing was started") -> None:
        self.faults = tuple(dict.fromkeys(faults))
        self.heading = heading
        count = len(self.faults)
        lines = [f"{count} fault{'s' if count != 1 else ''} found; {heading}:"]
        lines += [f"  - {fault}" for fault in self.faults]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Fault, ...], str]]:
        return (type(self), (self.faults, self.heading))


class DataError(ShiftgradError, ValueError):
    """A data row cannot be used as it was meant (mask not provable, response truncated away)."""


class TrainingError(ShiftgradError, RuntimeError):
    """A training went wrong in a way that doing it again would repeat (non-finite loss, zero gradient)."""


class VersionError(ShiftgradError, RuntimeError):
    """A trial would run on other software than the driver."""


class StoreError(ShiftgradError, OSError):
    """The store cannot be read or written as asked."""
