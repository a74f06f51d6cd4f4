"""Which parts of which recordings stand in which batch, as a pure function of the batch's number.

An epoch goes through every part once, in an order of its own, and cuts the sequence into batches greedily: as
many parts as the budget of samples holds, and at least one. How many batches an epoch has depends on its
order, so the plan counts the epochs before it, which is quick: it needs the lengths alone.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ssm_modal.datamodules.resumable import derived_generator


@dataclass(frozen=True, eq=False)
class Parts:
    """Parts of recordings: `recording` says which, `first` to `last` what of it; each (parts,) int64."""

    recording: Tensor
    first: Tensor
    last: Tensor

    def __len__(self) -> int:
        return self.recording.shape[0]

    def __getitem__(self, which: Any) -> Parts:
        return Parts(self.recording[which], self.first[which], self.last[which])

    @property
    def sizes(self) -> Tensor:
        return self.last - self.first


def cut(lengths: Tensor, window: int | None, generator: torch.Generator | None = None) -> Parts:
    """Recordings of `lengths` (n,) int64 as parts of at most `window`, end to end; None: whole.

    Without a generator the borders stand at multiples of `window`. With one they are moved by an offset drawn
    for each recording longer than a window, so that over the epochs they stand everywhere; a first part
    shorter than a window then covers the offset, so nothing is left out either way.
    """
    number = torch.arange(lengths.shape[0])
    if window is None:
        return Parts(number, torch.zeros_like(lengths), lengths.clone())
    offsets = torch.zeros_like(lengths)
    if generator is not None:
        drawn = torch.randint(0, window, lengths.shape, generator=generator)
        offsets = torch.where(lengths > window, drawn, offsets)
    # Part k of a recording begins at base + k * window, the first one at 0.
    base = torch.where(offsets > 0, offsets - window, offsets)
    counts = (lengths - base + window - 1) // window
    recording = torch.repeat_interleave(number, counts)
    place = torch.arange(recording.shape[0]) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    first = base[recording] + place * window
    last = torch.minimum(first + window, lengths[recording])
    return Parts(recording, first.clamp(min=0), last)


@dataclass
class BatchPlan:
    """The batches of one split.

    lengths: samples (or predictions) of each recording, (n,) int64. budget: samples a batch holds at most,
    unless one part alone has more. window: the longest part, None: whole recordings. seed: decides the order
    of every epoch and where windows begin.
    """

    lengths: Tensor
    budget: int
    window: int | None = None
    seed: int = 0
    _ends: list[int] = field(default_factory=list, repr=False)
    _latest: tuple[int, Parts, list[int]] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None}

    def training(self, number: int) -> tuple[int, Parts]:
        """Training batch `number`, counted over all epochs and processes: its epoch and its parts."""
        while not self._ends or self._ends[-1] <= number:
            epoch = len(self._ends)
            batches = len(self._epoch(epoch)[1]) - 1
            self._ends.append((self._ends[-1] if self._ends else 0) + batches)
        epoch = bisect_right(self._ends, number)
        parts, borders = self._epoch(epoch)
        place = number - (self._ends[epoch - 1] if epoch else 0)
        return epoch, parts[borders[place] : borders[place + 1]]

    def evaluation(self) -> list[Parts]:
        """The batches that go through all recordings once, in their order."""
        parts = cut(self.lengths, self.window)
        borders = _borders(parts.sizes, self.budget)
        return [parts[a:b] for a, b in pairwise(borders)]

    def _epoch(self, epoch: int) -> tuple[Parts, list[int]]:
        """The parts of `epoch` in their order, and where its batches begin, with the end."""
        if self._latest is None or self._latest[0] != epoch:
            generator = derived_generator(self.seed, "audio", "epoch", epoch)
            parts = cut(self.lengths, self.window, generator)
            parts = parts[torch.randperm(len(parts), generator=generator)]
            self._latest = (epoch, parts, _borders(parts.sizes, self.budget))
        return self._latest[1], self._latest[2]


def _borders(sizes: Tensor, budget: int) -> list[int]:
    ends = sizes.cumsum(0).tolist()
    borders = [0]
    while borders[-1] < len(ends):
        at = borders[-1]
        taken = ends[at - 1] if at else 0
        borders.append(max(at + 1, bisect_right(ends, taken + budget)))
    return borders


class PlannedBatches:
    """Batches of one split by a `plan`, each a pure function of its index: `make(index, rank, world)`.

    What derives from it holds `plan` and says in `_batch` what a batch of parts is.
    """

    plan: BatchPlan

    @property
    def n_batches(self) -> int:
        """Batches that evaluation takes."""
        return len(self._evaluation)

    def make_training(self, index: int, rank: int, world: int) -> dict[str, Tensor]:
        """Training batch `index`: of all batches in their order the processes take turns."""
        epoch, parts = self.plan.training(index * world + rank)
        return self._batch(parts, epoch)

    def make_evaluation(self, index: int, rank: int, world: int) -> dict[str, Tensor]:
        """Evaluation batch `index`: over all batches every part once, in order, nothing augmented."""
        return self._batch(self._evaluation[index], None)

    @cached_property
    def _evaluation(self) -> list[Parts]:
        return self.plan.evaluation()

    def _batch(self, parts: Parts, epoch: int | None) -> dict[str, Tensor]:
        """The batch of `parts` in training's `epoch`, or in evaluation, where it is None."""
        raise NotImplementedError(f"{type(self).__name__} must define _batch(parts, epoch)")
