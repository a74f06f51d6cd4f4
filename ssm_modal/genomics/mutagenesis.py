"""In-silico mutagenesis: the effect of every substitution in a region, as `VariantScorer` gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ssm_modal.genomics.places import Place
from ssm_modal.genomics.variant_scores import VariantScorer
from ssm_modal.io.nucleotides import text_of
from ssm_modal.io.variants import Allele, Variant
from ssm_modal.tokenizers.dna import BASES

CHUNK = 64  # bases that are scored together


@dataclass(frozen=True, eq=False)
class Mutations:
    """effects (n, 4) float64: the score of A, C, G, T at each base of the region, in nats; 0 for its own
    letter, NaN in rows of bases that are not known. letters: the region's, n of them, on the plus strand."""

    contig: str
    start: int
    letters: str
    effects: Tensor

    def mean_effect(self) -> Tensor:
        """The mean of the three substitutions at each base, float64 (n,)."""
        return self.effects.sum(1) / 3

    def rows(self) -> Iterator[tuple[str, int, str, str, float]]:
        """(contig, position from 1, reference, alternative, effect) of every substitution."""
        for i, letter in enumerate(self.letters):
            if letter in BASES:
                for j, base in enumerate(BASES):
                    if base != letter:
                        yield self.contig, self.start + i + 1, letter, base, float(self.effects[i, j])


def mutate_region(
    scorer: VariantScorer,
    place: Place,
    done: Mapping[str, list[list[float] | None]],
    keep: Callable[[str, list[list[float] | None]], object],
) -> Mutations:
    """The effects of every substitution in `place`, on the plus strand.

    done: chunks that an earlier start has finished, by their first base. keep: called with each new one.
    """
    genome = scorer.genome
    letters = text_of(genome.read(place.record, place.start, place.end))
    effects = torch.full((len(letters), len(BASES)), float("nan"), dtype=torch.float64)
    for first in range(0, len(letters), CHUNK):
        part = letters[first : first + CHUNK]
        key = str(place.start + first)
        if key not in done:
            keep(key, _score(scorer, place.record, place.start + first, part))
        for i, row in enumerate(done[key]):
            if row is not None:
                effects[first + i] = torch.tensor(row, dtype=torch.float64)
    return Mutations(genome.records[place.record].name, place.start, letters, effects)


def _score(scorer: VariantScorer, record: int, start: int, letters: str) -> list[list[float] | None]:
    """For each letter the four scores, None where it is no known base."""
    variants = [
        Variant(0, record, start + i, letter, tuple(Allele(start + i + 1, base) for base in BASES))
        for i, letter in enumerate(letters)
        if letter in BASES
    ]
    scores = iter(scorer.score(variants))
    found: list[list[float] | None] = []
    for letter in letters:
        if letter not in BASES:
            found.append(None)
            continue
        row = next(scores)
        for value, reason in row:
            if value is None:
                raise ValueError(f"a substitution has no score: {reason}")
        found.append([float(value or 0.0) for value, _ in row])
    return found
