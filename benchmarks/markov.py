"""Markov models of genomes: what a language model and a species classifier of DNA are to be measured by.

    python -m benchmarks.markov language --path data/genomics/bacteria15 --leave-out 'GCF_002949675*' ...
    python -m benchmarks.markov species --path data/genomics/bacteria15 --species name=file ...

`language`: nats a base on the last part of each file's longest record, behind a gap, exactly the split of
`DNADataModule`; bases that are not known are left out, and each base has the same weight. Every genome has a
model of its own, counted on both strands of what else there is of it. Order k (default 7): (count + 1) /
(total + 4). The mixture: orders 2 to 20 at once, each weighed by how well it did on the bases before, which
are forgotten exponentially, as in GeCo2 (Pratas et al. 2016, doi 10.1109/DCC.2016.60); counts stay those of
training.

`species`: of each class a model of order k (default 4) over both strands of what is trained on; the class
under which a window is likeliest, for every window of the test fold, folds rotated, the split of
`SpeciesDataModule` without a validation fold.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ssm_modal.datamodules.dna_plan import Stretch, split_genome
from ssm_modal.datamodules.kmer_sharing import kmer_codes
from ssm_modal.datamodules.species import DEFAULT_LENGTHS, SpeciesDataModule
from ssm_modal.io.cache import cache_folder
from ssm_modal.io.genome import GENOME_SUFFIXES, Genome, open_genome
from ssm_modal.io.text import expand_path, text_files
from ssm_modal.tasks.bootstrap import block_bootstrap

_DIGITS = np.full(256, 4, dtype=np.int64)
for _digit, _letter in enumerate(b"ACGT"):
    _DIGITS[_letter] = _digit
Digits = NDArray[np.int64]
Floats = NDArray[np.float64]

# What is added to each count: little where contexts are long and seen seldom, as in GeCo2's models.
_LONG, _ADDED_SHORT, _ADDED_LONG = 12, 1.0, 1 / 16
_PIECE = 1 << 19  # bases that are looked up at once


def both_strands(digits: Digits) -> list[Digits]:
    """digits (n,) 0 to 3, 4 where not known; and those of the other strand."""
    return [digits, np.where(digits == 4, 4, 3 - digits)[::-1]]


def words(digits: Digits, length: int) -> Digits:
    """The word of `length` letters that ends at each base, as a number in base 4 (n,); -1 where it is not
    whole or not known."""
    codes = np.full(len(digits), -1, dtype=np.int64)
    if len(digits) >= length:
        found = kmer_codes((digits & 3).astype(np.uint8), length).astype(np.int64)
        unknown = np.concatenate([[0], np.cumsum(digits == 4)])
        codes[length - 1 :] = np.where(unknown[length:] == unknown[:-length], found, -1)
    return codes


def counts(sequences: Sequence[Digits], order: int) -> NDArray[np.int64]:
    """How often each letter follows each context, (4^order, 4), on both strands of `sequences`."""
    total = np.zeros(4 ** (order + 1), dtype=np.int64)
    for sequence in sequences:
        for strand in both_strands(sequence):
            found = words(strand, order + 1)
            total += np.bincount(found[found >= 0], minlength=len(total))
    return total.reshape(-1, 4)


def log_table(table: NDArray[np.int64], added: float = 1.0) -> Floats:
    """log P(letter | context), (contexts, 4)."""
    wide = table + added
    return np.log(wide) - np.log(wide.sum(1, keepdims=True))


def order_k(train: Sequence[Digits], test: Digits, order: int) -> Floats:
    """log P of each base of `test` (n,) under one order; NaN where it or a letter before it is not known."""
    table = log_table(counts(train, order)).ravel()
    found = words(test, order + 1)
    return np.where(found >= 0, table[np.maximum(found, 0)], np.nan)


class Contexts:
    """What follows each context of up to `order` letters, in both strands of `sequences`: all contexts sorted
    by the letter before, then the one before that, so that those of a shorter order lie side by side."""

    def __init__(self, sequences: Sequence[Digits], order: int) -> None:
        self.order = order
        found = []
        for sequence in sequences:
            for strand in both_strands(sequence):
                known = words(strand, order + 1) >= 0
                found.append((contexts_of(strand, order)[known] << 2) | strand[known])
        whole = np.sort(np.concatenate(found))
        self.contexts = whole >> 2
        follows = (whole & 3)[:, None] == np.arange(4)
        self.before = np.zeros((len(whole) + 1, 4), dtype=np.int32)
        np.cumsum(follows, axis=0, dtype=np.int32, out=self.before[1:])

    def counts(self, rising: Digits, order: int) -> NDArray[np.int32]:
        """The counts (n, 4) of what follows the last `order` letters of contexts in rising order (n,)."""
        shift = 2 * (self.order - order)
        low = (rising >> shift) << shift
        first, last = (np.searchsorted(self.contexts, x) for x in (low, low + (1 << shift)))
        return self.before[last] - self.before[first]


def contexts_of(digits: Digits, order: int) -> Digits:
    """The `order` letters before each base, the nearest first, as a number in base 4 (n,); what is not known
    or not there reads as A."""
    padded = np.concatenate([np.zeros(order, dtype=np.uint8), (digits & 3).astype(np.uint8)])
    return kmer_codes(padded[::-1], order).astype(np.int64)[:0:-1]


def mixture(train: Sequence[Digits], test: Digits, orders: Sequence[int], forget: float) -> Floats:
    """log P of each base of `test` (n,) under the mixture of `orders`; NaN where the base is not known."""
    n = len(test)
    logs = np.zeros((n, len(orders)), dtype=np.float32)
    target = np.minimum(test, 3)
    table = Contexts(train, max(orders))
    contexts = contexts_of(test, max(orders))
    rising = np.argsort(contexts)
    # How many known letters stand before each base without a break.
    place = np.arange(n)
    run = place - np.concatenate([[0], np.maximum.accumulate(np.where(test == 4, place + 1, 0))[:-1]])
    for column, order in enumerate(orders):
        added = _ADDED_LONG if order >= _LONG else _ADDED_SHORT
        for first in range(0, n, _PIECE):
            at = rising[first : first + _PIECE]
            behind = table.counts(contexts[at], order) * (run[at] >= order)[:, None]
            own = np.take_along_axis(behind, target[at, None], 1)[:, 0]
            logs[at, column] = np.log((own + added) / (behind.sum(1) + 4 * added))
    known = test < 4
    logs[~known] = 0.0  # they say nothing about which order is right
    weights = faded_sums(logs, forget)
    weights -= weights.max(1, keepdims=True)
    shares = np.exp(weights)
    mixed = np.log((shares * np.exp(logs)).sum(1) / shares.sum(1))
    return np.where(known, mixed, np.nan)


def faded_sums(values: NDArray[np.float32], forget: float, block: int = 128) -> Floats:
    """sums[t] = sum over s < t of forget^(t - s) values[s], (n, columns)."""
    n, columns = values.shape
    padded = np.zeros((-(-n // block) * block, columns))
    padded[:n] = values
    ages = np.arange(block)[:, None] - np.arange(block)[None]
    inner = np.where(ages > 0, forget ** np.maximum(ages, 0).astype(np.float64), 0.0)
    fade = forget ** np.arange(block, dtype=np.float64)[:, None]
    last = forget ** np.arange(block, 0, -1, dtype=np.float64)
    carried = np.zeros(columns)
    sums = np.empty_like(padded)
    for first in range(0, len(padded), block):
        part = padded[first : first + block]
        sums[first : first + block] = inner @ part + fade * carried
        carried = carried * forget**block + last @ part
    return sums[:n]


def language(args: argparse.Namespace) -> None:
    genome = _genome(args)
    splits = split_genome(genome, args.val_fraction, args.gap, args.leave_out)
    orders = range(args.mixture[0], args.mixture[1] + 1)
    totals: dict[str, list[float]] = {f"order {args.order}": [0.0, 0.0], "mixture": [0.0, 0.0]}
    print(f"{'genome':<28}{'bases tested':>14}{f'order {args.order}':>12}{'mixture':>12}", flush=True)
    for file, path in enumerate(genome.files):
        own = {
            name: [_digits(genome, s) for s in splits[name] if genome.records[s.record].file == file]
            for name in ("train", "validation")
        }
        if not own["validation"]:
            continue
        shown = []
        for name in totals:
            values = [
                mixture(own["train"], test, orders, args.forget)
                if name == "mixture"
                else order_k(own["train"], test, args.order)
                for test in own["validation"]
            ]
            whole = np.concatenate(values)
            whole = whole[~np.isnan(whole)]
            totals[name][0] -= float(whole.sum())
            totals[name][1] += len(whole)
            shown.append(-float(whole.mean()))
        bases = sum(int((test < 4).sum()) for test in own["validation"])
        print(f"{path.name:<28}{bases:>14,}" + "".join(f"{x:>12.4f}" for x in shown), flush=True)
    line = "".join(f"{loss / max(1, count):>12.4f}" for loss, count in totals.values())
    print(f"{'all, weighted by base':<28}{int(totals['mixture'][1]):>14,}{line}  nats a base")


def species(args: argparse.Namespace) -> None:
    classes = dict(one.split("=", 1) for one in args.species)
    right: dict[int, list[bool]] = {length: [] for length in args.lengths}
    blocks: dict[int, list[tuple[int, ...]]] = {length: [] for length in args.lengths}
    for fold in range(args.folds):
        data = SpeciesDataModule(
            args.path,
            classes,
            folds=args.folds,
            test_fold=fold,
            validation=False,
            test_lengths=args.lengths,
            cache_dir=args.cache_dir,
        )
        plan = data.plan
        tables = [
            log_table(
                counts([_DIGITS[p.letters.numpy()] for p in plan.pieces if p.label == label], args.order)
            )
            for label in range(len(classes))
        ]
        print(
            f"fold {fold}: of the 1-kb blocks of training "
            + ", ".join(f"{r} of {c}" for r, c in zip(plan.removed, plan.candidates))
            + f" were taken out ({', '.join(data.classes)})",
            flush=True,
        )
        sums = _window_sums(data, tables, args.order)
        for length in args.lengths:
            for window in data.windows("test", length):
                total = sums[window.label, window.stretch]
                begin, end = window.offset + args.order, window.offset + length
                right[length].append(int(np.argmax(total[end] - total[begin])) == window.label)
                blocks[length].append((fold, *window.block(max(args.lengths))))
    print(f"{'length':>9}{'accuracy':>10}{'95 % interval':>20}{'windows':>10}{'blocks':>8}")
    for length in args.lengths:
        names = {name: i for i, name in enumerate(sorted(set(blocks[length])))}
        number = torch.tensor([names[name] for name in blocks[length]])
        hits = torch.tensor(right[length])
        low, high = block_bootstrap(hits, number)
        accuracy = float(hits.double().mean())
        interval = f"{low:.3f} to {high:.3f}"
        print(f"{length:>9}{accuracy:>10.3f}{interval:>20}{len(hits):>10,}{len(names):>8}", flush=True)


def _window_sums(
    data: SpeciesDataModule, tables: Sequence[Floats], order: int
) -> dict[tuple[int, int], Floats]:
    """Of each test stretch, by class and number, the sum of log P before each base under each table, (n + 1,
    tables)."""
    sums = {}
    for label, stretches in enumerate(data.plan.held["test"]):
        for number, stretch in enumerate(stretches):
            found = words(_digits(data.genome, stretch), order + 1)
            logs = np.stack([np.where(found >= 0, t.ravel()[np.maximum(found, 0)], 0.0) for t in tables], 1)
            sums[label, number] = np.concatenate([np.zeros((1, len(tables))), np.cumsum(logs, axis=0)])
    return sums


def _genome(args: argparse.Namespace) -> Genome:
    files = text_files(expand_path(args.path), GENOME_SUFFIXES)
    return open_genome(files, cache_folder("genomes", args.cache_dir))


def _digits(genome: Genome, stretch: Stretch) -> Digits:
    return _DIGITS[genome.read(stretch.record, stretch.start, stretch.end).numpy()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.markov", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--path", required=True, help="a folder of FASTA files, one a genome")
    both.add_argument("--cache-dir", help="where parsed genomes are kept")
    one = commands.add_parser("language", parents=[both], help="nats a base on the tail of each genome")
    one.add_argument(
        "--leave-out", action="append", default=[], help="names or patterns of files in no split"
    )
    one.add_argument("--order", type=int, default=7)
    one.add_argument("--mixture", type=int, nargs=2, default=(2, 20), metavar=("FIRST", "LAST"))
    one.add_argument("--forget", type=float, default=0.99, help="of an order's past, what a base leaves")
    one.add_argument("--val-fraction", type=float, default=0.2)
    one.add_argument("--gap", type=int, default=1 << 17)
    two = commands.add_parser("species", parents=[both], help="accuracy by window length")
    two.add_argument("--species", action="append", required=True, metavar="NAME=FILE", help="again for more")
    two.add_argument("--order", type=int, default=4)
    two.add_argument("--folds", type=int, default=5)
    two.add_argument("--lengths", type=int, nargs="+", default=list(DEFAULT_LENGTHS))
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    began = time.perf_counter()
    {"language": language, "species": species}[args.command](args)
    print(f"wall {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
