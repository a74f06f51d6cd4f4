"""SyntheticDataModule: batches of the synthetic tasks, made as they are needed and never stored.

Making them costs little: on one core about 400,000 induction-heads sequences of 256 tokens a second, 25,000
selective copying sequences of 4,096 and 50,000 MQAR sequences of 256 tokens with 64 pairs. `num_workers`
moves even that off the training process.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor

from ssm_modal.datamodules.resumable import ResumableLoader, run_seed
from ssm_modal.datamodules.synthetic_formats import Format, make_format, raw_words, stream_key

TaskName = Literal["induction_heads", "copying", "selective_copying", "mqar"]


@dataclass(frozen=True)
class Setting:
    """One kind of sequence and how many of it.

    Attributes:
        length: tokens a sequence.
        pairs: key-value pairs (MQAR only); None takes the data module's.
        sequences: in training, sequences of this setting an epoch (whole batches of them), None: one batch;
            in tests, how many are tested, None: `protocol_sequences(length)`.
    """

    length: int
    pairs: int | None = None
    sequences: int | None = None

    def __post_init__(self) -> None:
        if self.sequences is not None and self.sequences < 1:
            raise ValueError(f"sequences is {self.sequences} for length {self.length}, expected at least 1")


def protocol_sequences(length: int) -> int:
    """Sequences a length is tested with: 1,024 up to 2^14, then 2^24 / length but no fewer than 64."""
    return max(64, min(1024, (1 << 24) // length))


class SyntheticDataModule(L.LightningDataModule):
    """Training, validation and test sequences of one synthetic task.

    Every batch is a pure function of (seed, split, batch index, process), so a resumed run goes on with the
    batches it would have had. Training sequences are fresh for ever (unless `repeat`); validation and test
    sequences come from streams of their own.

    A training or validation batch is a dict of `ids` and `labels`, both (batch, length) int64, `labels[:, t]`
    being what position t is to predict and -100 where nothing is asked. A test batch is a dict of `setting`,
    an index into `test_settings`: the task fetches the sequences piece by piece with `test_batch`, as a
    length of 2^20 does not fit into one batch.

    Args:
        task: "induction_heads", "copying", "selective_copying" or "mqar".
        length: the trained length; validation is at this length.
        batch_size: sequences a training batch and process.
        lengths: test lengths; None: `length` alone.
        sequences: sequences of each test length; None: `protocol_sequences`.
        train_lengths: lengths that training batches take turns with, in an order drawn anew each round, one
            length a batch; None: `length` alone. The longest must be `length`.
        train_settings: instead of `train_lengths`, settings with pairs and numbers of sequences an epoch;
            batches of one setting each, in an order drawn anew each epoch.
        constant_tokens: batches of shorter sequences hold `batch_size * length // their length` sequences, so
            that every batch has about as many tokens.
        repeat: train on the same sequences in every epoch of `train_settings`, as Zoology does; every setting
            needs `sequences`.
        test_settings: instead of `lengths`.
        val_lengths: lengths validated besides `length`.
        val_sequences: validation sequences of each length.
        val_tokens: tokens a validation batch holds at most (at least one sequence).
        vocab_size: None takes the task's own (8,192 for MQAR, else 16).
        pairs: key-value pairs of a sequence (MQAR).
        tokens: tokens to copy (copying, selective copying).
        seed: None takes the run's (`--seed_everything`).
        num_workers: processes that make training batches ahead; the same batches either way.
        pin_memory: training batches in pinned memory, for an asynchronous copy to a CUDA device.
    """

    def __init__(
        self,
        task: TaskName = "induction_heads",
        length: int = 256,
        batch_size: int = 8,
        lengths: list[int] | None = None,
        sequences: int | None = None,
        train_lengths: list[int] | None = None,
        train_settings: list[Setting] | None = None,
        constant_tokens: bool = False,
        repeat: bool = False,
        test_settings: list[Setting] | None = None,
        val_lengths: list[int] | None = None,
        val_sequences: int = 512,
        val_tokens: int = 1 << 15,
        vocab_size: int | None = None,
        pairs: int = 8,
        tokens: int = 16,
        seed: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "val_sequences": val_sequences, "val_tokens": val_tokens}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if sequences is not None and sequences < 1:
            raise ValueError(f"sequences is {sequences}, expected at least 1")
        if train_lengths is not None and train_settings is not None:
            raise ValueError("train_lengths and train_settings are both given, expected one of them")
        if repeat and any(s.sequences is None for s in train_settings or [Setting(length)]):
            raise ValueError(
                "repeat is True, expected train_settings with `sequences` each: what an epoch holds"
            )
        if lengths is not None and test_settings is not None:
            raise ValueError("lengths and test_settings are both given, expected one of them")
        if test_settings is not None and sequences is not None:
            raise ValueError(
                "sequences and test_settings are both given, expected one (a setting has `sequences`)"
            )
        if train_lengths is not None and max(train_lengths, default=0) != length:
            raise ValueError(
                f"train_lengths is {train_lengths}, expected the longest to be length = {length}"
            )
        for name, given in {
            "train_settings": train_settings,
            "test_settings": test_settings,
            "lengths": lengths,
        }.items():
            if given is not None and len(given) == 0:
                raise ValueError(f"{name} is empty, expected at least one entry")
        self.task = task
        self.length = length
        self.batch_size = batch_size
        self.constant_tokens = constant_tokens
        self.repeat = repeat
        self.val_sequences = val_sequences
        self.val_tokens = val_tokens
        self._vocab_size = vocab_size
        self.pairs = pairs
        self.tokens = tokens
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._seed = seed
        self.train_settings = train_settings or [Setting(n) for n in train_lengths or [length]]
        self.val_settings = [
            Setting(n, sequences=val_sequences) for n in dict.fromkeys([length, *(val_lengths or [])])
        ]
        if test_settings is None:
            test_settings = [Setting(n, sequences=sequences) for n in lengths or [length]]
        self.test_settings = [
            s if s.sequences is not None else Setting(s.length, s.pairs, protocol_sequences(s.length))
            for s in test_settings
        ]
        # Lengths and options that do not fit the task are refused here rather than in the middle of a run.
        for setting in [*self.train_settings, *self.val_settings, *self.test_settings]:
            self.format(setting)

    @property
    def seed(self) -> int:
        """The seed of all sequences."""
        return run_seed(self._seed)

    @property
    def vocab_size(self) -> int:
        """Ids are below this number."""
        return self.format(Setting(self.length)).vocab_size

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the possible answers."""
        return self.format(Setting(self.length)).chance

    def format(self, setting: Setting) -> Format:
        """The format of a setting's sequences."""
        options: dict[str, Any] = {}
        if self._vocab_size is not None:
            options["vocab_size"] = self._vocab_size
        if self.task == "mqar":
            options["pairs"] = self.pairs if setting.pairs is None else setting.pairs
        elif setting.pairs is not None:
            raise ValueError(f"pairs is {setting.pairs} for task {self.task}, expected it for mqar only")
        if self.task in ("copying", "selective_copying"):
            options["tokens"] = self.tokens
        return _format(self.task, setting.length, tuple(options.items()))

    def _batch(self, setting: Setting, split: str, start: int, stop: int) -> dict[str, Tensor]:
        made = self.format(setting).generate(self.seed, split, start, stop)
        return {"ids": torch.from_numpy(made["ids"]), "labels": torch.from_numpy(made["labels"])}

    # Training

    def rows(self, setting: Setting) -> int:
        """Sequences of a training batch of `setting`, a process."""
        if not self.constant_tokens:
            return self.batch_size
        return max(1, self.batch_size * self.length // setting.length)

    def train_batch(self, index: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """Training batch `index` of process `rank` of `world`."""
        counts = tuple(
            1 if s.sequences is None else max(1, s.sequences // (self.rows(s) * world))
            for s in self.train_settings
        )
        number, in_setting = _turn(self.seed, index, counts)
        setting = self.train_settings[number]
        rows = self.rows(setting)
        start = ((in_setting if self.repeat else index) * world + rank) * rows
        return self._batch(setting, "train", start, start + rows)

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader.training(
            self.train_batch, self.trainer, num_workers=self.num_workers, pin_memory=self.pin_memory
        )

    # Validation

    def _val_plan(self) -> list[tuple[Setting, int, int]]:
        plan = []
        for setting in self.val_settings:
            rows = max(1, self.val_tokens // setting.length)
            for start in range(0, self.val_sequences, rows):
                plan.append((setting, start, min(start + rows, self.val_sequences)))
        return plan

    def val_batch(self, index: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """Validation batch `index`: the trained length first, then `val_lengths` in order."""
        setting, start, stop = self._val_plan()[index]
        return self._batch(setting, "validation", start, stop)

    def val_dataloader(self) -> ResumableLoader:
        return ResumableLoader.evaluation(self.val_batch, len(self._val_plan()), self.trainer)

    # Test

    def test_batch(self, setting: int, start: int, stop: int) -> dict[str, Tensor]:
        """The test sequences start ... stop - 1 of `test_settings[setting]`: `ids` and `labels`."""
        return self._batch(self.test_settings[setting], "test", start, stop)

    def test_dataloader(self) -> ResumableLoader:
        # Every process goes through all settings and takes its share of each one's sequences.
        return ResumableLoader.evaluation(_setting_number, len(self.test_settings))

    def predict_dataloader(self) -> ResumableLoader:
        return self.val_dataloader()


def _setting_number(index: int, rank: int, world: int) -> dict[str, Tensor]:
    return {"setting": torch.tensor(index)}


@functools.lru_cache(maxsize=256)
def _format(task: str, length: int, options: tuple[tuple[str, Any], ...]) -> Format:
    return make_format(task, length, **dict(options))


def _turn(seed: int, index: int, counts: tuple[int, ...]) -> tuple[int, int]:
    """Which setting training batch `index` has, and the how manieth of that setting in its epoch it is."""
    epoch, place = divmod(index, sum(counts))
    number, in_setting = _epoch_order(seed, epoch, counts)
    return int(number[place]), int(in_setting[place])


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    total = sum(counts)
    order = np.argsort(raw_words(stream_key("order", seed, counts), epoch, 1, total)[0], kind="stable")
    number = np.repeat(np.arange(len(counts)), counts)
    in_setting = np.concatenate([np.arange(n) for n in counts])
    return number[order], in_setting[order]
