"""Text for language modelling: a file or folder of text as mapped ids, cut in windows or packed documents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from ssm_modal.datamodules.resumable import ResumableLoader, derived_seed, global_rows, run_seed
from ssm_modal.datamodules.run_files import write_run_files
from ssm_modal.io.cache import cache_folder
from ssm_modal.io.ids import IdCorpus, IdSplit, write_corpus
from ssm_modal.io.text import iter_text, text_files
from ssm_modal.tokenizers import TextTokenizer, build_tokenizer

IGNORE = -100
# Tokens decoded at once to count their bytes.
_COUNT_TOKENS = 1 << 16
Layout = Literal["windows", "packed"]


@dataclass
class TextBatches:
    """Batches of windows over one split, each a pure function of its index: `make(index, rank, world)`.

    A window that starts at token s of the split holds ids [s, s + length) and predicts tokens [s + 1, s +
    length].

    corpus, split: where the ids are. length: tokens a window. batch_size: windows a batch (of one process).
    layout: "windows" gives `ids`, `labels` (batch_size, length) int64. "packed" gives them as one row (1,
    total) and `cu_seqlens` (sequences + 1,) int64, with a border at every window's start and at every
    document's start, so that nothing is carried across; the last token of a document then predicts nothing.
    seed: for `make_training`; which windows are drawn depends on it and on the sample's global number alone.
    """

    corpus: IdCorpus
    split: str
    length: int
    batch_size: int
    layout: Layout
    seed: int = 0
    _mapped: IdSplit | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # A worker maps the file itself; sending the mapped tensor would copy all of it.
        return {**self.__dict__, "_mapped": None}

    @property
    def data(self) -> IdSplit:
        if self._mapped is None:
            self._mapped = self.corpus.split(self.split)
        return self._mapped

    @property
    def tokens(self) -> int:
        return self.corpus.tokens[self.split]

    @property
    def n_windows(self) -> int:
        """Windows that evaluation takes: end to end, the last perhaps shorter."""
        return max(0, -(-(self.tokens - 1) // self.length))

    @property
    def n_batches(self) -> int:
        return -(-self.n_windows // self.batch_size)

    def make_training(self, index: int, rank: int, world: int) -> dict[str, Tensor]:
        """Batch `index` of windows drawn uniformly from the split, shared out as `global_rows` says."""
        places = self.tokens - self.length  # the last place leaves one token to predict behind the window
        rows = global_rows(index, self.batch_size, rank, world)
        return self._batch([derived_seed(self.seed, "text", row) % places for row in rows])

    def make_evaluation(self, index: int, rank: int, world: int) -> dict[str, Tensor]:
        """Batch `index` of windows end to end: over all batches each token but the first is predicted once.

        With layout "windows" the last window is filled up with id 0 and label -100; with "packed" it is
        shorter, and the first token of each document is predicted nowhere.
        """
        first = index * self.batch_size
        last = min(first + self.batch_size, self.n_windows)
        return self._batch([window * self.length for window in range(first, last)])

    def _batch(self, starts: Sequence[int]) -> dict[str, Tensor]:
        return self._packed(starts) if self.layout == "packed" else self._windows(starts)

    def _windows(self, starts: Sequence[int]) -> dict[str, Tensor]:
        ids = torch.zeros(len(starts), self.length, dtype=torch.int64)
        labels = torch.full((len(starts), self.length), IGNORE, dtype=torch.int64)
        for row, start in enumerate(starts):
            window = self._window(start)
            n = window.shape[0] - 1
            ids[row, :n] = window[:-1]
            labels[row, :n] = window[1:]
        return {"ids": ids, "labels": labels}

    def _packed(self, starts: Sequence[int]) -> dict[str, Tensor]:
        ids, labels, borders, total = [], [], [0], 0
        for start in starts:
            window = self._window(start)
            n = window.shape[0] - 1
            targets = window[1:].clone()
            inner = self._borders_in(start, n)
            # The token before a border would predict another document's first token.
            targets[[b - 1 for b in inner if b > 0]] = IGNORE
            borders += [total + b for b in inner if 0 < b < n]
            total += n
            borders.append(total)
            ids.append(window[:-1])
            labels.append(targets)
        return {
            "ids": torch.cat(ids)[None],
            "labels": torch.cat(labels)[None],
            "cu_seqlens": torch.tensor(borders, dtype=torch.int64),
        }

    def _window(self, start: int) -> Tensor:
        return self.data.ids[start : start + self.length + 1].to(torch.int64)

    def _borders_in(self, start: int, n: int) -> list[int]:
        """Document starts in (start, start + n], counted from `start`."""
        borders = self.data.borders
        span = torch.tensor([start + 1, start + n + 1])
        first, last = torch.searchsorted(borders, span).tolist()
        return [int(b) - start for b in borders[first:last].tolist()]


class TextDataModule(pl.LightningDataModule):
    """Batches of `ids` and `labels` from a file or folder of text; `labels[t]` is the token after `ids[t]`.

    The ids are written once to `cache_dir`, below a name made of the texts' content and the tokenizer, and
    mapped from there, so that a text larger than the memory can be trained on. A run writes its tokenizer
    beside its checkpoints (`tokenizer.json` in `trainer.default_root_dir`), where `ssm-modal generate` finds
    it.

    Args:
        path: a text file, or a folder, read recursively in sorted order, one document a file. `~` and
            environment variables (`$NAME`, `${NAME}`) are filled in, in every path.
        tokenizer: "byte", "byte+eos", "char" (the characters of all the texts given), the path of a
            tokenizer.json, or a config as `TextTokenizer.to_config` gives. Where it has an end-of-text id,
            each document ends with it.
        length: tokens a training window.
        batch_size: training windows a batch of each process.
        eval_length: tokens a validation or test window; None: `length`.
        eval_batch_size: windows a validation or test batch; None: `batch_size`.
        val_fraction: the last part of each document that is kept for validation: of n tokens the first
            `int(n * (1 - val_fraction))` are trained on. Not used when `val_path` is given.
        val_path: a file or folder of its own for validation.
        test_path: the same for testing; None: the validation split.
        layout: "windows": (batch_size, length), no heed to documents. "packed": one row of batch_size *
            length tokens with `cu_seqlens`, borders where a window or a document begins. See `TextBatches`.
        suffixes: endings of the files read below a folder.
        num_workers: processes that prepare batches; the batches are the same with any number.
        pin_memory: copy batches to pinned memory, for training on a GPU.
        seed: draws the training windows; None: the run's seed (`--seed_everything`).
        cache_dir: where the ids are kept; None: `$SSM_MODAL_CACHE`, else `$XDG_CACHE_HOME/ssm_modal`, else
            `~/.cache/ssm_modal`.

    Raises FileNotFoundError for a missing path, TextFileError for an empty or binary file (naming file and
    byte), ValueError for a text shorter than a window and for any other bad argument.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | dict[str, Any] = "byte",
        length: int = 256,
        batch_size: int = 16,
        eval_length: int | None = None,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        val_path: str | None = None,
        test_path: str | None = None,
        layout: Layout = "windows",
        suffixes: Sequence[str] = (".txt",),
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"length": length, "batch_size": batch_size}
        sizes |= {"eval_length": eval_length or length, "eval_batch_size": eval_batch_size or batch_size}
        for name, value in {**sizes, "eval_length": eval_length, "eval_batch_size": eval_batch_size}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} is {value!r}, expected a whole number of 1 or more")
        if layout not in ("windows", "packed"):
            raise ValueError(f'layout is {layout!r}, expected "windows" or "packed"')
        if not 0.0 <= val_fraction < 1.0:
            raise ValueError(f"val_fraction is {val_fraction}, expected at least 0 and less than 1")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}, expected 0 or more")
        self.path, self.val_path, self.test_path = path, val_path, test_path
        self.length, self.batch_size = sizes["length"], sizes["batch_size"]
        self.eval_length, self.eval_batch_size = sizes["eval_length"], sizes["eval_batch_size"]
        self.val_fraction = 0.0 if val_path is not None else val_fraction
        self.layout: Layout = layout
        self.suffixes = tuple(suffixes)
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
        self.cache_dir = cache_dir
        self._spec = tokenizer
        self._tokenizer: TextTokenizer | None = None
        self._splits: dict[str, tuple[IdCorpus, str]] = {}
        self._bytes_per_token: dict[str, float] = {}

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer; "char" reads the texts when it is first asked for."""
        if self._tokenizer is None:
            self._tokenizer = build_tokenizer(self._spec, self._text() if self._spec == "char" else None)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def prepare_data(self) -> None:
        """Encode what the cache does not hold yet."""
        self._prepare()

    def check_fit(self) -> None:
        """Raise ValueError where a split is too short to train on or to validate; after `prepare_data`."""
        for split in self._splits:
            self.batches(split)

    def setup(self, stage: str | None = None) -> None:
        """Open the encoded texts; at the start of `fit`, write the tokenizer into the run's folder."""
        self._prepare()
        trainer = self.trainer
        if stage == "fit" and trainer is not None:
            self.check_fit()
            write_run_files(trainer, tokenizer=self.tokenizer)

    def stream(self, split: str) -> Tensor:
        """All ids of `split` ("train", "validation" or "test"), (tokens,), mapped from the disk.

        The dtype is the narrowest that holds the vocabulary: take slices with `.to(torch.int64)`.
        """
        corpus, name = self._split(split)
        return corpus.split(name).ids

    def bytes_per_token(self, split: str) -> float:
        """Bytes of UTF-8 text that a token of `split` stands for, on average over the split."""
        if split not in self._bytes_per_token:
            ids = self.stream(split)
            total = sum(self.tokenizer.count_bytes(piece) for piece in ids.split(_COUNT_TOKENS))
            self._bytes_per_token[split] = total / ids.shape[0]
        return self._bytes_per_token[split]

    def train_dataloader(self) -> ResumableLoader:
        batches = self.batches("train")
        return ResumableLoader.training(
            batches.make_training, self.trainer, num_workers=self.num_workers, pin_memory=self.pin_memory
        )

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        # Without a validation split there is nothing to validate on; Lightning skips an empty list.
        self._prepare()
        return self._evaluation("validation") if "validation" in self._splits else []

    def test_dataloader(self) -> ResumableLoader:
        return self._evaluation("test")

    def predict_dataloader(self) -> ResumableLoader:
        """The test split: that of `test_path`, else the validation split."""
        return self._evaluation("test")

    def batches(self, split: str) -> TextBatches:
        """The batches of `split` as pure functions of their index."""
        corpus, name = self._split(split)
        train = split == "train"
        length = self.length if train else self.eval_length
        batch_size = self.batch_size if train else self.eval_batch_size
        batches = TextBatches(corpus, name, length, batch_size, self.layout, run_seed(self.seed))
        self._check_length(split, batches)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The tokenizer, so that a checkpoint alone can be generated from."""
        return {"tokenizer": json.dumps(self.tokenizer.to_config(), ensure_ascii=False)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError when the checkpoint was trained with another tokenizer."""
        saved = json.loads(state_dict["tokenizer"])
        if saved != self.tokenizer.to_config():
            raise ValueError(
                "the checkpoint was trained with another tokenizer than this data module's; "
                "resume with the same text and tokenizer, or start a new run"
            )

    def _evaluation(self, split: str) -> ResumableLoader:
        batches = self.batches(split)
        return ResumableLoader.evaluation(
            batches.make_evaluation,
            batches.n_batches,
            self.trainer,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    def _prepare(self) -> None:
        if self._splits:
            return
        main = self._corpus("path", self.path, self.val_fraction)
        splits = {"train": (main, "train")}
        if self.val_path is not None:
            splits["validation"] = (self._corpus("val_path", self.val_path, 0.0), "train")
        elif self.val_fraction > 0:
            splits["validation"] = (main, "validation")
        if self.test_path is not None:
            splits["test"] = (self._corpus("test_path", self.test_path, 0.0), "train")
        elif "validation" in splits:
            splits["test"] = splits["validation"]
        self._splits = splits

    def _corpus(self, name: str, path: str, val_fraction: float) -> IdCorpus:
        tokenizer = self.tokenizer
        return write_corpus(
            text_files(path, self.suffixes, name),
            tokenizer.encode_ids,
            vocab_size=tokenizer.vocab_size,
            fingerprint=tokenizer.fingerprint(),
            cache_dir=self._cache(),
            val_fraction=val_fraction,
            eos_id=tokenizer.eos_id,
        )

    def _cache(self) -> Path:
        return cache_folder("text", self.cache_dir)

    def _text(self) -> Iterator[str]:
        for name, path in (("path", self.path), ("val_path", self.val_path), ("test_path", self.test_path)):
            if path is not None:
                for file in text_files(path, self.suffixes, name):
                    yield from iter_text(file)

    def _split(self, split: str) -> tuple[IdCorpus, str]:
        self._prepare()
        if split not in ("train", "validation", "test"):
            raise ValueError(f'split is {split!r}, expected "train", "validation" or "test"')
        if split not in self._splits:
            raise ValueError(
                f"there is no {split} split: val_fraction is 0 and neither val_path nor test_path is given"
            )
        return self._splits[split]

    def _check_length(self, split: str, batches: TextBatches) -> None:
        # Evaluation takes a shorter last window; training takes whole ones only.
        least = batches.length + 1 if split == "train" else 2
        if batches.tokens < least:
            raise ValueError(
                f"the {split} split of {self.path!r} holds {batches.tokens} tokens, expected at least {least}"
                + (
                    f" for windows of length {batches.length} and the token behind"
                    if split == "train"
                    else ""
                )
            )
