"""Embeddings of sequences of any length, written piece by piece.

Each token has the vector of a chosen layer. Vectors are kept as they are ("position"), pooled over runs of
`bin` tokens ("window") or over the whole sequence ("record"). With both strands the other strand is read too,
and the vectors of a place are averaged, so that either strand has the same embedding. A model that is
equivariant to the reverse complement has the channels of both strands side by side: their mean is taken.

A sequence goes through the model as `ssm_modal.genomics.streaming` says, so that memory does not grow with
its length. What is kept of a job that was stopped is every whole sequence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ssm_modal.genomics.embedding_store import Dtype, EmbeddingStore, output_format
from ssm_modal.genomics.places import Place
from ssm_modal.genomics.streaming import HiddenStates, StreamConfig
from ssm_modal.io.genome import Genome
from ssm_modal.io.journal import Journal
from ssm_modal.io.nucleotides import GenomeError
from ssm_modal.tokenizers.dna import DNATokenizer

By = Literal["record", "window", "position"]
Pool = Literal["mean", "max", "last"]
BY: tuple[By, ...] = ("record", "window", "position")
POOLS: tuple[Pool, ...] = ("mean", "max", "last")
MATRIX = "embeddings"


@dataclass(frozen=True)
class EmbeddingConfig:
    """by: what a vector stands for, "record" (one a sequence), "window" (one a run of `bin` tokens, the last
    shorter) or "position" (one a token). pool: over the tokens of a record or window: "mean", "max", or
    "last", the last in reading order. both_strands: average over both. dtype: of the file."""

    by: By = "record"
    bin: int = 1000
    pool: Pool = "mean"
    both_strands: bool = False
    dtype: Dtype = "float32"
    stream: StreamConfig = field(default_factory=StreamConfig)

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise ValueError(f"by is {self.by!r}, expected one of {', '.join(BY)}")
        if self.pool not in POOLS:
            raise ValueError(f"pool is {self.pool!r}, expected one of {', '.join(POOLS)}")
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}, expected float32 or float16")
        if self.bin < 1:
            raise ValueError(f"bin is {self.bin}, expected 1 or more")
        if self.both_strands and self.pool == "max" and self.by != "position":
            raise ValueError('pool is "max" with both strands, which are averaged: expected "mean" or "last"')

    def rows(self, tokens: int) -> int:
        """Vectors that a sequence of `tokens` has."""
        return {"record": 1, "window": -(-tokens // self.bin), "position": tokens}[self.by]

    def run(self, tokens: int) -> int:
        """Tokens that share a vector, the last perhaps fewer."""
        return {"record": max(1, tokens), "window": self.bin, "position": 1}[self.by]


def check_place(place: Place, genome: Genome, tokenizer: DNATokenizer, config: EmbeddingConfig) -> None:
    """Raise GenomeError for a place that holds no token, or whose strands have tokens at other bases."""
    tokens = tokenizer.tokens_in(place.bases)
    file = genome.files[genome.records[place.record].file]
    if tokens < 1:
        raise GenomeError(
            file, f"{place.name!r}: {place.bases} bases are less than a token's {tokenizer.span}"
        )
    if config.both_strands and tokenizer.bases_for(tokens) != place.bases:
        raise GenomeError(
            file,
            f"{place.name!r}: {place.bases} bases are no multiple of {tokenizer.step}, so that the strands "
            "have k-mers at different places",
        )


def embed(
    places: Sequence[Place],
    genome: Genome,
    tokenizer: DNATokenizer,
    hidden: HiddenStates,
    config: EmbeddingConfig,
    target: Path,
    job: Mapping[str, Any],
    report: Callable[[int, int], object] = lambda done, of: None,
) -> tuple[str, ...]:
    """Write the embeddings of `places` to `target` (.safetensors, .h5 or .hdf5), whole or not at all.

    "record": the matrix `embeddings` (places, width), in order. Else a matrix (rows, width) a place, under
    its name; in HDF5 "/" in a name is written %2F. Metadata: `records`, a JSON list of each place's name,
    contig, start, end (0-based, half-open), strand, tokens and rows; `settings`, how they were made.

    job: what this job is, so that one that was stopped goes on. report: called with (finished, all) places.

    Returns the names of what differed where an unfinished job beside `target` was of another kind, and was
    begun anew. Raises GenomeError as `check_place`, and ValueError for two places of one name.
    """
    output_format(target)
    names = [place.name for place in places]
    for place in places:
        check_place(place, genome, tokenizer, config)
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times != 1:
        raise ValueError(
            f"places holds the name {name!r} several times, expected each once"
            if names
            else "places is empty"
        )
    tokens = [tokenizer.tokens_in(place.bases) for place in places]
    rows = (
        {MATRIX: len(places)}
        if config.by == "record"
        else {name: config.rows(n) for name, n in zip(names, tokens)}
    )
    partial, notes = (target.with_name(f".{target.name}.{end}") for end in ("partial", "progress"))
    if not partial.is_file():
        # Nothing is there to go on with: a job that was stopped just when its output was in place.
        notes.unlink(missing_ok=True)
    if config.both_strands and hidden.equivariant:
        hidden = HiddenStates(hidden.model, hidden.layer, mean_of_strands=True)
        strands = 1
    else:
        strands = 2 if config.both_strands else 1
    with Journal(notes, job) as journal:
        if not journal.done:
            partial.unlink(missing_ok=True)
        store = EmbeddingStore(partial, rows, hidden.width(), _metadata(places, genome, tokens, config, job))
        for number, (place, n) in enumerate(zip(places, tokens)):
            report(number, len(places))
            if str(number) in journal.done:
                continue
            matrix, row = (MATRIX, number) if config.by == "record" else (place.name, 0)
            into = _Rows(store, matrix, row, n, config, strands)
            _fill(into, place, genome, tokenizer, hidden, config.stream)
            store.flush()
            journal.add([(str(number), True)])
        report(len(places), len(places))
        store.finish(target, config.dtype)
        journal.remove()
        return journal.differs


class _Rows:
    """The rows of one place in the store, to which vectors of tokens are added run by run."""

    def __init__(
        self, store: EmbeddingStore, matrix: str, row: int, tokens: int, config: EmbeddingConfig, strands: int
    ) -> None:
        self.store, self.matrix, self.row, self.tokens = store, matrix, row, tokens
        self.pool = "mean" if config.by == "position" else config.pool
        self.run = config.run(tokens)
        self.strands = strands
        self._filled = 0  # rows that hold something of this place

    def add(self, first: int, vectors: Tensor, other: bool) -> None:
        """Add `vectors` (n, width) of tokens `first` on, in reading order; other: of the other strand."""
        number = torch.arange(first, first + len(vectors))
        if other:
            number, vectors = (self.tokens - 1 - number).flip(0), vectors.flip(0)
        runs = number // self.run
        if self.pool == "last":
            last = ((number + 1) % self.run == 0) | (number == self.tokens - 1)
            ends = number % self.run == 0 if other else last
            runs, vectors = runs[ends], vectors[ends.to(vectors.device)]
            if not len(runs):
                return
        begin, end = int(runs[0]), int(runs[-1]) + 1
        into = (runs - begin)[:, None].expand(-1, vectors.shape[1]).to(vectors.device)
        wide = vectors.float()
        if self.pool == "max":
            new = torch.full((end - begin, wide.shape[1]), float("-inf"), device=wide.device)
            new = new.scatter_reduce(0, into, wide, "amax").cpu()
        else:
            new = torch.zeros(end - begin, wide.shape[1], device=wide.device).scatter_add(0, into, wide).cpu()
            if self.pool == "mean":
                sizes = (self.tokens - torch.arange(begin, end) * self.run).clamp(max=self.run)
                new = new / sizes[:, None]
            new = new / self.strands
        self._put(begin, end, new, other)

    def _put(self, begin: int, end: int, new: Tensor, other: bool) -> None:
        # In the first pass rows from `_filled` on may hold what a stopped job left; then all are filled.
        known = end if other else min(max(self._filled, begin), end)
        if known > begin:
            old = self.store.read(self.matrix, self.row + begin, self.row + known)
            part = new[: known - begin]
            merged = torch.maximum(old, part) if self.pool == "max" else old + part
            new = torch.cat([merged, new[known - begin :]])
        self.store.write(self.matrix, self.row + begin, new)
        self._filled = max(self._filled, end)


def _fill(
    rows: _Rows,
    place: Place,
    genome: Genome,
    tokenizer: DNATokenizer,
    hidden: HiddenStates,
    config: StreamConfig,
) -> None:
    for other in (False, True)[: rows.strands]:

        def read(first: int, last: int, other: bool = other) -> Tensor:
            return place.ids(genome, tokenizer, first, last, other=other)

        for first, vectors in hidden.stream(read, rows.tokens, config):
            rows.add(first, vectors, other)


def _metadata(
    places: Sequence[Place],
    genome: Genome,
    tokens: Sequence[int],
    config: EmbeddingConfig,
    job: Mapping[str, Any],
) -> dict[str, str]:
    records = [
        {
            "name": place.name,
            "contig": genome.records[place.record].name,
            "start": place.start,
            "end": place.end,
            "strand": place.strand,
            "tokens": n,
            "rows": config.rows(n),
        }
        for place, n in zip(places, tokens)
    ]
    return {"records": json.dumps(records), "settings": json.dumps(dict(job))}
