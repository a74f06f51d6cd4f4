"""Batches of audio: recordings packed end to end, or windows of their ids for waveform modelling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from ssm_modal.datamodules.audio_augment import Augmentation
from ssm_modal.datamodules.batch_plan import BatchPlan, Parts, PlannedBatches
from ssm_modal.datamodules.resumable import derived_generator
from ssm_modal.io.recordings import Clip
from ssm_modal.tokenizers.waveform import MuLawTokenizer

IGNORE = -100
Layout = Literal["recordings", "windows"]
Input = Literal["waveform", "mu_law"]


@dataclass
class AudioBatches(PlannedBatches):
    """Batches of one split, each a pure function of its index: `make(index, rank, world)`.

    Layout "recordings": whole recordings end to end, n of them with `total` samples together:

        waveform (1, total) float32, or ids (1, total) int64 with input "mu_law"
        cu_seqlens (n + 1,) int64: where each begins, and the end
        labels (n,) int64: the class, -100 where there is none
        recordings (n,) int64: the place of each in `clips`

    Layout "windows", a recording of s samples being s + 2 ids with begin_id before and end_id behind them, so
    that s + 1 ids are predicted, the first sample and the end among them; a window has up to `plan.window`.
    With a `tokenizer` that has classes the begin id is that of the recording's class:

        ids, labels (1, total) int64: labels[0, t] is the id after ids[0, t]
        cu_seqlens (n + 1,), recordings (n,) int64: as above
        classes (n,) int64: the class of each window's recording, -100 where there is none
        starts (n,) int64: the place of each window's first id in its recording, 0 where it is begin_id

    clips: the recordings. keep_every: of what is read every so-manieth sample is kept, without a filter, from
    the first on. classes: names of the classes, in the order of their numbers. augment: applied in
    training alone, drawn anew for each recording or window and epoch. tokenizer: makes the ids.
    """

    clips: Sequence[Clip]
    plan: BatchPlan
    classes: Sequence[str]
    layout: Layout = "recordings"
    input: Input = "waveform"
    augment: Augmentation | None = None
    keep_every: int = 1
    tokenizer: MuLawTokenizer = field(default_factory=MuLawTokenizer)

    def _batch(self, parts: Parts, epoch: int | None) -> dict[str, Tensor]:
        rows = list(zip(parts.recording.tolist(), parts.first.tolist(), parts.last.tolist()))
        number = {name: i for i, name in enumerate(self.classes)}
        known = [number.get(self.clips[r].recording.label or "", IGNORE) for r, _, _ in rows]
        numbers = parts.recording.clone()
        classes = torch.tensor(known, dtype=torch.int64)
        if self.layout == "recordings":
            each = [self._wave(r, 0, self.clips[r].frames, epoch) for r, _, _ in rows]
            waves = torch.cat(each)[None]
            made = {"ids": self.tokenizer.encode(waves)} if self.input == "mu_law" else {"waveform": waves}
            return {**made, "cu_seqlens": _borders(each), "recordings": numbers, "labels": classes}
        streams = [self._stream(r, first, last, epoch) for r, first, last in rows]
        inputs = [s[:-1] for s in streams]
        return {
            "ids": torch.cat(inputs)[None],
            "labels": torch.cat([s[1:] for s in streams])[None],
            "cu_seqlens": _borders(inputs),
            "recordings": numbers,
            "classes": classes,
            "starts": parts.first.clone(),
        }

    def _stream(self, row: int, first: int, last: int, epoch: int | None) -> Tensor:
        """Ids [first, last] of recording `row`: its begin id is id 0, sample t id t + 1, end_id the last."""
        tokenizer, frames = self.tokenizer, self.clips[row].frames
        label = self.clips[row].recording.label if tokenizer.classes else None
        begin, end = max(first - 1, 0), min(last, frames)
        pieces = [torch.tensor([tokenizer.begin_id_of(label)])] if first == 0 else []
        if end > begin:
            pieces.append(tokenizer.encode(self._wave(row, begin, end, epoch)))
        if last == frames + 1:
            pieces.append(torch.tensor([tokenizer.end_id]))
        return torch.cat(pieces)

    def _wave(self, row: int, first: int, last: int, epoch: int | None) -> Tensor:
        clip = self.clips[row]
        wave = clip.read(first, last - first)[:: self.keep_every]
        if self.augment is None or epoch is None:
            return wave
        generator = derived_generator(self.plan.seed, "audio", "augment", epoch, row, first)
        return self.augment(wave, clip.reading.sample_rate // self.keep_every, generator)


def _borders(parts: Sequence[Tensor]) -> Tensor:
    """Where each of `parts` begins when they lie end to end, and the end: (n + 1,) int64."""
    return torch.tensor([0, *accumulate(part.shape[0] for part in parts)], dtype=torch.int64)
