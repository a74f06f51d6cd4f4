"""The errors of the package, and the wording of "unknown name, did you mean".

Wrong arguments raise plain ValueError or TypeError with the argument's name; the classes here are for
failures a caller may want to catch on their own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ConfigError(ValueError):
    """A configuration holds an unknown key or a value that is not allowed."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be found, read, or does not fit the model it is loaded into."""


class StateError(ValueError):
    """A state was given to a layer that has none, or that does not fit the input."""


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The one of `valid` that an unknown `name` most likely meant, None where none is near."""
    found = difflib.get_close_matches(str(name), sorted(set(valid)), n=1, cutoff=0.5)
    return found[0] if found else None


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for an unknown `name`: the nearest of `valid`, and all of them.

    >>> nearest("d_sate", ["d_state", "d_conv"])
    "did you mean 'd_state'? Valid: d_conv, d_state"
    """
    names = sorted(set(valid))
    close = closest(name, names)
    hint = f"did you mean {close!r}? " if close is not None else ""
    return f"{hint}Valid: {', '.join(names) if names else 'none'}"


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first `most` of `names`, and how many more there are.

    >>> listed(["a", "b", "c"], 2)
    "a, b and 1 more"
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
