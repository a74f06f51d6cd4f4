"""Labelled DNA sequences for classification: CSV files with official splits, packed end to end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ssm_modal.datamodules.batch_plan import BatchPlan, Parts, PlannedBatches
from ssm_modal.datamodules.dna import SPLITS, build_dna_tokenizer
from ssm_modal.datamodules.dna_masking import IGNORE
from ssm_modal.datamodules.left_out import warn_left_out
from ssm_modal.datamodules.resumable import ResumableLoader, check_same, derived_seed, run_seed
from ssm_modal.datamodules.run_files import write_run_files
from ssm_modal.io.labelled_sequences import (
    LabelledSequence,
    class_names,
    read_labelled_sequences,
    read_unlabelled_sequences,
)
from ssm_modal.io.nucleotides import GenomeError, letters_of, reverse_complement, text_of
from ssm_modal.io.recordings import LeftOut
from ssm_modal.io.text import expand_path
from ssm_modal.plots import draw_track
from ssm_modal.tokenizers.dna import DNATokenizer


@dataclass
class LabelledDNABatches(PlannedBatches):
    """Batches of one split, each a pure function of its index: `make(index, rank, world)`.

    n sequences end to end, with `total` tokens together:

        ids (1, total) int64
        cu_seqlens (n + 1,) int64: where each begins, and the end
        labels (n,) int64: the class, -100 where it is not known
        recordings (n,) int64: the place of each in `sequences`
        in_training (n,) bool: where `seen` is given, whether each stands in training

    plan: which sequences stand in which batch. classes: their names, in the order of their numbers. augment:
    in training, each sequence is read on one strand or the other, with equal chance, anew in each epoch.
    seen: (sequences,) bool, which of them stand in training, None where that is not asked.
    """

    sequences: Sequence[LabelledSequence]
    plan: BatchPlan
    classes: Sequence[str]
    tokenizer: DNATokenizer
    augment: bool = False
    seen: Tensor | None = None

    def _batch(self, parts: Parts, epoch: int | None) -> dict[str, Tensor]:
        rows = parts.recording.tolist()
        number = {name: i for i, name in enumerate(self.classes)}
        batch = {
            "ids": torch.cat([self._ids(row, epoch) for row in rows])[None],
            "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), parts.sizes.cumsum(0)]),
            "labels": torch.tensor(
                [number.get(self.sequences[row].label, IGNORE) for row in rows], dtype=torch.int64
            ),
            "recordings": parts.recording.clone(),
        }
        if self.seen is not None:
            batch["in_training"] = self.seen[parts.recording]
        return batch

    def _ids(self, row: int, epoch: int | None) -> Tensor:
        letters = letters_of(self.sequences[row].sequence)
        drawn = epoch is not None and self.augment
        if drawn and derived_seed(self.plan.seed, "dna", "strand", int(epoch or 0), row) % 2 == 1:
            letters = reverse_complement(letters)
        return self.tokenizer.encode_letters(letters)


class DNAClassificationDataModule(pl.LightningDataModule):
    """Batches of labelled sequences from CSV files `sequence,label`, one for each split, as GUE has them.

    Sequences are packed end to end, never padded; batches are cut by a budget of tokens. See
    `LabelledDNABatches` for what a batch holds; those of validation and test say which of their sequences
    stand in training too. Every batch is a pure function of (seed, split, index,
    process).

    Args:
        path: the folder of the files. `~` and environment variables (`$NAME`, `${NAME}`) are filled in.
        train_file, val_file, test_file: their names; a validation file that is not there gives no validation.
        predict_file: the path of what `predict` classifies: a CSV file like these, where labels may be
            missing, or a FASTA or GenBank file. None: the test file.
        tokenizer: as for `DNADataModule`.
        batch_tokens: tokens a training batch of each process holds at most; a sequence that is longer is a
            batch of its own.
        eval_batch_tokens: the same for validation and test; None: `batch_tokens`.
        reverse_complement: in training, read each sequence on one strand or the other, with equal chance.
        skip_bad: leave bad lines out instead of raising, warn, and list them with the reason in `left_out`
            and, at the start of `fit`, in `left_out.csv` in the run's folder.
        num_workers: processes that prepare batches; the batches are the same with any number.
        pin_memory: copy batches to pinned memory, for training on a GPU.
        seed: order and strands; None: the run's seed (`--seed_everything`).

    Raises FileNotFoundError, and GenomeError as `read_labelled_sequences`, naming file and line, also for a
    sequence shorter than a token, and for a class of validation or test that training does not have;
    ValueError for any other bad argument.
    """

    def __init__(
        self,
        path: str,
        train_file: str = "train.csv",
        val_file: str = "dev.csv",
        test_file: str = "test.csv",
        predict_file: str | None = None,
        tokenizer: str | dict[str, Any] = "nucleotide",
        batch_tokens: int = 1 << 13,
        eval_batch_tokens: int | None = None,
        reverse_complement: bool = False,
        skip_bad: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("batch_tokens", batch_tokens), ("eval_batch_tokens", eval_batch_tokens)):
            if number is None and name != "batch_tokens":
                continue
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name} is {number!r}, expected a whole number of 1 or more")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}, expected 0 or more")
        self.path = path
        self.files = {"train": train_file, "validation": val_file, "test": test_file}
        self.predict_file = predict_file
        self.tokenizer = build_dna_tokenizer(tokenizer)
        self.batch_tokens, self.eval_batch_tokens = batch_tokens, eval_batch_tokens or batch_tokens
        self.reverse_complement, self.skip_bad = reverse_complement, skip_bad
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
        self._sequences: dict[str, list[LabelledSequence]] | None = None
        self._classes: tuple[str, ...] = ()
        self._left_out: list[LeftOut] = []

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels of training, see `class_names`: a class's number is its place here."""
        self._prepare()
        return self._classes

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """With `skip_bad`, what was left out and why."""
        self._prepare()
        return tuple(self._left_out)

    def sequences(self, split: str) -> list[LabelledSequence]:
        """The sequences of `split` ("train", "validation", "test" or "predict"), in the order of the file."""
        if split not in (*SPLITS, "predict"):
            raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}, predict")
        return self._prepare()[split]

    def predicted_files(self) -> list[str]:
        """The name of each sequence that is predicted: its record's, or file and line of a CSV file."""
        name = self.input_files()[0].name
        return [one.record or f"{name}:{one.line}" for one in self.sequences("predict")]

    def input_files(self) -> list[Path]:
        """The file that the predicted sequences stand in."""
        if self.predict_file is not None:
            return [expand_path(self.predict_file, "predict_file")]
        return [expand_path(self.path) / self.files["test"]]

    def in_training(self, split: str) -> Tensor:
        """(sequences,) bool: which sequences of `split` stand in training, letter by letter, on either
        strand."""
        known = {one.sequence for one in self.sequences("train")}
        return torch.tensor(
            [
                one.sequence in known or text_of(reverse_complement(letters_of(one.sequence))) in known
                for one in self.sequences(split)
            ],
            dtype=torch.bool,
        )

    def example_input(self, split: str, number: int) -> Tensor:
        """What the model reads of sequence `number` of "validation", "test" or "predict": (1, tokens)."""
        one = self.sequences(split)[number]
        return self.tokenizer.encode_letters(letters_of(one.sequence)).unsqueeze(0)

    def draw_relevance(self, panel: Any, split: str, number: int, relevance: Tensor) -> None:
        """Draw the `relevance` of that sequence's tokens (tokens,) into the matplotlib subfigure `panel`."""
        draw_track(panel, relevance, unit="base" if self.tokenizer.span == 1 else "token")

    def setup(self, stage: str | None = None) -> None:
        """Read the files; at the start of `fit`, write down the tokenizer and what was left out."""
        self._prepare()
        trainer = self.trainer
        if stage != "fit" or trainer is None:
            return
        write_run_files(trainer, tokenizer=self.tokenizer, left_out=self._left_out if self.skip_bad else None)

    def batches(self, split: str) -> LabelledDNABatches:
        """The batches of `split` as pure functions of their index; ValueError where it has no sequence."""
        sequences = self.sequences(split)
        if not sequences:
            raise ValueError(f"the {split} split of {self.path!r} holds no sequence, expected one or more")
        train = split == "train"
        plan = BatchPlan(
            torch.tensor([self._tokens(one) for one in sequences]),
            self.batch_tokens if train else self.eval_batch_tokens,
            None,
            run_seed(self.seed),
        )
        seen = None if train else self.in_training(split)
        return LabelledDNABatches(
            sequences, plan, self._classes, self.tokenizer, self.reverse_complement, seen
        )

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader.training(
            self.batches("train").make_training,
            self.trainer,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        # Without a validation split there is nothing to validate on; Lightning skips an empty list.
        return self._evaluation("validation") if self.sequences("validation") else []

    def test_dataloader(self) -> ResumableLoader:
        return self._evaluation("test")

    def predict_dataloader(self) -> ResumableLoader:
        return self._evaluation("predict")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint's user must know: the classes and the tokenizer."""
        return {"classes": list(self.classes), "tokenizer": json.dumps(self.tokenizer.to_config())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError when the checkpoint was trained on other classes or with another tokenizer."""
        check_same(state_dict, self.state_dict(), self.trainer)

    def _evaluation(self, split: str) -> ResumableLoader:
        batches = self.batches(split)
        return ResumableLoader.evaluation(
            batches.make_evaluation,
            batches.n_batches,
            self.trainer,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    def _prepare(self) -> dict[str, list[LabelledSequence]]:
        if self._sequences is not None:
            return self._sequences
        folder = expand_path(self.path)
        self._left_out = []
        split_of: dict[str, list[LabelledSequence]] = {}
        for split in SPLITS:
            file = folder / self.files[split]
            split_of[split] = self._read(split, file) if split == "train" or file.is_file() else []
        split_of["predict"] = (
            split_of["test"] if self.predict_file is None else self._read("predict", self.input_files()[0])
        )
        warn_left_out(self._left_out, "lines")
        self._sequences = split_of
        return split_of

    def _read(self, split: str, file: Path) -> list[LabelledSequence]:
        """The good sequences of `file`; those of "train" say which classes there are."""
        read = read_unlabelled_sequences if split == "predict" else read_labelled_sequences
        found = read(file, skip_bad=self.skip_bad)
        self._left_out += found.left_out
        if split == "train":
            self._classes = class_names(one.label for one in found.sequences)
        good = []
        for one in found.sequences:
            problem = self._problem(one)
            if problem is None:
                good.append(one)
            elif self.skip_bad:
                self._left_out.append(LeftOut(file, problem))
            else:
                raise GenomeError(file, problem)
        return good

    def _problem(self, one: LabelledSequence) -> str | None:
        if one.label and one.label not in self._classes:
            known = ", ".join(self._classes)
            return f"{one.place}: the label is {one.label!r}, expected one of training's: {known}"
        if self._tokens(one) < 1:
            return f"{one.place}: {len(one.sequence)} bases are less than a token's {self.tokenizer.span}"
        return None

    def _tokens(self, one: LabelledSequence) -> int:
        """Tokens of a sequence, the single bases behind the last whole token among them."""
        bases, tokenizer = len(one.sequence), self.tokenizer
        whole = tokenizer.tokens_in(bases)
        return whole + (bases - whole * tokenizer.step if tokenizer.step == tokenizer.span else 0)
