"""How a sequence is cut in segments, packed sequences and all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssm_modal.kernels.sequences import Sequences


@dataclass(frozen=True)
class Segment:
    """Steps [start, end) of the whole.

    inputs: the same steps of each input, (batch, end - start, ...). seqs: where packed sequences have a
    border in here, their parts that lie in it; None where one sequence (or every row of the batch) fills it.
    """

    start: int
    end: int
    inputs: tuple[Tensor, ...]
    seqs: Sequences | None


@dataclass(frozen=True)
class Cut:
    """Where a segment lies, its lengths of packed sequences, and whether a state leaves it."""

    start: int
    end: int
    parts: tuple[int, ...]
    leaves: bool


def cuts_of(length: int, segment: int, seqs: Sequences | None) -> list[Cut]:
    """The segments of `length` steps; at least one, which is empty where there is no step."""
    lengths = [length] if seqs is None else [n for n in seqs.lengths if n]
    cuts, sequence, used = [], 0, 0
    for start in range(0, length, segment):
        end = min(start + segment, length)
        room, parts = end - start, []
        while room:
            take = min(room, lengths[sequence] - used)
            parts.append(take)
            room, used = room - take, used + take
            if used == lengths[sequence]:
                sequence, used = sequence + 1, 0
        cuts.append(Cut(start, end, tuple(parts), used > 0))
    return cuts or [Cut(0, 0, (0,), False)]


def check_cut(inputs: tuple[Tensor, ...], segment: object, seqs: object) -> None:
    """Raise TypeError or ValueError where `inputs` cannot be cut in segments of `segment` steps."""
    if not inputs:
        raise ValueError("inputs is empty, expected at least one tensor (batch, length, ...)")
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs[{i}] must be a tensor, got {type(x).__name__}")
        if x.ndim < 2 or x.shape[:2] != inputs[0].shape[:2]:
            raise ValueError(
                f"inputs[{i}] has shape {tuple(x.shape)}, expected (batch, length, ...) = "
                f"{(*inputs[0].shape[:2], '...')}"
            )
    if not isinstance(segment, int) or isinstance(segment, bool):
        raise TypeError(f"segment must be a whole number, got {type(segment).__name__}")
    if segment < 1:
        raise ValueError(f"segment is {segment}, expected 1 or more steps")
    if seqs is None:
        return
    if not isinstance(seqs, Sequences):
        raise TypeError(f"seqs must be Sequences or None, got {type(seqs).__name__}")
    if inputs[0].shape[0] != 1:
        raise ValueError(f"inputs have batch {inputs[0].shape[0]}, expected 1 with seqs")
    if seqs.total != inputs[0].shape[1]:
        raise ValueError(f"seqs covers {seqs.total} steps, expected {inputs[0].shape[1]}, the inputs' length")
