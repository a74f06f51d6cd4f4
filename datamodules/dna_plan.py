"""Which stretches of a genome are trained on, validated on and tested on, where windows begin in them, and
how long training's windows are when."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate

from ssm_modal.errors import nearest
from ssm_modal.io.genome import Genome


@dataclass(frozen=True)
class Stretch:
    """Bases `start` to `end` (0-based, half-open) of record number `record`."""

    record: int
    start: int
    end: int

    @property
    def bases(self) -> int:
        return self.end - self.start


def split_genome(
    genome: Genome,
    val_fraction: float,
    gap: int,
    left_out_files: Sequence[str] = (),
    test_files: Sequence[str] = (),
) -> dict[str, list[Stretch]]:
    """The stretches of "train", "validation" and "test", each in the order of the records.

    Of each file's longest record (the first of several) the last `floor(bases * val_fraction)` bases are
    validation and the `gap` bases before them in no split; everything else is trained on.

    left_out_files, test_files: names of files, or patterns of names (`*`, `?`); the former are in no split,
    the latter in "test" with whole records, and in no other. Without test_files "test" is the validation.

    Raises ValueError for a pattern that fits no file, and a file that is in both.
    """
    names = [file.name for file in genome.files]
    out, test = (
        _matching(names, patterns, name)
        for patterns, name in ((left_out_files, "left_out_files"), (test_files, "test_files"))
    )
    if both := out & test:
        raise ValueError(f"{names[min(both)]!r} is both in left_out_files and in test_files")
    longest: dict[int, int] = {}
    for number, record in enumerate(genome.records):
        if record.file not in longest or record.length > genome.records[longest[record.file]].length:
            longest[record.file] = number
    splits: dict[str, list[Stretch]] = {"train": [], "validation": [], "test": []}
    for number, record in enumerate(genome.records):
        if record.file in test:
            splits["test"].append(Stretch(number, 0, record.length))
        elif record.file not in out:
            held = int(record.length * val_fraction) if number == longest[record.file] else 0
            end = record.length - held - (gap if held else 0)
            if end > 0:
                splits["train"].append(Stretch(number, 0, end))
            if held:
                splits["validation"].append(Stretch(number, record.length - held, record.length))
    if not test_files:
        splits["test"] = splits["validation"]
    return splits


@dataclass
class Places:
    """Where windows can begin: at every base of `stretches` behind which `need` bases follow in it."""

    stretches: Sequence[Stretch]
    need: int

    def __post_init__(self) -> None:
        self._ends = list(accumulate(max(0, s.bases - self.need + 1) for s in self.stretches))

    @property
    def count(self) -> int:
        return self._ends[-1] if self._ends else 0

    def place(self, number: int) -> tuple[int, int]:
        """Place `number` (below `count`): the record and the first base of the window, 0-based."""
        if not 0 <= number < self.count:
            raise ValueError(f"number is {number}, expected 0 to {self.count - 1}")
        at = bisect_right(self._ends, number)
        stretch = self.stretches[at]
        return stretch.record, stretch.start + number - (self._ends[at - 1] if at else 0)


@dataclass(frozen=True)
class Stage:
    """From training batch `first` on, batches hold `batch_size` windows of `length` tokens."""

    first: int
    length: int
    batch_size: int


def training_stages(length: int, batch_size: int, schedule: Mapping[int, int]) -> tuple[Stage, ...]:
    """The stages of a length warm-up: `schedule` gives each length the batch it begins with.

    Every batch holds length * batch_size tokens. Without a schedule there is one stage. Raises ValueError
    where lengths or beginnings do not rise, the first does not begin at 0, the last length is not `length`,
    or a length does not divide the tokens of a batch.
    """
    if not schedule:
        return (Stage(0, length, batch_size),)
    tokens = length * batch_size
    stages: list[Stage] = []
    for own, first in schedule.items():
        for what, number, least in (("length", own, 1), ("beginning", first, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(
                    f"length_schedule holds the {what} {number!r}, expected a whole number of {least} or more"
                )
        if stages and (own <= stages[-1].length or first <= stages[-1].first):
            raise ValueError(
                f"length_schedule goes from {stages[-1].length}: {stages[-1].first} to {own}: {first}, "
                "expected lengths and beginnings that rise"
            )
        if tokens % own:
            raise ValueError(
                f"length_schedule holds the length {own}, which does not divide the {tokens} tokens of a "
                f"batch (length {length} x batch_size {batch_size})"
            )
        stages.append(Stage(first, own, tokens // own))
    if stages[0].first != 0:
        raise ValueError(f"length_schedule begins with batch {stages[0].first}, expected 0")
    if stages[-1].length != length:
        raise ValueError(f"length_schedule ends with {stages[-1].length}, expected length, which is {length}")
    return tuple(stages)


def _matching(names: Sequence[str], patterns: Sequence[str], argument: str) -> set[int]:
    if isinstance(patterns, str):
        raise TypeError(f"{argument} is the string {patterns!r}, expected a list of names of files")
    found: set[int] = set()
    for pattern in patterns:
        fitting = {i for i, name in enumerate(names) if fnmatchcase(name, pattern)}
        if not fitting:
            raise ValueError(f"{argument} holds {pattern!r}, which fits no file; {nearest(pattern, names)}")
        found |= fitting
    return found
