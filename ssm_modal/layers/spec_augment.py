"""SpecAugment on packed spectrograms: in training, bands and stretches of time are covered by the mean.

Park et al., "SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition",
arXiv 1904.08779, sections 2 and 3, without time warping. torchaudio's masks draw one place for a padded
batch; here each of the sequences that stand end to end has places and widths of its own, which fit its
length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssm_modal.errors import ConfigError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import Config


@dataclass(frozen=True)
class SpecAugmentConfig(Config):
    """`frequency_masks` masks of up to `frequency_width` neighbouring filters and `time_masks` masks of up to
    `time_width` neighbouring steps, a sequence. Widths are drawn uniformly from 0 to the greatest, both
    included, places uniformly among those that fit. time_share: no mask of time is longer than that part of
    its sequence.

    What is masked has, filter by filter, the mean of its sequence.
    """

    frequency_masks: int = 2
    frequency_width: int = 6
    time_masks: int = 2
    time_width: int = 10
    time_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("frequency_masks", "frequency_width", "time_masks", "time_width"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigError(f"SpecAugmentConfig: {name} is {value}, expected 0 or more")
        if not 0 <= self.time_share <= 1:
            raise ConfigError(f"SpecAugmentConfig: time_share is {self.time_share}, expected 0 to 1")


def spec_augment(config: SpecAugmentConfig, energy: Tensor, rows: Sequences) -> Tensor:
    """energy: (total, n_filters), log energies of sequences end to end; the same with masks drawn anew."""
    count = rows.cu_seqlens.diff().clamp(min=1)[:, None]
    mean = (sequence_sums(energy, rows) / count)[rows.seq_index()]
    return torch.where(spec_masks(config, rows, energy.shape[-1]), mean, energy)


def spec_masks(config: SpecAugmentConfig, rows: Sequences, n_filters: int) -> Tensor:
    """Which values are masked, (total, n_filters) bool, drawn by torch's generator of their device."""
    lengths, index = rows.cu_seqlens.diff(), rows.seq_index()
    share = (lengths * config.time_share).floor().to(torch.int64)
    time = _spans(lengths, share.clamp(max=config.time_width), config.time_masks)
    filters = torch.full_like(lengths, n_filters)
    frequency = _spans(filters, filters.clamp(max=config.frequency_width), config.frequency_masks)
    every = torch.arange(n_filters, device=lengths.device)
    in_time = _inside(rows.positions()[:, None], *(edge[index] for edge in time))
    in_frequency = _inside(every[None, :, None], *(edge[:, None] for edge in frequency))
    return in_time[:, None] | in_frequency[index]


def sequence_sums(values: Tensor, rows: Sequences) -> Tensor:
    """The sum of each of the sequences end to end in `values` (total, channels), (sequences, channels)."""
    # A reduction a sequence: in the same order every time, which atomic adds on a GPU are not.
    return torch.stack([piece.sum(0) for piece in values.split(list(rows.lengths))])


def _spans(lengths: Tensor, widest: Tensor, masks: int) -> tuple[Tensor, Tensor]:
    """First and one past the last place of each mask, (sequences, masks) int64 each."""
    draws = torch.rand(2, lengths.shape[0], masks, device=lengths.device)
    # The product may round up to the bound, which the draw itself never reaches.
    width = torch.minimum((draws[0] * (widest + 1)[:, None]).to(torch.int64), widest[:, None])
    room = lengths[:, None] - width
    first = torch.minimum((draws[1] * (room + 1)).to(torch.int64), room)
    return first, first + width


def _inside(places: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """Whether a place stands in any of the masks, which are the last axis."""
    return ((places >= first) & (places < end)).any(-1)
