"""A plain convolutional classifier of waveforms: the baseline beside the state-space ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ssm_modal.errors import ConfigError, StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.inputs import check_waveform
from ssm_modal.models.base import Model, ModelConfig


@dataclass(frozen=True)
class WaveformCNNConfig(ModelConfig):
    """Convolutions of the given kernels and strides, each with batch norm and ReLU, the mean over the time of
    the last and a Linear to n_classes. As M5 of Dai et al., arXiv 1610.00087, with strides in place of its
    max pooling: a wide first kernel, then narrow ones with ever more channels.

    channels, kernels, strides: an entry a convolution; kernels odd. scale: samples are multiplied by it
    first. dropout: on the mean.
    """

    type: ClassVar[str] = "waveform_cnn"
    n_classes: int
    channels: tuple[int, ...] = (48, 64, 96, 128, 192)
    kernels: tuple[int, ...] = (65, 9, 9, 5, 5)
    strides: tuple[int, ...] = (8, 4, 4, 2, 2)
    scale: float = 8.0
    dropout: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "WaveformCNNConfig"
        check_positive(name, n_classes=self.n_classes, scale=self.scale)
        if not len(self.channels) == len(self.kernels) == len(self.strides) >= 1:
            raise ConfigError(
                f"{name}: channels, kernels and strides have {len(self.channels)}, {len(self.kernels)} and "
                f"{len(self.strides)} entries, expected as many of each, and one or more"
            )
        for field in ("channels", "kernels", "strides"):
            for i, value in enumerate(getattr(self, field)):
                check_positive(name, **{f"{field}.{i}": value})
        for i, kernel in enumerate(self.kernels):
            if kernel % 2 == 0:
                raise ConfigError(f"{name}: kernels.{i} is {kernel}, expected an odd number")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{name}: dropout is {self.dropout}, expected 0 or more and below 1")

    def build(self) -> WaveformCNN:
        return WaveformCNN(self)


class WaveformCNN(Model):
    """waveform (batch, length) of a floating dtype, or (1, total) packed, to logits (rows, n_classes).

    Packed recordings give what they give one by one: each is padded with zeros at either end, and neither a
    norm nor the mean counts what lies behind its end. It needs whole recordings and has no state.
    """

    config: WaveformCNNConfig

    def __init__(self, config: WaveformCNNConfig) -> None:
        super().__init__()
        self.config = config
        inputs = (1, *config.channels[:-1])
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, kernel, stride, kernel // 2, bias=False)
            for a, b, kernel, stride in zip(inputs, config.channels, config.kernels, config.strides)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(channels) for channels in config.channels)
        self.dropout = nn.Dropout(config.dropout)
        self.proj = nn.Linear(config.channels[-1], config.n_classes)

    def forward(
        self, x: Tensor, state: None = None, *, seqs: Sequences | Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Returns (logits (batch or sequences, n_classes), None). seqs: `Sequences` or cu_seqlens
        (sequences + 1,); x is then (1, total). A recording without a sample has the logits of zeros.

        Raises TypeError or ValueError for a waveform of another dtype or shape, StateError for a state.
        """
        check_waveform("WaveformCNN", x)
        if state is not None:
            raise StateError("WaveformCNN: was given a state, but it needs whole recordings and has none")
        if seqs is not None:
            seqs = Sequences.from_cu_seqlens(seqs, x.shape[1], x.device)
            if x.shape[0] != 1:
                raise ValueError(f"WaveformCNN: x has batch {x.shape[0]}, expected 1 with seqs")
            sizes = list(seqs.lengths)
            x = pad_sequence(x[0].split(sizes), batch_first=True) if sizes else x.new_zeros(0, 0)
        else:
            sizes = [x.shape[1]] * x.shape[0]
        lengths = torch.tensor(sizes, dtype=torch.int64).to(x.device)
        rows = len(sizes)
        if rows == 0 or x.shape[1] == 0:
            return self.proj(self.dropout(self.proj.weight.new_zeros(rows, self.proj.in_features))), None
        hidden = (x.to(self.proj.weight.dtype) * self.config.scale).unsqueeze(1)
        for conv, norm in zip(self.convs, self.norms):
            hidden = conv(hidden)
            lengths = (lengths + conv.stride[0] - 1) // conv.stride[0]  # type: ignore[operator, index]
            inside = torch.arange(hidden.shape[2], device=x.device) < lengths[:, None]
            # Only steps inside a recording are normed, and those outside are the zeros of the next padding.
            normed = F.relu(norm(hidden.transpose(1, 2)[inside]))
            hidden = torch.zeros_like(hidden.transpose(1, 2)).masked_scatter(inside[..., None], normed)
            hidden = hidden.transpose(1, 2)
        pooled = hidden.sum(2) / lengths.clamp(min=1)[:, None]
        return self.proj(self.dropout(pooled)), None
