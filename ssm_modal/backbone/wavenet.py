"""WaveNet: gated dilated causal convolutions with residual and skip connections, the baseline for waveforms.

van den Oord et al., "WaveNet: A Generative Model for Raw Audio", arXiv 1609.03499, sections 2.1 to 2.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssm_modal.backbone.base import BackboneBase, BackboneBaseConfig
from ssm_modal.errors import ConfigError, StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.dilated import DilatedCausalConv
from ssm_modal.layers.mixer import check_input, check_state
from ssm_modal.state import State


@dataclass(frozen=True)
class WaveNetConfig(BackboneBaseConfig):
    """d_model residual channels. n_layers layers, layer i with dilation 2^(i % dilation_cycle), so that 20
    layers in cycles of 10 see 2,046 steps back with kernel 2. kernel: taps of each convolution. d_skip:
    channels of the skip connections, None: d_model. dropout: on what each layer's convolution reads."""

    type: ClassVar[str] = "wavenet"
    n_layers: int = 20
    dilation_cycle: int = 10
    kernel: int = 2
    d_skip: int | None = None
    dropout: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            "WaveNetConfig",
            d_model=self.d_model,
            n_layers=self.n_layers,
            dilation_cycle=self.dilation_cycle,
            kernel=self.kernel,
            d_skip=self.d_skip,
        )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"WaveNetConfig: dropout is {self.dropout}, expected 0 or more and below 1")

    def build(self) -> WaveNet:
        return WaveNet(self)


@dataclass(frozen=True)
class WaveNetState(State):
    """past: a layer: (rows, (kernel - 1) * dilation, d_model), its last inputs, the oldest first."""

    past: tuple[Tensor, ...]


class WaveNetLayer(nn.Module):
    """z = tanh(W_f * x) sigmoid(W_g * x) (section 2.3); a Linear of z adds to residual and skips."""

    def __init__(self, config: WaveNetConfig, layer: int) -> None:
        super().__init__()
        d_model, d_skip = config.d_model, config.d_skip or config.d_model
        dilation = 2 ** (layer % config.dilation_cycle)
        self.conv = DilatedCausalConv(d_model, 2 * d_model, config.kernel, dilation)
        self.out_proj = nn.Linear(d_model, d_model + d_skip)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, past: Tensor, seqs: Sequences | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: (batch, length, d_model). Returns (x plus the residual, the skip, the new past)."""
        y, past = self.conv(self.dropout(x), past, seqs=seqs)
        return *self._out(x, y), past

    def step_(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """One step of (batch, 1, d_model); `past` is changed in place."""
        return self._out(x, self.conv.step_(x, past))

    def _out(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        value, gate = y.chunk(2, dim=-1)
        z = self.out_proj(torch.tanh(value) * torch.sigmoid(gate))
        return x + z[..., : x.shape[-1]], z[..., x.shape[-1] :]


class WaveNet(BackboneBase):
    """(batch, length, d_model) to the same: ReLU -> Linear -> ReLU over the sum of the skips.

    The paper's last 1x1 convolution is the head that reads this. Causal, with a state of constant size.
    """

    config: WaveNetConfig
    state_type = WaveNetState

    def __init__(self, config: WaveNetConfig) -> None:
        super().__init__()
        self.config = config
        self.d_model = config.d_model
        self.gradient_checkpointing = config.gradient_checkpointing
        self.layers = nn.ModuleList(WaveNetLayer(config, i) for i in range(config.n_layers))
        self.out_proj = nn.Linear(config.d_skip or config.d_model, config.d_model)

    def _layers(self) -> Iterator[WaveNetLayer]:
        for layer in self.layers:
            assert isinstance(layer, WaveNetLayer)
            yield layer

    def forward(
        self, x: Tensor, state: WaveNetState | None = None, *, seqs: Sequences | Tensor | None = None
    ) -> tuple[Tensor, WaveNetState]:
        check_input(self, x)
        if seqs is not None and not isinstance(seqs, Sequences):
            seqs = Sequences.from_cu_seqlens(seqs, x.shape[1], x.device)
        check_input(self, x, seqs)
        self._check_state(state, x, seqs)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.out_proj.weight.dtype)
        if state is None:
            rows = x.shape[0] if seqs is None else seqs.n
            state = self.init_state(rows, device=x.device, dtype=x.dtype)
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        skips: list[Tensor] = []
        pasts: list[Tensor] = []
        for layer, past in zip(self._layers(), state.past):
            if again:
                x, skip, past = checkpoint(layer, x, past, seqs, use_reentrant=False)
            else:
                x, skip, past = layer(x, past, seqs)
            skips.append(skip)
            pasts.append(past)
        return self._read(skips), WaveNetState(tuple(pasts))

    def _read(self, skips: list[Tensor]) -> Tensor:
        total = skips[0]
        for skip in skips[1:]:
            total = total + skip
        return F.relu(self.out_proj(F.relu(total)))

    def _check_state(self, state: WaveNetState | None, x: Tensor, seqs: Sequences | None) -> None:
        check_state(self, state, x, seqs)
        if state is not None and len(state.past) != len(self.layers):
            raise StateError(f"WaveNet: state has {len(state.past)} layers, expected {len(self.layers)}")

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> WaveNetState:
        weight = self.out_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        return WaveNetState(
            tuple(
                torch.zeros(batch, layer.conv.reach, self.d_model, device=device, dtype=dtype)
                for layer in self._layers()
            )
        )

    @torch.no_grad()
    def step_(self, x: Tensor, state: WaveNetState) -> Tensor:
        check_input(self, x)
        self._check_state(state, x, None)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.out_proj.weight.dtype)
        skips = []
        for layer, past in zip(self._layers(), state.past):
            x, skip = layer.step_(x, past)
            skips.append(skip)
        return self._read(skips)
