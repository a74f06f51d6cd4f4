"""Which species a window of DNA is from: genomes cut into folds, windows of many lengths."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ssm_modal.datamodules.dna import build_dna_tokenizer
from ssm_modal.datamodules.left_out import warn_left_out
from ssm_modal.datamodules.resumable import ResumableLoader, check_same, derived_seed, global_rows, run_seed
from ssm_modal.datamodules.run_files import write_run_files
from ssm_modal.datamodules.species_plan import SpeciesPlan, SpeciesSplit, plan_species
from ssm_modal.io.cache import cache_folder
from ssm_modal.io.genome import Genome, open_genome
from ssm_modal.io.nucleotides import GenomeError, reverse_complement
from ssm_modal.io.recordings import LeftOut
from ssm_modal.io.text import expand_path
from ssm_modal.tokenizers.dna import DNATokenizer

DEFAULT_LENGTHS = tuple(2**i for i in range(10, 18))


@dataclass(frozen=True)
class Window:
    """`length` bases of class number `label`, from base `start` (0-based) of record number `record` on.

    stretch: the number of the stretch of the held-out fold it is in; offset: where it begins there.
    """

    label: int
    record: int
    start: int
    length: int
    stretch: int
    offset: int

    def block(self, bases: int) -> tuple[int, int, int]:
        """The contiguous block of `bases` it lies in, for resampling: neighbours are not independent."""
        return self.label, self.stretch, self.offset // bases


class SpeciesDataModule(pl.LightningDataModule):
    """Batches of windows of genomes, each labelled with its species; every batch holds windows of one length.

        ids (n, tokens) int64
        labels (n,) int64: the class
        recordings (n,) int64, in evaluation: the place of each window in `windows`

    How bases are shared out, and what of training is taken out because relatives have it too, is in
    `ssm_modal.datamodules.species_plan`. A training window's class, place and strand are drawn uniformly, its
    length from `lengths`. Validation and test go through windows end to end in their fold, none over a border
    of records or folds, the lengths one after the other. Every batch is a pure function of (seed, split,
    index, process).

    Args:
        path: the folder of the genomes. `~` and environment variables (`$NAME`, `${NAME}`) are filled in.
        classes: the name of each species to its FASTA or GenBank file below `path`, or to several, joined by
            commas.
        tokenizer: as for `DNADataModule`.
        lengths: bases of training windows.
        length_warmup: training batches of only the first length, then of the first two, and so on, each for
            so many; 0: all lengths from the start.
        batch_tokens: tokens a training batch of each process holds at most, unless one window has more.
        test_lengths: bases of test windows, rising.
        val_lengths: bases of validation windows; None: the shortest and the longest of `test_lengths`.
        val_windows: validation windows of each length and class at most, evenly spread.
        eval_batch_tokens: as batch_tokens, for validation and test; None: `batch_tokens`.
        folds, test_fold: into how many folds, and which is tested on, from 0.
        validation: validate on the fold behind the test fold, in a ring; else it is trained on.
        kmer, block, max_shared: a block of `block` bases of training goes where `max_shared` or more of its
            k-mers stand, on either strand, in the test or validation fold of another class.
        reverse_complement: in training, read one strand or the other, with equal chance.
        skip_bad, num_workers, pin_memory, seed, cache_dir: as for `DNADataModule`.

    Raises FileNotFoundError and GenomeError as `open_genome`, GenomeError for a window longer than every
    stretch of a class, and ValueError for any other bad argument.
    """

    def __init__(
        self,
        path: str,
        classes: dict[str, str],
        tokenizer: str | dict[str, Any] = "nucleotide",
        lengths: Sequence[int] = DEFAULT_LENGTHS,
        length_warmup: int = 0,
        batch_tokens: int = 1 << 17,
        test_lengths: Sequence[int] = DEFAULT_LENGTHS,
        val_lengths: Sequence[int] | None = None,
        val_windows: int = 32,
        eval_batch_tokens: int | None = None,
        folds: int = 5,
        test_fold: int = 0,
        validation: bool = True,
        kmer: int = 24,
        block: int = 1000,
        max_shared: float = 0.05,
        reverse_complement: bool = True,
        skip_bad: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if len(classes) < 2:
            raise ValueError(f"classes has {len(classes)} names, expected two species or more")
        self.tokenizer: DNATokenizer = build_dna_tokenizer(tokenizer)
        self.lengths, self.test_lengths = tuple(lengths), tuple(test_lengths)
        self.val_lengths = (
            tuple(val_lengths) if val_lengths is not None else (min(test_lengths), max(test_lengths))
        )
        for name in ("lengths", "test_lengths", "val_lengths"):
            given = getattr(self, name)
            if not given or list(given) != sorted(set(given)) or given[0] < self.tokenizer.span:
                raise ValueError(
                    f"{name} is {list(given)}, expected rising numbers of {self.tokenizer.span} or more"
                )
        if length_warmup < 0 or num_workers < 0:
            name = "length_warmup" if length_warmup < 0 else "num_workers"
            raise ValueError(f"{name} is {min(length_warmup, num_workers)}, expected 0 or more")
        sizes = {"batch_tokens": batch_tokens, "val_windows": val_windows}
        sizes["eval_batch_tokens"] = batch_tokens if eval_batch_tokens is None else eval_batch_tokens
        for name, number in sizes.items():
            if number < 1:
                raise ValueError(f"{name} is {number}, expected 1 or more")
        self.path, self.class_files = path, dict(classes)
        self.length_warmup, self.val_windows = length_warmup, val_windows
        self.batch_tokens, self.eval_batch_tokens = batch_tokens, sizes["eval_batch_tokens"]
        self.split = SpeciesSplit(folds, test_fold, validation, kmer, block, max_shared)
        self.reverse_complement, self.skip_bad, self.cache_dir = reverse_complement, skip_bad, cache_dir
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
        self._genome: Genome | None = None
        self._plan: SpeciesPlan | None = None

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the species: a class's number is its place here."""
        return tuple(self.class_files)

    @property
    def test_fold(self) -> int:
        """The fold that is tested on."""
        return self.split.test_fold

    @property
    def genome(self) -> Genome:
        """The records of all files; parses what the cache does not hold yet."""
        if self._genome is None:
            files = [file for own in self._files() for file in own]
            if len(set(files)) < len(files):
                raise ValueError("classes names a file twice, expected each in one class")
            folder = cache_folder("genomes", self.cache_dir)
            self._genome = open_genome(files, folder, skip_bad=self.skip_bad)
            warn_left_out(self._genome.left_out, "records or files")
        return self._genome

    @property
    def plan(self) -> SpeciesPlan:
        """What is trained on and held out; made at the first use."""
        if self._plan is None:
            genome, number = self.genome, 0
            records: list[list[int]] = []
            for own in self._files():
                mine = range(number, number + len(own))
                number += len(own)
                records.append([i for i, record in enumerate(genome.records) if record.file in mine])
                if not records[-1]:
                    raise GenomeError(own[0], "no record is left of this class")
            self._plan = plan_species(genome, records, self.split)
        return self._plan

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """With `skip_bad`, what was left out and why."""
        return self.genome.left_out

    def windows(self, split: str, length: int) -> list[Window]:
        """All windows of `length` bases of "validation" or "test", end to end, class after class."""
        found = [
            Window(label, stretch.record, start, length, number, start - stretch.start)
            for label, stretches in enumerate(self.plan.held[split])
            for number, stretch in enumerate(stretches)
            for start in range(stretch.start, stretch.end - length + 1, length)
        ]
        missing = set(range(len(self.classes))) - {window.label for window in found}
        if missing and self.plan.held[split][0]:
            raise GenomeError(
                self.path,
                f"no window of {length} bases lies in a {split} stretch of {self.classes[min(missing)]!r}",
            )
        return found

    def evaluation_windows(self, split: str) -> list[Window]:
        """The windows that validation or test goes through: what `recordings` in a batch counts."""
        if split == "test":
            return [window for length in self.test_lengths for window in self.windows("test", length)]
        found: list[Window] = []
        for length in self.val_lengths:
            every = self.windows("validation", length)
            for label in range(len(self.classes)):
                own = [window for window in every if window.label == label]
                step = max(1.0, len(own) / self.val_windows)
                found += [own[int(i * step)] for i in range(min(len(own), self.val_windows))]
        return found

    def prepare_data(self) -> None:
        """Parse what the cache does not hold yet."""
        self.genome  # noqa: B018

    def setup(self, stage: str | None = None) -> None:
        """Make the plan; at the start of `fit`, write down the tokenizer, the plan and what was left out."""
        plan = self.plan
        trainer = self.trainer
        if stage != "fit" or trainer is None:
            return
        self._places  # noqa: B018
        left_out = self.left_out if self.skip_bad else None
        if write_run_files(trainer, tokenizer=self.tokenizer, left_out=left_out):
            for name, removed, of in zip(self.classes, plan.removed, plan.candidates):
                print(
                    f"{name}: {removed} of {of} blocks of training stand in another species' held-out folds"
                )

    def make_training(self, index: int, rank: int, world: int) -> dict[str, Tensor]:
        """Training batch `index`: windows of one length, as many as `batch_tokens` holds."""
        seed = run_seed(self.seed)
        usable = self.lengths
        if self.length_warmup:
            usable = usable[: 1 + index // self.length_warmup]
        length = usable[derived_seed(seed, "species", "length", index) % len(usable)]
        places = self._places[length]
        count = max(1, self.batch_tokens // max(1, self.tokenizer.tokens_in(length)))
        ids, labels = [], []
        for row in global_rows(index, count, rank, world):
            label = derived_seed(seed, "species", length, row, "class") % len(self.classes)
            number = derived_seed(seed, "species", length, row) % places[label][-1][0]
            before = 0
            for end, piece in places[label]:
                if number < end:
                    start = number - before
                    letters = self.plan.pieces[piece].letters[start : start + length]
                    break
                before = end
            minus = derived_seed(seed, "species", length, row, "strand") % 2 == 1
            if self.reverse_complement and minus:
                letters = reverse_complement(letters)
            ids.append(self.tokenizer.encode_letters(letters))
            labels.append(label)
        return {"ids": torch.stack(ids), "labels": torch.tensor(labels)}

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader.training(
            self.make_training, self.trainer, num_workers=self.num_workers, pin_memory=self.pin_memory
        )

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        # Without a validation split there is nothing to validate on; Lightning skips an empty list.
        return self._evaluation("validation") if self.split.validation else []

    def test_dataloader(self) -> ResumableLoader:
        return self._evaluation("test")

    def predict_dataloader(self) -> ResumableLoader:
        return self._evaluation("test")

    def predicted_files(self) -> list[str]:
        """The windows that are predicted, as regions: what the numbers in `recordings` stand for."""
        records = self.genome.records
        return [
            f"{records[w.record].name}:{w.start + 1}-{w.start + w.length}"
            for w in self.evaluation_windows("test")
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint's user must know: the classes, the tokenizer and the held-out folds."""
        return {
            "classes": list(self.classes),
            "tokenizer": json.dumps(self.tokenizer.to_config()),
            "test_fold": self.split.test_fold,
            "folds": self.split.folds,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises ValueError when the checkpoint was trained on other classes or folds, or with another
        tokenizer."""
        check_same(state_dict, self.state_dict(), self.trainer)

    def _files(self) -> list[list[Path]]:
        folder = expand_path(self.path)
        return [[folder / name.strip() for name in names.split(",")] for names in self.class_files.values()]

    @cached_property
    def _places(self) -> dict[int, list[list[tuple[int, int]]]]:
        """Of each length and class where windows can begin: (places up to here, number of the piece)."""
        found: dict[int, list[list[tuple[int, int]]]] = {}
        for length in self.lengths:
            found[length] = [[] for _ in self.classes]
            for number, piece in enumerate(self.plan.pieces):
                places = len(piece.letters) - length + 1
                if places > 0:
                    own = found[length][piece.label]
                    own.append(((own[-1][0] if own else 0) + places, number))
            for name, own in zip(self.classes, found[length]):
                if not own:
                    most = max((len(p.letters) for p in self.plan.pieces), default=0)
                    raise GenomeError(
                        self.path,
                        f"a training window has {length} bases, but no stretch of {name!r} has as many (the "
                        f"longest of all species has {most})",
                    )
        return found

    def _evaluation(self, split: str) -> ResumableLoader:
        windows = self.evaluation_windows(split)
        batches: list[tuple[int, int]] = []
        for first, window in enumerate(windows):
            tokens = max(1, self.tokenizer.tokens_in(window.length))
            begin = batches[-1][0] if batches else 0
            same = bool(batches) and windows[begin].length == window.length
            if same and (first + 1 - begin) * tokens <= self.eval_batch_tokens:
                batches[-1] = (begin, first + 1)
            else:
                batches.append((first, first + 1))

        def make(index: int, rank: int, world: int) -> dict[str, Tensor]:
            numbers = range(*batches[index])
            own = [windows[i] for i in numbers]
            letters = [self.genome.read(w.record, w.start, w.start + w.length) for w in own]
            return {
                "ids": torch.stack([self.tokenizer.encode_letters(one) for one in letters]),
                "labels": torch.tensor([w.label for w in own]),
                "recordings": torch.tensor(list(numbers)),
            }

        return ResumableLoader.evaluation(
            make, len(batches), self.trainer, num_workers=self.num_workers, pin_memory=self.pin_memory
        )
