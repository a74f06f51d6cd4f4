"""Genomes for language modelling: windows of FASTA or GenBank files, causal or masked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from ssm_modal.datamodules.dna_batches import DNABatches, Objective
from ssm_modal.datamodules.dna_plan import Stage, Stretch, split_genome, training_stages
from ssm_modal.datamodules.left_out import warn_left_out
from ssm_modal.datamodules.resumable import ResumableLoader, check_same, run_seed
from ssm_modal.datamodules.run_files import write_run_files
from ssm_modal.io.cache import cache_folder
from ssm_modal.io.genome import GENOME_SUFFIXES, Genome, open_genome
from ssm_modal.io.nucleotides import GenomeError
from ssm_modal.io.recordings import LeftOut
from ssm_modal.io.text import text_files
from ssm_modal.tokenizers import build_tokenizer
from ssm_modal.tokenizers.dna import DNATokenizer

SPLITS = ("train", "validation", "test")


def build_dna_tokenizer(spec: str | dict[str, Any] | DNATokenizer) -> DNATokenizer:
    """The tokenizer of DNA that `spec` means; ValueError where it is one of text."""
    tokenizer = build_tokenizer(spec)
    if not isinstance(tokenizer, DNATokenizer):
        raise ValueError(
            f'tokenizer is {spec!r}, one of text; expected "nucleotide" or the config of a k-mer one'
        )
    return tokenizer


class DNADataModule(pl.LightningDataModule):
    """Batches of `ids` and `labels` (batch_size, length) from genomes; see `DNABatches` for what a batch
    holds.

    The bases are written once to `cache_dir`, below a name made of the files' content, and mapped from there,
    so that a window costs no parsing and workers share the memory. Every batch is a pure function of (seed,
    split, index, process). Records shorter than a training window are not trained on (`short_records`); the
    last window of a stretch is shorter in validation and test.

    A run writes its tokenizer beside its checkpoints (`tokenizer.json` in `trainer.default_root_dir`), where
    `ssm-modal generate` finds it.

    Args:
        path: a FASTA or GenBank file (plain, gzip or bgzip), or a folder, read recursively in sorted order.
            `~` and environment variables (`$NAME`, `${NAME}`) are filled in, in every path.
        tokenizer: "nucleotide", a config as `to_config` gives, such as `{ssm_modal_tokenizer: kmer, k: 6,
            overlapping: true}`, or the path of a tokenizer.json that holds one.
        objective: "causal" (next token) or "masked".
        length: tokens a training window.
        batch_size: training windows a batch of each process.
        length_schedule: a warm-up of the length: tokens a window to the training batch it begins with, e.g.
            `{1024: 0, 8192: 500, 65536: 1000}`, rising, the first at 0 and the last length `length`. Each
            batch holds length * batch_size tokens, in as many windows as that makes, so each length must
            divide it. Empty: `length` throughout. Where the run stands is in every checkpoint, so that it
            goes on in the same stage.
        eval_length: tokens a validation or test window; None: `length`.
        eval_batch_size: windows a validation or test batch; None: `batch_size`.
        val_fraction: the last part of each file's longest record that is kept for validation.
        val_gap: bases before it that are in no split; None: the bases of the longest window; fewer are an
            error.
        left_out_files: names of files, or patterns of names (`*`, `?`), that are in no split.
        test_files: the same for files whose records are the test split and in no other; empty: the test split
            is the validation split.
        reverse_complement: in training, read one strand or the other, with equal chance.
        mask_rate: part of the tokens that objective "masked" chooses, 80 % of them masked, 10 % drawn, 10 %
            kept.
        suffixes: endings of the files read below a folder.
        skip_bad: leave bad records and files out instead of raising, warn, and list them with the reason in
            `left_out` and, at the start of `fit`, in `left_out.csv` in the run's folder.
        num_workers: processes that prepare batches; the batches are the same with any number.
        pin_memory: copy batches to pinned memory, for training on a GPU.
        seed: places, strands and masks; None: the run's seed (`--seed_everything`).
        cache_dir: where the bases are kept; None: below `$SSM_MODAL_CACHE`, see `cache_folder`.

    Raises FileNotFoundError and GenomeError as `open_genome`, naming file and record, GenomeError for windows
    longer than every stretch, and ValueError for any other bad argument.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | dict[str, Any] = "nucleotide",
        objective: Objective = "causal",
        length: int = 1024,
        batch_size: int = 16,
        length_schedule: dict[int, int] | None = None,
        eval_length: int | None = None,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.2,
        val_gap: int | None = None,
        left_out_files: Sequence[str] = (),
        test_files: Sequence[str] = (),
        reverse_complement: bool = False,
        mask_rate: float = 0.15,
        suffixes: Sequence[str] = GENOME_SUFFIXES,
        skip_bad: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if objective not in ("causal", "masked"):
            raise ValueError(f'objective is {objective!r}, expected "causal" or "masked"')
        sizes = {"length": length, "batch_size": batch_size}
        optional = {"eval_length": eval_length, "eval_batch_size": eval_batch_size}
        for name, number in {**sizes, **{k: v for k, v in optional.items() if v is not None}}.items():
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name} is {number!r}, expected a whole number of 1 or more")
        if not 0.0 <= val_fraction < 1.0:
            raise ValueError(f"val_fraction is {val_fraction}, expected at least 0 and less than 1")
        if not 0.0 < mask_rate < 1.0:
            raise ValueError(f"mask_rate is {mask_rate}, expected more than 0 and less than 1")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}, expected 0 or more")
        self.path = path
        self.tokenizer = build_dna_tokenizer(tokenizer)
        self.objective: Objective = objective
        self.length, self.batch_size = length, batch_size
        self.stages = training_stages(length, batch_size, length_schedule or {})
        self.eval_length, self.eval_batch_size = eval_length or length, eval_batch_size or batch_size
        self.val_fraction = val_fraction
        more = 1 if objective == "causal" else 0
        window = max(self.tokenizer.bases_for(n + more) for n in (self.length, self.eval_length))
        if val_gap is not None and val_gap < window:
            raise ValueError(
                f"val_gap is {val_gap}, expected at least {window}, the bases of the longest window"
            )
        self.val_gap = window if val_gap is None else val_gap
        self.left_out_files, self.test_files = tuple(left_out_files), tuple(test_files)
        for name, given in (("left_out_files", left_out_files), ("test_files", test_files)):
            if isinstance(given, str):
                raise TypeError(f"{name} is the string {given!r}, expected a list of names of files")
        self.reverse_complement, self.mask_rate = reverse_complement, mask_rate
        self.suffixes, self.skip_bad, self.cache_dir = tuple(suffixes), skip_bad, cache_dir
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
        self._genome: Genome | None = None
        self._stretches: dict[str, list[Stretch]] = {}

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def bases_per_token(self) -> int:
        """Bases by which the text grows with each token."""
        return self.tokenizer.step

    @property
    def genome(self) -> Genome:
        """The records of all files; parses what the cache does not hold yet."""
        if self._genome is None:
            files = text_files(self.path, self.suffixes)
            folder = cache_folder("genomes", self.cache_dir)
            self._genome = open_genome(files, folder, skip_bad=self.skip_bad)
            warn_left_out(self._genome.left_out, "records or files")
        return self._genome

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """With `skip_bad`, what was left out and why."""
        return self.genome.left_out

    @property
    def short_records(self) -> tuple[str, ...]:
        """Names of the records that hold no training window in the part of them that may be trained on."""
        need = self.batches("train").places.need
        return tuple(self.genome.records[s.record].name for s in self.stretches("train") if s.bases < need)

    def stretches(self, split: str) -> list[Stretch]:
        """The bases of `split` ("train", "validation" or "test"), see `split_genome`."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        if not self._stretches:
            self._stretches = split_genome(
                self.genome, self.val_fraction, self.val_gap, self.left_out_files, self.test_files
            )
        return self._stretches[split]

    def prepare_data(self) -> None:
        """Parse what the cache does not hold yet."""
        self.genome  # noqa: B018

    def setup(self, stage: str | None = None) -> None:
        """Map the bases; at the start of `fit`, write down the tokenizer and what was left out."""
        self.stretches("train")
        trainer = self.trainer
        if stage != "fit" or trainer is None:
            return
        self.batches("train")
        write_run_files(trainer, tokenizer=self.tokenizer, left_out=self.left_out if self.skip_bad else None)

    def batches(self, split: str) -> DNABatches:
        """The batches of `split` as pure functions of their index."""
        train = split == "train"
        batches = self._batches(
            split,
            self.length if train else self.eval_length,
            self.batch_size if train else self.eval_batch_size,
            self.stages if train else (),
        )
        if (batches.places.count if train else batches.n_windows) == 0:
            longest = max((s.bases for s in batches.stretches), default=0)
            raise GenomeError(
                self.path,
                f"the {split} split holds no window: its longest stretch has {longest} bases"
                + (f", a window of {self.length} tokens takes {batches.places.need}" if train else ""),
            )
        return batches

    def window_batches(self, split: str, length: int, batch_size: int) -> DNABatches:
        """Batches over `split` with windows of another `length` than the module's, for evaluation."""
        return self._batches(split, length, batch_size, ())

    def record_names(self) -> list[tuple[str, str]]:
        """The file and the name of each record, by its number."""
        files = self.genome.files
        return [(files[record.file].name, record.name) for record in self.genome.records]

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader.training(
            self.batches("train").make_training,
            self.trainer,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        # Without a validation split there is nothing to validate on; Lightning skips an empty list.
        return self._evaluation("validation") if self.stretches("validation") else []

    def test_dataloader(self) -> ResumableLoader:
        return self._evaluation("test")

    def predict_dataloader(self) -> ResumableLoader:
        return self._evaluation("test")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint's user must know: the tokenizer and the objective."""
        return {"tokenizer": json.dumps(self.tokenizer.to_config()), "objective": self.objective}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError when the checkpoint was trained with another tokenizer or objective."""
        check_same(state_dict, self.state_dict(), self.trainer)

    def _batches(self, split: str, length: int, batch_size: int, stages: Sequence[Stage]) -> DNABatches:
        return DNABatches(
            self.genome,
            self.stretches(split),
            self.tokenizer,
            length,
            batch_size,
            self.objective,
            self.reverse_complement,
            self.mask_rate,
            run_seed(self.seed),
            stages,
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
