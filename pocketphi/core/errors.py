"""The error tree: a caller can tell a user's mistake from a broken file.

Every error carries a message that names the file and the value, and an optional `hint` that names
the way out. The command line prints both and never a traceback (unless `--debug`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PocketPhiError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the `phi` command returns."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(PocketPhiError):
    """What was asked for cannot be done: a missing path, no memory, a wrong combination."""


class ConfigError(UserError):
    """A recipe, an override or a configuration value is wrong."""

    exit_code = 2


class DataError(PocketPhiError):
    """An input or an artifact is missing, truncated, corrupt or empty."""


class CheckpointError(DataError):
    """A model folder does not hold the model that its configuration describes."""


class EngineError(PocketPhiError):
    """The runtime refuses or fails: unknown tensor type, context too long, NaN logits."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest known name, or the list of known names."""
    names = [str(k) for k in known]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f" (did you mean '{near[0]}'?)"
    return f" (known: {', '.join(sorted(names))})" if names else ""
