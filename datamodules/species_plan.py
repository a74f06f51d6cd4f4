"""Which bases of which species are trained on, validated on and tested on.

Each class's files are cut, end to end, into `folds` contiguous folds of equal size. One is tested on, one
validated on, the others are trained on, without the blocks that share too many k-mers, on either strand, with
the test or validation fold of another class: close relatives share whole genes, which would otherwise be
learnt under one label and tested under another. What is left of a fold is joined where a block was taken out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ssm_modal.datamodules.dna_plan import Stretch
from ssm_modal.datamodules.kmer_sharing import Codes, Letters, kmer_set, shared_fraction
from ssm_modal.io.genome import Genome


@dataclass(frozen=True)
class SpeciesSplit:
    """folds: how many. test_fold: which is tested on, from 0. validation: whether the one behind it (in a
    ring) is validated on; else it is trained on. k, block, max_shared: a block of `block` bases of training
    is taken out where `max_shared` or more of its k-mers stand in a held-out fold of another class."""

    folds: int = 5
    test_fold: int = 0
    validation: bool = True
    k: int = 24
    block: int = 1000
    max_shared: float = 0.05

    def __post_init__(self) -> None:
        least = 3 if self.validation else 2
        if self.folds < least:
            raise ValueError(f"folds is {self.folds}, expected {least} or more")
        if not 0 <= self.test_fold < self.folds:
            raise ValueError(f"test_fold is {self.test_fold}, expected 0 to {self.folds - 1}")
        if not 0.0 < self.max_shared <= 1.0:
            raise ValueError(f"max_shared is {self.max_shared}, expected more than 0 and at most 1")

    @property
    def validation_fold(self) -> int | None:
        return (self.test_fold + 1) % self.folds if self.validation else None


@dataclass(frozen=True, eq=False)
class Piece:
    """Letters uint8 (n,) of class number `label` that are trained on, from one fold of one record."""

    label: int
    letters: Tensor


@dataclass(frozen=True)
class SpeciesPlan:
    """pieces: what is trained on. held: the stretches of each class that are validated on and tested on.
    removed, candidates: blocks of training that were taken out, and all there were, by class."""

    pieces: tuple[Piece, ...]
    held: Mapping[str, tuple[tuple[Stretch, ...], ...]]
    removed: tuple[int, ...]
    candidates: tuple[int, ...]


def fold_stretches(genome: Genome, records: Sequence[int], folds: int) -> list[tuple[Stretch, ...]]:
    """`records` end to end in `folds` contiguous parts of equal size, each as stretches within records."""
    total = sum(genome.records[r].length for r in records)
    borders = [total * i // folds for i in range(folds + 1)]
    found: list[tuple[Stretch, ...]] = []
    for low, high in pairwise(borders):
        at, own = 0, []
        for record in records:
            length = genome.records[record].length
            start, end = max(low - at, 0), min(high - at, length)
            if start < end:
                own.append(Stretch(record, start, end))
            at += length
        found.append(tuple(own))
    return found


def plan_species(genome: Genome, classes: Sequence[Sequence[int]], split: SpeciesSplit) -> SpeciesPlan:
    """The plan for `classes`, of each the numbers of its records in `genome`."""
    folds = [fold_stretches(genome, records, split.folds) for records in classes]
    held = {"test": tuple(own[split.test_fold] for own in folds), "validation": tuple(() for _ in folds)}
    if split.validation_fold is not None:
        held["validation"] = tuple(own[split.validation_fold] for own in folds)
    away = {split.test_fold, split.validation_fold}
    sets = [
        kmer_set((_letters(genome, s) for name in held for s in held[name][label]), split.k)
        for label in range(len(classes))
    ]
    pieces: list[Piece] = []
    removed, candidates = [0] * len(classes), [0] * len(classes)
    for label, own in enumerate(folds):
        others = [kmers for other, kmers in enumerate(sets) if other != label]
        union: Codes = np.unique(np.concatenate(others)) if others else np.empty(0, dtype=np.uint64)
        for stretch in (s for fold, part in enumerate(own) if fold not in away for s in part):
            letters = _letters(genome, stretch)
            shared = _most_shared(letters, others, union, split)
            kept = np.repeat(shared < split.max_shared, split.block)[: len(letters)]
            removed[label] += int((shared >= split.max_shared).sum())
            candidates[label] += len(shared)
            if kept.any():
                pieces.append(Piece(label, torch.from_numpy(letters[kept])))
    return SpeciesPlan(tuple(pieces), held, tuple(removed), tuple(candidates))


def _most_shared(
    letters: Letters, others: Sequence[Codes], union: Codes, split: SpeciesSplit
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The greatest fraction that each block shares with one other class."""
    together = shared_fraction(letters, union, split.k, split.block)
    if not (together >= split.max_shared).any():
        return together
    # A block may share this much with all others together and yet with none of them.
    blocks = np.flatnonzero(together >= split.max_shared)
    chosen = np.concatenate([letters[b * split.block : (b + 1) * split.block] for b in blocks])
    parts = [shared_fraction(chosen, kmers, split.k, split.block) for kmers in others]
    together[blocks] = np.max(parts, axis=0)
    return together


def _letters(genome: Genome, stretch: Stretch) -> Letters:
    letters: Letters = genome.read(stretch.record, stretch.start, stretch.end).numpy()
    return letters
