"""What a data module says of what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn

from ssm_modal.io.recordings import LeftOut


def warn_left_out(left_out: Sequence[LeftOut], what: str) -> None:
    """Warn, on one process, that some `what` were left out, and say why the first was."""
    if left_out:
        first = left_out[0]
        rank_zero_warn(f"{len(left_out)} {what} were left out, the first: {first.path}: {first.reason}")
