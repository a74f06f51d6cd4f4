"""The change in log-likelihood that a variant makes: log P(alternative) - log P(reference), in nats.

A window stands symmetrically about the reference allele, `window` bases with the longer of the two alleles in
its middle, cut at the record's ends. It is read on one strand or on both, whose mean is taken; then the score
of a variant is that of its reverse complement on the other strand. In all methods log P(A -> B) is
-log P(B -> A), and an allele against itself is exactly 0.

- "causal": sum over the allele and everything behind it of log P(token | all before), for a causal model. The
  first token of a window is never predicted. Any variant.
- "masked": the tokens that hold changed bases are hidden; log P of the alternative's less the reference's,
  given the rest (masked marginals: Meier et al. 2021, doi 10.1101/2021.07.09.450648). Substitutions alone.
- "pseudo": pseudo-log-likelihood (Salazar et al. 2020, arXiv 1910.14659): each base of the allele and of
  `pseudo_radius` bases on either side is hidden alone, its log P added up. Any variant.
- "auto": "causal" for a causal model; for a masked one "masked" for substitutions and "pseudo" for others.

With overlapping k-mers a hidden base is all k tokens that hold it, of which the mean is taken; they serve
substitutions of one base in "masked". k-mers without overlap serve substitutions alone: behind an insertion
all of them would change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ssm_modal.genomics.log_probs import LogProbs, Query
from ssm_modal.io.genome import Genome
from ssm_modal.io.nucleotides import GenomeError, N, letters_of, reverse_complement
from ssm_modal.io.scored_variants import Scored
from ssm_modal.io.variants import Variant
from ssm_modal.tokenizers.dna import DNATokenizer

Method = Literal["auto", "causal", "masked", "pseudo"]
Strands = Literal["both", "+", "-"]
METHODS: tuple[Method, ...] = ("auto", "causal", "masked", "pseudo")
STRANDS: tuple[Strands, ...] = ("both", "+", "-")


@dataclass
class _Plan:
    """One allele's score: the sum of `weight` x the sum of the answers to query `number`, over `terms`."""

    terms: list[tuple[int, float]] = field(default_factory=list)
    reason: str = ""


@dataclass(frozen=True)
class _Haplotypes:
    """Reference and alternative of a window on one strand: left + ref + right and left + alt + right."""

    left: Tensor
    ref: Tensor
    alt: Tensor
    right: Tensor

    def letters(self, alternative: bool) -> Tensor:
        return torch.cat([self.left, self.alt if alternative else self.ref, self.right])


@dataclass(frozen=True)
class VariantScorer:
    """Scores variants of a genome by a model; see the module for what a score is.

    window: bases a window. pseudo_radius: bases on either side of an allele that method "pseudo" takes.

    Raises ValueError for a method that the model does not have, an unknown strand, or a window below 2, and
    GenomeError for a window longer than every record.
    """

    genome: Genome
    tokenizer: DNATokenizer
    log_probs: LogProbs
    window: int = 4096
    method: Method = "auto"
    strands: Strands = "both"
    pseudo_radius: int = 16

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.strands not in STRANDS:
            raise ValueError(f"strands is {self.strands!r}, expected one of {', '.join(STRANDS)}")
        wanted = "causal" if self.log_probs.causal else "masked"
        if self.method != "auto" and (self.method == "causal") != self.log_probs.causal:
            raise ValueError(f"method is {self.method!r}, but the model is a {wanted} one")
        least = 2 * self.tokenizer.span
        if self.window < least:
            raise ValueError(f"window is {self.window}, expected {least} bases or more")
        if self.pseudo_radius < 0:
            raise ValueError(f"pseudo_radius is {self.pseudo_radius}, expected 0 or more")
        if self.window > self.genome.longest():
            raise GenomeError(
                self.genome.files[0],
                f"window is {self.window}, but the longest record has {self.genome.longest()} bases",
            )

    def score(self, variants: Sequence[Variant]) -> list[tuple[Scored, ...]]:
        """For each variant one (score in nats, "") or (None, why there is none) an alternative, in order."""
        queries: list[Query] = []
        plans = [[self._plan(v, i, queries) for i in range(len(v.alleles))] for v in variants]
        totals = [float(answer.sum()) for answer in self.log_probs(queries)]
        return [tuple(self._scored(plan, totals) for plan in own) for own in plans]

    def about(self) -> str:
        """The score in one sentence, for a file's header."""
        strands = "mean over both strands" if self.strands == "both" else f"strand {self.strands}"
        return (
            f"log P(alternative) - log P(reference) in nats; method {self.method} "
            f"({'causal' if self.log_probs.causal else 'masked'} model), window {self.window} bases, "
            f"{strands}"
        )

    @staticmethod
    def _scored(plan: _Plan, totals: Sequence[float]) -> Scored:
        if plan.reason:
            return None, plan.reason
        # Exact, so that an allele against itself is 0 in whatever order the terms stand.
        return math.fsum(weight * totals[number] for number, weight in plan.terms), ""

    def _plan(self, variant: Variant, allele: int, queries: list[Query]) -> _Plan:
        chosen = variant.alleles[allele]
        if chosen.letters is None:
            return _Plan(reason=chosen.reason)
        longest = max(chosen.end - variant.start, len(chosen.letters))
        flank = (self.window - longest) // 2
        if flank < self.tokenizer.span:
            return _Plan(reason=f"allele of {longest} bases in a window of {self.window}")
        end = self.genome.records[variant.record].length
        first, last = max(0, variant.start - flank), min(end, chosen.end + flank)
        whole = self.genome.read(variant.record, first, last)
        place, behind = variant.start - first, chosen.end - first
        ref, given = whole[place:behind].clone(), letters_of(variant.ref)
        # Where the genome has a code of IUPAC the variant says which base is meant.
        ref[: len(given)] = torch.where(given == N, ref[: len(given)], given)
        haplotypes = _Haplotypes(whole[:place], ref, letters_of(chosen.letters), whole[behind:])
        plan = _Plan()
        signs = ("+", "-") if self.strands == "both" else (self.strands,)
        for sign in signs:
            own = haplotypes if sign == "+" else _other_strand(haplotypes)
            self._add(own, 1.0 / len(signs), plan, queries)
            if plan.reason:
                return plan
        return plan

    def _add(self, haplotypes: _Haplotypes, weight: float, plan: _Plan, queries: list[Query]) -> None:
        """Add the terms of one strand to `plan`, or the reason why there are none."""
        substitution = haplotypes.ref.shape == haplotypes.alt.shape
        tokenizer = self.tokenizer
        if tokenizer.step > 1 and not substitution:
            plan.reason = f"{tokenizer.step}-mers without overlap, no substitution"
            return
        method = self.method
        if method == "auto":
            method = "causal" if self.log_probs.causal else "masked" if substitution else "pseudo"
        if method == "masked":
            self._add_masked(haplotypes, weight, plan, queries)
            return
        for sign in (1.0, -1.0):
            letters = haplotypes.letters(sign > 0)
            size = len(haplotypes.alt if sign > 0 else haplotypes.ref)
            make = self._causal if method == "causal" else self._pseudo
            for query, share in make(letters, len(haplotypes.left), size):
                plan.terms.append((len(queries), sign * weight * share))
                queries.append(query)

    def _encode(self, letters: Tensor) -> Tensor:
        """The tokens of a window; what is left behind the last whole one is cut off."""
        return self.tokenizer.encode_letters(
            letters[: self.tokenizer.bases_for(self.tokenizer.tokens_in(len(letters)))]
        )

    def _covering(self, base: int, tokens: int) -> range:
        """The tokens, of `tokens` in a window, that hold `base`."""
        span, step = self.tokenizer.span, self.tokenizer.step
        return range(max(0, -(-(base - span + 1) // step)), min(tokens, base // step + 1))

    def _causal(self, letters: Tensor, place: int, size: int) -> list[tuple[Query, float]]:
        ids = self._encode(letters)
        # What stands before the allele is the same in both, and cancels.
        first = self._covering(place, len(ids)).start
        positions = torch.arange(max(1, first), len(ids))
        positions = positions[ids[positions] < self.tokenizer.n_concrete]
        return [(Query(ids, positions, ids[positions]), 1.0)]

    def _add_masked(self, haplotypes: _Haplotypes, weight: float, plan: _Plan, queries: list[Query]) -> None:
        ref, alt = haplotypes.ref, haplotypes.alt
        if ref.shape != alt.shape:
            plan.reason = "no substitution, which masked likelihood needs"
            return
        changed = ((ref != alt).nonzero()[:, 0] + len(haplotypes.left)).tolist()
        own, other = self._encode(haplotypes.letters(False)), self._encode(haplotypes.letters(True))
        overlapping = self.tokenizer.span > self.tokenizer.step
        if overlapping and len(changed) > 1:
            plan.reason = "several bases in overlapping k-mers"
            return
        hidden = torch.tensor(
            sorted({t for base in changed for t in self._covering(base, len(own))}), dtype=torch.int64
        )
        masked = own.clone()
        masked[hidden] = self.tokenizer.mask_id
        # A token that holds an N beside the base stands for no sequence.
        known = hidden[own[hidden] < self.tokenizer.n_concrete]
        if changed and not len(known):
            plan.reason = "no token of known bases alone"
            return
        share = weight / max(1, len(known)) if overlapping else weight
        for sign, tokens in ((1.0, other), (-1.0, own)):
            plan.terms.append((len(queries), sign * share))
            queries.append(Query(masked, known, tokens[known]))

    def _pseudo(self, letters: Tensor, place: int, size: int) -> list[tuple[Query, float]]:
        ids = self._encode(letters)
        bases = range(
            max(0, place - self.pseudo_radius), min(len(letters), place + size + self.pseudo_radius)
        )
        groups = dict.fromkeys(self._covering(base, len(ids)) for base in bases)
        made = []
        for group in groups:
            hidden = torch.arange(group.start, group.stop)
            masked = ids.clone()
            masked[hidden] = self.tokenizer.mask_id
            known = hidden[ids[hidden] < self.tokenizer.n_concrete]
            if len(known):
                share = 1.0 / len(known) if self.tokenizer.span > self.tokenizer.step else 1.0
                made.append((Query(masked, known, ids[known]), share))
        return made


def _other_strand(given: _Haplotypes) -> _Haplotypes:
    left, ref, alt, right = (reverse_complement(x) for x in (given.left, given.ref, given.alt, given.right))
    return _Haplotypes(right, ref, alt, left)
