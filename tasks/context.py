"""How well a causal model of DNA predicts, by the length of its context.

A split is cut into windows of one length, end to end, and each window is scored whole, from its first base
on, with nothing known before it: base t of a window is predicted from t + 1 bases. So every length is scored
on the same bases (all but the first of each stretch), each predicted once, and a longer window differs in
nothing but that its bases have more before them. Bases that are not known (N) are read, but not scored. The
mean is by base, so that every base counts the same whatever record it is of.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ssm_modal.heads import long_token_nats
from ssm_modal.heads.chunked_loss import IGNORE
from ssm_modal.io.atomic import atomic_write


class WindowBatches(Protocol):
    """Batches of windows end to end; `DNABatches` is one."""

    @property
    def n_batches(self) -> int: ...

    def make_evaluation(self, index: int, rank: int, world: int) -> Mapping[str, Tensor]:
        """`ids`, `labels` (rows, length) int64, -100 where nothing is scored, and `records` (rows,) int64."""
        ...


class WindowSource(Protocol):
    """Where windows come from; `DNADataModule` is one."""

    @property
    def bases_per_token(self) -> int: ...

    def window_batches(self, split: str, length: int, batch_size: int) -> WindowBatches:
        """Windows of `length` tokens over `split`, end to end."""
        ...

    def record_names(self) -> Sequence[tuple[str, str]]:
        """File and name of every record, by its number."""
        ...


@dataclass
class ContextResult:
    """What windows of one length come to, each sum as (nats, bases).

    length: tokens a window. windows: how many. records: by the record's number. octaves: entry i is of bases
    predicted from 2^i to 2^(i + 1) - 1 tokens.
    """

    length: int
    windows: int = 0
    records: dict[int, tuple[float, int]] = field(default_factory=dict)
    octaves: list[tuple[float, int]] = field(default_factory=list)

    @property
    def total(self) -> tuple[float, int]:
        return _sum(self.records.values())

    @property
    def nats_per_base(self) -> float:
        """The mean over all scored bases; NaN where there is none."""
        nats, bases = self.total
        return nats / bases if bases else math.nan


@torch.no_grad()
def evaluate_context(
    model: Any,
    source: WindowSource,
    length: int,
    *,
    split: str = "test",
    tokens: int = 1 << 17,
    segment: int | None = None,
    device: torch.device | str = "cpu",
) -> ContextResult:
    """Score `split` by windows of `length` tokens.

    model: a causal one, such as `CausalLM`, in eval mode on `device`. tokens: about so many at once, in as
    many windows as that holds, one at least. segment: tokens of a window that go through the model at once,
    the state carried on; None: all.
    """
    batches = source.window_batches(split, length, max(1, tokens // length))
    result = ContextResult(length)
    octaves = int(math.log2(length)) + 1
    # What a base is predicted from: 1 token at the first place.
    octave = torch.log2(torch.arange(1, length + 1, dtype=torch.float64)).floor().to(torch.int64).to(device)
    by_octave = torch.zeros(2, octaves, dtype=torch.float64, device=device)
    for index in range(batches.n_batches):
        batch = batches.make_evaluation(index, 0, 1)
        ids, labels = batch["ids"].to(device), batch["labels"].to(device)
        nats = long_token_nats(model, ids, labels, segment=segment or length).double()
        scored = (labels != IGNORE).double()
        sums = torch.stack([nats, scored])  # (2, rows, length)
        by_octave.index_add_(1, octave, sums.sum(1))
        for record, nat, count in zip(batch["records"].tolist(), *sums.sum(2).tolist()):
            before, bases = result.records.get(record, (0.0, 0))
            result.records[record] = (before + nat, bases + int(count) * source.bases_per_token)
        result.windows += len(ids)
    result.octaves = [(nat, int(count) * source.bases_per_token) for nat, count in by_octave.T.tolist()]
    return result


def write_context(folder: Path, results: Sequence[ContextResult], names: Sequence[tuple[str, str]]) -> None:
    """Write three tables, each whole or not at all.

    context.csv           length, nats_per_base, bases, windows
    context_records.csv   length, file, record, nats_per_base, bases
    context_places.csv    length, from, to (tokens known before the base), nats_per_base, bases
    """
    rows = [[r.length, _number(r.total), r.total[1], r.windows] for r in results]
    _write(folder / "context.csv", ["length", "nats_per_base", "bases", "windows"], rows)
    rows = [
        [r.length, *names[record], _number(found), found[1]]
        for r in results
        for record, found in sorted(r.records.items())
    ]
    _write(folder / "context_records.csv", ["length", "file", "record", "nats_per_base", "bases"], rows)
    rows = [
        [r.length, 2**i, min(2 ** (i + 1) - 1, r.length), _number(found), found[1]]
        for r in results
        for i, found in enumerate(r.octaves)
    ]
    _write(folder / "context_places.csv", ["length", "from", "to", "nats_per_base", "bases"], rows)


def _sum(pairs: Any) -> tuple[float, int]:
    found = list(pairs)
    return math.fsum(nats for nats, _ in found), sum(bases for _, bases in found)


def _number(pair: tuple[float, int]) -> str:
    return f"{pair[0] / pair[1]:.6f}" if pair[1] else ""


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    atomic_write(path, table.getvalue())
