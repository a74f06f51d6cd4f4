"""Batches of windows over stretches of a genome, for causal or masked modelling."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from ssm_modal.datamodules.dna_masking import IGNORE, mask_tokens
from ssm_modal.datamodules.dna_plan import Places, Stage, Stretch
from ssm_modal.datamodules.resumable import derived_generator, derived_seed, global_rows
from ssm_modal.io.genome import Genome
from ssm_modal.tokenizers.dna import DNATokenizer

Objective = Literal["causal", "masked"]


@dataclass
class DNABatches:
    """Batches of windows over one split, each a pure function of its index: `make(index, rank, world)`.

        ids, labels (batch_size, length) int64
        records (batch_size,) int64: the number of each window's record in `genome.records`
        starts (batch_size,) int64: its first base there, 0-based, on the plus strand

    Objective "causal": `labels[:, t]` is the token after `ids[:, t]`, -100 where it holds a base that is not
    known, and behind the stretch. "masked": see `mask_tokens`. What a window has beyond the stretch is pad_id
    with label -100; training windows have none.

    stretches: where windows lie. length: tokens a window. augment: in training, read one strand or the other,
    with equal chance; the window's place is the same. rate: tokens chosen by objective "masked". stages: in
    training, how long and how many the windows of a batch are, by its index; empty: `length` and
    `batch_size`.
    """

    genome: Genome
    stretches: Sequence[Stretch]
    tokenizer: DNATokenizer
    length: int
    batch_size: int
    objective: Objective
    augment: bool = False
    rate: float = 0.15
    seed: int = 0
    stages: Sequence[Stage] = ()

    def __post_init__(self) -> None:
        # Objective "causal" predicts the token behind the window too.
        self._more = 1 if self.objective == "causal" else 0
        self.places = self._places(self.length)
        self._plans = [(one, self._places(one.length)) for one in self.stages] or [
            (Stage(0, self.length, self.batch_size), self.places)
        ]
        tokens = [self.tokenizer.tokens_in(s.bases) - self._more for s in self.stretches]
        self._windows = list(accumulate(max(0, -(-n // self.length)) for n in tokens))

    @property
    def n_windows(self) -> int:
        """Windows that evaluation takes: end to end in each stretch, its last perhaps shorter."""
        return self._windows[-1] if self._windows else 0

    @property
    def n_batches(self) -> int:
        return -(-self.n_windows // self.batch_size)

    def make_training(self, index: int, rank: int, world: int) -> dict[str, Tensor]:
        """Batch `index` of windows drawn uniformly from all places, shared out as `global_rows` says."""
        stage, places = next(plan for plan in reversed(self._plans) if plan[0].first <= index)
        made = []
        for row in global_rows(index, stage.batch_size, rank, world):
            drawn = derived_seed(self.seed, "dna", stage.length, row)
            record, start = places.place(drawn % places.count)
            minus = self.augment and derived_seed(self.seed, "dna", "strand", stage.length, row) % 2 == 1
            end = start + places.need
            made.append(self._window(record, start, end, minus, f"train {stage.length}", row))
        return self._joined(made, stage.length)

    def make_evaluation(self, index: int, rank: int, world: int) -> dict[str, Tensor]:
        """Batch `index` of windows end to end: causal, each token of a stretch but its first is predicted
        once.

        Bases at a stretch's end that make no whole token are left out. What is masked depends on the window's
        number alone, so that every validation sees the same.
        """
        first = index * self.batch_size
        made = []
        for number in range(first, min(first + self.batch_size, self.n_windows)):
            at = bisect_right(self._windows, number)
            stretch = self.stretches[at]
            token = (number - (self._windows[at - 1] if at else 0)) * self.length
            count = min(self.length + self._more, self.tokenizer.tokens_in(stretch.bases) - token)
            start = stretch.start + token * self.tokenizer.step
            made.append(
                self._window(
                    stretch.record,
                    start,
                    start + self.tokenizer.bases_for(count),
                    False,
                    "evaluation",
                    number,
                )
            )
        return self._joined(made, self.length)

    def _window(
        self, record: int, start: int, end: int, minus: bool, stage: str, number: int
    ) -> tuple[Tensor, Tensor, int, int]:
        letters = self.genome.read(record, start, end, "-" if minus else "+")
        tokens = self.tokenizer.encode_letters(letters)
        if self.objective == "causal":
            ids, after = tokens[:-1], tokens[1:]
            labels = torch.where(after < self.tokenizer.n_concrete, after, IGNORE)
        else:
            generator = derived_generator(self.seed, "dna", "mask", stage, number)
            ids, labels = mask_tokens(tokens, self.tokenizer, generator, self.rate)
        return ids, labels, record, start

    def _places(self, length: int) -> Places:
        return Places(self.stretches, self.tokenizer.bases_for(length + self._more))

    def _joined(self, made: Sequence[tuple[Tensor, Tensor, int, int]], length: int) -> dict[str, Tensor]:
        ids = torch.full((len(made), length), self.tokenizer.pad_id, dtype=torch.int64)
        labels = torch.full((len(made), length), IGNORE, dtype=torch.int64)
        for row, (given, wanted, _, _) in enumerate(made):
            ids[row, : given.shape[0]] = given
            labels[row, : wanted.shape[0]] = wanted
        return {
            "ids": ids,
            "labels": labels,
            "records": torch.tensor([record for _, _, record, _ in made], dtype=torch.int64),
            "starts": torch.tensor([start for _, _, _, start in made], dtype=torch.int64),
        }
