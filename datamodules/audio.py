"""Audio for classification and waveform modelling, from a folder, a manifest or a published set."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ssm_modal.datamodules.audio_augment import Augmentation
from ssm_modal.datamodules.audio_batches import AudioBatches, Input, Layout
from ssm_modal.datamodules.batch_plan import BatchPlan
from ssm_modal.datamodules.left_out import warn_left_out
from ssm_modal.datamodules.resumable import ResumableLoader, check_same, run_seed
from ssm_modal.datamodules.run_files import write_run_files
from ssm_modal.io.audio import AUDIO_SUFFIXES
from ssm_modal.io.manifests import read_manifest
from ssm_modal.io.recordings import (
    SPLITS,
    Clip,
    Found,
    LeftOut,
    Reading,
    assign_splits,
    find_recordings,
    open_recordings,
)
from ssm_modal.io.speech_presets import free_spoken_digits, speech_commands
from ssm_modal.plots import draw_waveform, draw_waveform_relevance
from ssm_modal.tokenizers.waveform import MuLawTokenizer

Source = Literal["folder", "pattern", "manifest", "unlabelled", "free_spoken_digits", "speech_commands"]
_SOURCES = ("folder", "pattern", "manifest", "unlabelled", "free_spoken_digits", "speech_commands")
# Where the presets stand below SSM_MODAL_DATA.
_PRESETS = {
    "free_spoken_digits": "audio/fsdd/recordings",
    "speech_commands": "audio/speech_commands",
}


class AudioDataModule(pl.LightningDataModule):
    """Batches of recordings, or of windows of them, from a folder, a manifest or a published set.

    Recordings are packed end to end, never padded; batches are cut by a budget of samples. See `AudioBatches`
    for what a batch holds. Every batch is a pure function of (seed, split, index, process).

    Args:
        path: the folder of the recordings, or the manifest. `~` and environment variables (`$NAME`,
            `${NAME}`) are filled in. None: where a preset stands below `$SSM_MODAL_DATA`
            (`audio/fsdd/recordings`, `audio/speech_commands`).
        source: "folder" (label: the folder a file stands in), "pattern" (label: a group of `pattern` in the
            file's name), "manifest" (a CSV file, see `read_manifest`), "unlabelled" (any files; for layout
            "windows"), or a preset with its official split, "free_spoken_digits" or "speech_commands".
        pattern: the regular expression of source "pattern".
        root: what a manifest's paths are relative to; None: the manifest's folder.
        words, unknown: of source "speech_commands", see `speech_commands`.
        left_out_speaker, validation_speaker: of source "free_spoken_digits": who is tested on instead of the
            official split, and who is validated on then instead of a part of the others' recordings.
        sample_rate: frames a second the model takes. A file of another rate is an error, unless `resample`.
        resample: resample files of another rate.
        keep_every: of what is read at `sample_rate` every so-manieth sample is kept, without a filter against
            aliasing: batches then have `sample_rate / keep_every` samples a second. For layout "recordings".
        mono: average channels; otherwise a file with more than one is an error.
        layout: "recordings" for classification, "windows" for waveform modelling.
        input: "waveform" (float32) or "mu_law" (ids); layout "windows" needs ids.
        batch_samples: samples a training batch of each process holds at most; a recording or window that is
            longer is a batch of its own.
        eval_batch_samples: the same for validation and test; None: `batch_samples`.
        window: ids predicted in one window at most; None: whole recordings. For layout "windows".
        condition: "label": each recording begins with the id of its class, so that the model can be asked for
            one; "none": with one id for all. For layout "windows".
        augment: see `Augmentation`; training alone. Layout "windows" takes no shift, padding or speed.
        val_fraction, test_fraction: parts of the recordings of each label, for those whose split nothing else
            decides, see `assign_splits`.
        suffixes: endings of the files read below a folder; of sources "folder", "pattern" and "unlabelled".
        refuse_silent: a recording whose samples are all 0 is bad.
        check_samples: decode every recording once before the run starts, so that a bad one is found then.
        skip_bad: leave bad recordings out instead of raising, warn, and list them with the reason in
            `left_out` and, at the start of `fit`, in `left_out.csv` in the run's folder.
        predict: what `ssm-modal predict` goes through: the "test" split, or "all" recordings in the order
            in which they are found, for a folder to be classified; its source may then be "unlabelled", and
            it need not have every class.
        num_workers: processes that prepare batches; the batches are the same with any number.
        pin_memory: copy batches to pinned memory, for training on a GPU.
        seed: order, windows and augmentation; None: the run's seed (`--seed_everything`).

    Raises FileNotFoundError, AudioError and ManifestError as the readers do, naming the file, and ValueError
    for any other bad argument.
    """

    def __init__(
        self,
        path: str | None = None,
        source: Source = "folder",
        pattern: str | None = None,
        root: str | None = None,
        words: int = 35,
        unknown: bool = False,
        left_out_speaker: str | None = None,
        validation_speaker: str | None = None,
        sample_rate: int = 16000,
        resample: bool = False,
        keep_every: int = 1,
        mono: bool = False,
        layout: Layout = "recordings",
        input: Input = "waveform",
        batch_samples: int = 1 << 18,
        eval_batch_samples: int | None = None,
        window: int | None = None,
        condition: Literal["none", "label"] = "none",
        augment: Augmentation | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        suffixes: Sequence[str] = AUDIO_SUFFIXES,
        refuse_silent: bool = True,
        check_samples: bool = True,
        skip_bad: bool = False,
        predict: Literal["test", "all"] = "test",
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("source", source, _SOURCES),
            ("layout", layout, ("recordings", "windows")),
            ("input", input, ("waveform", "mu_law")),
            ("condition", condition, ("none", "label")),
            ("predict", predict, ("test", "all")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
        sizes = {"sample_rate": sample_rate, "batch_samples": batch_samples, "keep_every": keep_every}
        optional = {"eval_batch_samples": eval_batch_samples, "window": window}
        for name, number in {**sizes, **{k: v for k, v in optional.items() if v is not None}}.items():
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name} is {number!r}, expected a whole number of 1 or more")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}, expected 0 or more")
        if layout == "windows" and input != "mu_law":
            raise ValueError(
                f'input is {input!r} with layout "windows", expected "mu_law": ids are predicted'
            )
        if layout == "windows" and augment is not None and not augment.keeps_place:
            raise ValueError(
                'augment moves samples with layout "windows", expected no shift, padding or speed'
            )
        if layout == "windows" and keep_every != 1:
            raise ValueError(f'keep_every is {keep_every} with layout "windows", expected 1')
        if sample_rate % keep_every:
            raise ValueError(f"keep_every is {keep_every}, expected a divisor of sample_rate, {sample_rate}")
        if layout == "recordings" and window is not None:
            raise ValueError(f'window is {window} with layout "recordings", expected None: they stay whole')
        if layout == "recordings" and condition != "none":
            raise ValueError(f'condition is {condition!r} with layout "recordings", expected "none"')
        if condition == "label" and source == "unlabelled":
            raise ValueError('condition is "label" with source "unlabelled", expected a source with labels')
        if layout == "recordings" and source == "unlabelled" and predict != "all":
            raise ValueError(
                'source is "unlabelled" with layout "recordings", expected one with labels, or predict "all"'
            )
        for name, given, needed in (
            ("pattern", pattern is not None, "pattern"),
            ("root", root is not None, "manifest"),
            ("left_out_speaker", left_out_speaker is not None, "free_spoken_digits"),
            ("validation_speaker", validation_speaker is not None, "free_spoken_digits"),
            ("words", words != 35, "speech_commands"),
            ("unknown", unknown, "speech_commands"),
        ):
            if given and source != needed:
                raise ValueError(f"{name} is given with source {source!r}, expected it for {needed!r} alone")
        if source == "pattern" and pattern is None:
            raise ValueError(
                'pattern is None with source "pattern", expected a regular expression with the group "label"'
            )
        if tuple(suffixes) != AUDIO_SUFFIXES and source in ("manifest", *_PRESETS):
            raise ValueError(
                f"suffixes is given with source {source!r}, expected it for a folder of any files alone"
            )
        if path is None and source not in _PRESETS:
            raise ValueError(f"path is None with source {source!r}, expected a folder or a manifest")
        self.path = path if path is not None else f"$SSM_MODAL_DATA/{_PRESETS[source]}"
        self.source: Source = source
        self.pattern, self.root, self.suffixes = pattern, root, tuple(suffixes)
        self.words, self.unknown = words, unknown
        self.left_out_speaker, self.validation_speaker = left_out_speaker, validation_speaker
        self.keep_every = keep_every
        self.reading = Reading(sample_rate, resample, mono, refuse_silent)
        self.layout: Layout = layout
        self.input: Input = input
        self.batch_samples = batch_samples
        self.eval_batch_samples = eval_batch_samples or batch_samples
        self.window, self.augment = window, augment
        self.condition = condition
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.check_samples, self.skip_bad = check_samples, skip_bad
        self.predict = predict
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
        self._every: list[Clip] = []  # in the order in which they were found
        self._clips: dict[str, list[Clip]] | None = None
        self._classes: tuple[str, ...] = ()
        self._left_out: list[LeftOut] = []

    @property
    def sample_rate(self) -> int:
        """Frames a second of what the batches hold."""
        return self.reading.sample_rate // self.keep_every

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels of all recordings, sorted: a class's number is its place here."""
        self._prepare()
        return self._classes

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """With `skip_bad`, what was left out and why."""
        self._prepare()
        return tuple(self._left_out)

    @property
    def vocab_size(self) -> int:
        """Ids are below it: 256 levels, begin and end, the classes' begin ids. For input "mu_law"."""
        if self.input != "mu_law":
            raise ValueError('input is "waveform", which has no vocabulary, expected "mu_law"')
        return self.tokenizer.vocab_size

    @property
    def tokenizer(self) -> MuLawTokenizer:
        """What makes the ids; with condition "label" it knows the classes."""
        return MuLawTokenizer(self.classes if self.condition == "label" else (), self.sample_rate)

    @property
    def sample_levels(self) -> int | None:
        """Where ids are predicted: the ids below it stand for samples. None in layout "recordings"."""
        return MuLawTokenizer.levels if self.layout == "windows" else None

    def clips(self, split: str) -> list[Clip]:
        """The recordings of `split` ("train", "validation" or "test"), in order."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        return self._prepare()[split]

    def predicted_files(self) -> list[str]:
        """The files of what is predicted, in order: what the numbers in a batch's `recordings` stand for."""
        return [os.fspath(clip.recording.path) for clip in self._predicted()]

    def draw_example(self, panel: Any, split: str, number: int) -> None:
        """Draw recording `number` of "validation", "test" or "predict" into the matplotlib subfigure `panel`:
        its waveform and its spectrogram."""
        draw_waveform(panel, self._example(split, number), self.sample_rate)

    def example_input(self, split: str, number: int) -> Tensor:
        """What the model reads of that recording, (1, length): its samples, or their ids."""
        wave = self._example(split, number)
        return (wave if self.input == "waveform" else MuLawTokenizer().encode(wave)).unsqueeze(0)

    def draw_relevance(self, panel: Any, split: str, number: int, relevance: Tensor) -> None:
        """As `draw_example`, with the `relevance` of each sample (length,)."""
        wave = self._example(split, number)
        draw_waveform_relevance(panel, wave, relevance, self.sample_rate)

    def _example(self, split: str, number: int) -> Tensor:
        clips = self._predicted() if split == "predict" else self.clips(split)
        return clips[number].read()[:: self.keep_every]

    def _predicted(self) -> list[Clip]:
        splits = self._prepare()
        return splits["test"] if self.predict == "test" else self._every

    def setup(self, stage: str | None = None) -> None:
        """Find and check the recordings; at the start of `fit`, write down the tokenizer of layout "windows",
        where `ssm-modal generate` finds it, and what was left out."""
        clips = self._prepare()
        trainer = self.trainer
        if stage in ("fit", "test") and not clips["test"]:
            rank_zero_warn(
                f"the test split of {self.path!r} holds no recording, so nothing is tested: give it one or "
                "more, or a larger test_fraction"
            )
        if stage != "fit" or trainer is None:
            return
        write_run_files(
            trainer,
            tokenizer=self.tokenizer if self.layout == "windows" else None,
            left_out=self._left_out if self.skip_bad else None,
        )

    def check_fit(self) -> None:
        """Raise ValueError where training lacks recordings, or a class."""
        self.batches("train")

    def batches(self, split: str) -> AudioBatches:
        """The batches of `split` as pure functions of their index; ValueError where it has no recording."""
        return self._batches(self.clips(split), split)

    def _batches(self, clips: list[Clip], split: str) -> AudioBatches:
        if not clips:
            raise ValueError(
                f"the {split} split of {self.path!r} holds no recording, expected one or more"
                + (f" ({len(self._left_out)} were left out as bad)" if self._left_out else "")
            )
        train = split == "train"
        if train and self.layout == "recordings" and not self._classes:
            raise ValueError(f"no recording of {self.path!r} has a label, expected labels to train by")
        lacking = set(self._classes) - {clip.recording.label for clip in clips}
        if train and self.layout == "recordings" and lacking:
            raise ValueError(
                f"the train split of {self.path!r} holds no recording of {', '.join(sorted(lacking))}, "
                "expected one or more of each class"
            )
        extra = 1 if self.layout == "windows" else 0  # the end is predicted too
        plan = BatchPlan(
            torch.tensor([-(-clip.frames // self.keep_every) + extra for clip in clips]),
            self.batch_samples if train else self.eval_batch_samples,
            self.window,
            run_seed(self.seed),
        )
        return AudioBatches(
            clips,
            plan,
            self._classes,
            self.layout,
            self.input,
            self.augment,
            tokenizer=self.tokenizer,
            keep_every=self.keep_every,
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
        return self._evaluation("validation") if self.clips("validation") else []

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        # A few recordings need not lose a training over a test: `setup` has said that there is none.
        return self._evaluation("test") if self.clips("test") else []

    def predict_dataloader(self) -> ResumableLoader:
        return self._loader(self._batches(self._predicted(), "test"))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint's user must know: the classes, the sample rate and the kind of input; in layout
        "windows" also the tokenizer, so that a checkpoint alone can be generated from."""
        state = {"classes": list(self.classes), "sample_rate": self.sample_rate, "input": self.input}
        if self.layout == "windows":
            state["tokenizer"] = json.dumps(self.tokenizer.to_config(), ensure_ascii=False)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError when the checkpoint was trained on other classes, or another rate or input.

        Outside training these recordings need not have every class: their numbers are the checkpoint's. Their
        rate is another where the task has a `time_step_scale`, by that factor.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        if not fitting and set(self.classes) <= set(state_dict["classes"]):
            self._classes = tuple(state_dict["classes"])
        mine = self.state_dict()
        if self.trainer is not None and not fitting:
            scale = getattr(self.trainer.lightning_module, "time_step_scale", 1.0)
            if scale != 1.0:
                mine["sample_rate"] *= scale
        check_same(state_dict, mine, self.trainer)

    def _evaluation(self, split: str) -> ResumableLoader:
        return self._loader(self.batches(split))

    def _loader(self, batches: AudioBatches) -> ResumableLoader:
        return ResumableLoader.evaluation(
            batches.make_evaluation,
            batches.n_batches,
            self.trainer,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    def _find(self) -> Found:
        skip = self.skip_bad
        if self.source == "free_spoken_digits":
            return free_spoken_digits(
                self.path, self.left_out_speaker, self.validation_speaker, skip_bad=skip
            )
        if self.source == "speech_commands":
            return speech_commands(self.path, self.words, unknown=self.unknown, skip_bad=skip)
        if self.source == "manifest":
            return read_manifest(self.path, self.root, labelled=self.layout == "recordings", skip_bad=skip)
        labels: Any = "none" if self.source == "unlabelled" else self.source
        return find_recordings(self.path, labels, pattern=self.pattern, suffixes=self.suffixes, skip_bad=skip)

    def _prepare(self) -> dict[str, list[Clip]]:
        if self._clips is not None:
            return self._clips
        found = self._find()
        recordings = assign_splits(found.recordings, self.val_fraction, self.test_fraction)
        clips, bad = open_recordings(
            recordings, self.reading, decode=self.check_samples, skip_bad=self.skip_bad
        )
        self._left_out = [*found.left_out, *bad]
        warn_left_out(self._left_out, "recordings")
        unlabelled = [c.recording.path for c in clips if c.recording.label is None]
        if self.condition == "label" and unlabelled:
            raise ValueError(f'condition is "label", but {unlabelled[0]} has no label, expected one')
        self._classes = tuple(sorted({c.recording.label for c in clips if c.recording.label is not None}))
        self._every = clips
        self._clips = {name: [c for c in clips if c.recording.split == name] for name in SPLITS}
        return self._clips
