"""Mamba: the selective state-space layer S6 in its gated block.

Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752, figure 3.
Symbols of the paper: Delta is `dt`, E is `expand`, N is `d_state`, R is `dt_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ssm_modal.errors import ConfigError
from ssm_modal.kernels.checks import state_dtype
from ssm_modal.kernels.conv import (
    causal_conv1d,
    causal_conv1d_beside,
    causal_conv1d_step,
    causal_conv1d_step_,
)
from ssm_modal.kernels.norm import rms_norm
from ssm_modal.kernels.scan import (
    RowCarry,
    ScanDirection,
    bidirectional_scan,
    selective_scan,
    selective_scan_row,
    selective_scan_step,
    selective_scan_step_,
)
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.mixer import ROW_CHUNK, Mixer, MixerConfig, check_input, check_state, outward
from ssm_modal.layers.norm import RMSNorm
from ssm_modal.layers.wide import WideParameters
from ssm_modal.state import State


@dataclass(frozen=True)
class MambaConfig(MixerConfig):
    """d_inner = expand * d_model channels, each with d_state states; dt through a bottleneck of dt_rank.

    dt_rank: "auto" is ceil(d_model / 16). dt_min, dt_max: softplus(dt_bias) starts log-uniform between them,
    never below dt_init_floor. bias: of in_proj and out_proj. bc_dt_norm_eps: None, or the eps of a weightless
    RMS norm on dt, B and C (Falcon-Mamba, arXiv 2410.05355). bc_dt_norm_weights: gives that norm weights
    (Jamba, arXiv 2403.19887).
    """

    type: ClassVar[str] = "mamba"
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | Literal["auto"] = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False
    bc_dt_norm_eps: float | None = None
    bc_dt_norm_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "MambaConfig"
        check_positive(name, d_state=self.d_state, d_conv=self.d_conv, expand=self.expand, dt_min=self.dt_min)
        check_positive(name, dt_init_floor=self.dt_init_floor, bc_dt_norm_eps=self.bc_dt_norm_eps)
        if self.d_state > 256:
            raise ConfigError(f"{name}: d_state is {self.d_state}, expected 1 to 256")
        if self.bc_dt_norm_weights and self.bc_dt_norm_eps is None:
            raise ConfigError(
                f"{name}: bc_dt_norm_weights is true, expected bc_dt_norm_eps with it, got None"
            )
        if self.dt_rank != "auto":
            check_positive(name, dt_rank=self.dt_rank)
        if self.dt_max < self.dt_min:
            raise ConfigError(
                f"{name}: dt_max is {self.dt_max}, expected at least dt_min, which is {self.dt_min}"
            )

    def build(self, d_model: int) -> Mamba:
        return Mamba(d_model, self)


@dataclass(frozen=True)
class MambaState(State):
    """conv: (batch, d_inner, d_conv - 1), the last inputs of the convolution, the oldest first.
    ssm: (batch, d_inner, d_state), the state of the scan, fp32 (fp64 in an fp64 model)."""

    wide: ClassVar[frozenset[str]] = frozenset({"ssm"})
    conv: Tensor
    ssm: Tensor


class Mamba(Mixer, WideParameters):
    """The Mamba layer: (batch, length, d_model) to the same, with a `MambaState` of constant size.

    Parameters: in_proj (d_model -> 2 d_inner), conv1d (depthwise, d_conv), x_proj (d_inner -> dt_rank + 2
    d_state), dt_proj (dt_rank -> d_inner), dt_bias, D (d_inner,), A_log (d_inner, d_state), out_proj (d_inner
    -> d_model); with bc_dt_norm_weights also dt_norm, B_norm and C_norm. dt_bias stands on its own, not as
    dt_proj's bias, because the scan adds it inside its softplus in fp32.
    """

    state_type = MambaState
    wide_parameters = ("A_log", "D", "dt_bias")
    undecayed_parameters = ("A_log", "D", "dt_bias")

    def __init__(self, d_model: int, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.d_inner = config.expand * d_model
        self.d_state = config.d_state
        self.dt_rank = math.ceil(d_model / 16) if config.dt_rank == "auto" else config.dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=config.bias)
        # A holder of parameters, initialised as the published model's: the op reads its weight.
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, config.d_conv, groups=self.d_inner, bias=config.conv_bias
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.d_inner))
        eps = config.bc_dt_norm_eps
        if eps is not None and config.bc_dt_norm_weights:
            self.dt_norm = RMSNorm(self.dt_rank, eps)
            self.B_norm = RMSNorm(self.d_state, eps)
            self.C_norm = RMSNorm(self.d_state, eps)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, self.d_state))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.kept_A: Tensor | None = None  # set by keep_A
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=config.bias)
        self._init_ssm()
        self.mark_parameters()

    @torch.no_grad()
    def _init_ssm(self) -> None:
        """Section 3.6 and the published code: S4D-Real for A, dt log-uniform, dt_proj preserving variance."""
        config = self.config
        self.A_log.copy_(
            torch.log(torch.arange(1, self.d_state + 1, dtype=torch.float32)).expand_as(self.A_log)
        )
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.exp(torch.rand(self.d_inner) * (high - low) + low).clamp(min=config.dt_init_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def project_in(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) to (batch, length, 2 d_inner): input and gate side by side."""
        return self.in_proj(x)

    def project_out(self, y: Tensor) -> Tensor:
        return self.out_proj(y)

    def drop_projections(self) -> None:
        del self.in_proj, self.out_proj

    def mix(
        self,
        projected: Tensor,
        state: MambaState | None = None,
        *,
        seqs: Sequences | None = None,
        reverse: bool = False,
        return_state: bool = True,
    ) -> tuple[Tensor, MambaState | None]:
        # Where gradients may be recorded the ops below serve on every backend, the single step on torch only.
        single = seqs is None and projected.shape[1] == 1 and not torch.is_grad_enabled()
        if state is not None and single:
            u, z = projected[:, 0].chunk(2, dim=-1)
            y, new = self._step(u, z, state)
            return y.unsqueeze(1), new
        u, conv, z = causal_conv1d_beside(
            projected,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_state=None if state is None else state.conv.to(projected.dtype),
            cu_seqlens=seqs,
            reverse=reverse,
        )
        wide, own = state_dtype(u.dtype), self._direction(u)
        y, ssm = selective_scan(
            u,
            own.delta,
            own.A,
            own.B,
            own.C,
            D=own.D,
            z=z,
            delta_bias=own.delta_bias,
            delta_softplus=True,
            initial_state=None if state is None else state.ssm.to(wide),
            cu_seqlens=seqs,
            reverse=reverse,
            return_final_state=True,
        )
        return y, MambaState(conv, ssm) if return_state else None

    def mix_both(self, other: Mamba, projected: Tensor, *, seqs: Sequences | None = None) -> Tensor:
        u, z = projected.chunk(2, dim=-1)
        ahead, back = (
            causal_conv1d(
                u,
                layer.conv1d.weight.squeeze(1),
                layer.conv1d.bias,
                activation="silu",
                cu_seqlens=seqs,
                reverse=reverse,
            )
            for layer, reverse in ((self, False), (other, True))
        )
        return bidirectional_scan(
            ahead,
            self._direction(ahead),
            other._direction(back),
            u_backwards=back,
            z=z,
            delta_softplus=True,
            cu_seqlens=seqs,
        )

    def _direction(self, u: Tensor) -> ScanDirection:
        """What the scan of u takes beside u and the gate."""
        delta, B, C = self._select(u)
        wide = state_dtype(u.dtype)
        return ScanDirection(delta, self._A(wide), B, C, self.D.to(wide), self.dt_bias.to(wide))

    @torch.no_grad()
    def attention_row(
        self,
        x: Tensor,
        position: int,
        *,
        reverse: bool = False,
        chunk_size: int = ROW_CHUNK,
        project_in: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """The hidden attention alpha of arXiv 2403.01590, of each of the d_inner channels.

        As in the paper it weighs the scan's input, which is behind the convolution: the convolution's window,
        the skip D and the gate z are not in it. See `Mixer.attention_row`.
        """
        check_input(self, x)
        wide = state_dtype(x.dtype)
        window = self.config.d_conv - 1
        carry: RowCarry | None = None
        for start, end in outward(position, x.shape[1], reverse, chunk_size):
            # The convolution reads the steps before the chunk in scan order too.
            low, high = (start, end + window) if reverse else (max(start - window, 0), end)
            projected = (project_in or self.project_in)(x[:, low:high])
            u = causal_conv1d(
                projected[..., : self.d_inner],
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                activation="silu",
                reverse=reverse,
            )[:, start - low : end - low]
            delta, B, C = self._select(u)
            if carry is None:
                carry = RowCarry.at(C[:, position - start], self.d_inner)
            row, carry = selective_scan_row(
                delta,
                self._A(wide),
                B,
                carry,
                delta_bias=self.dt_bias.to(wide),
                delta_softplus=True,
                reverse=reverse,
            )
            yield start, row

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """delta (before bias and softplus), B and C from the input: section 3.2, algorithm 2."""
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        eps = self.config.bc_dt_norm_eps
        if self.config.bc_dt_norm_weights:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        elif eps is not None:
            dt, B, C = rms_norm(dt, eps=eps), rms_norm(B, eps=eps), rms_norm(C, eps=eps)
        return self.dt_proj(dt), B, C

    def _A(self, dtype: torch.dtype) -> Tensor:
        if self.kept_A is not None and self.kept_A.dtype == dtype and not torch.is_grad_enabled():
            return self.kept_A
        return -torch.exp(self.A_log.to(dtype))

    def _step(self, u: Tensor, z: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """One step of (batch, d_inner) rows."""
        u, conv = causal_conv1d_step(
            u, self.conv1d.weight.squeeze(1), self.conv1d.bias, state.conv.to(u.dtype), activation="silu"
        )
        delta, B, C = self._select(u)
        wide = state_dtype(u.dtype)
        y, ssm = selective_scan_step(
            u,
            delta,
            self._A(wide),
            B,
            C,
            state.ssm.to(wide),
            D=self.D.to(wide),
            z=z,
            delta_bias=self.dt_bias.to(wide),
            delta_softplus=True,
        )
        return y, MambaState(conv, ssm)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        weight = self.conv1d.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        conv = torch.zeros(batch, self.d_inner, self.config.d_conv - 1, device=device, dtype=dtype)
        ssm = torch.zeros(batch, self.d_inner, self.d_state, device=device, dtype=state_dtype(dtype))
        return MambaState(conv, ssm)

    @torch.no_grad()
    def step_(self, x: Tensor, state: MambaState) -> Tensor:
        check_input(self, x)
        check_state(self, state, x)
        u, z = self.project_in(x[:, 0]).chunk(2, dim=-1)
        wide = state_dtype(u.dtype)
        if (state.conv.dtype, state.ssm.dtype) != (u.dtype, wide):
            y, new = self._step(u, z, state)
            state.conv.copy_(new.conv)
            state.ssm.copy_(new.ssm)
            return self.project_out(y).unsqueeze(1)
        weight = self.conv1d.weight.squeeze(1)
        u = causal_conv1d_step_(u, weight, self.conv1d.bias, state.conv, activation="silu")
        delta, B, C = self._select(u)
        y = selective_scan_step_(
            u,
            delta,
            self._A(wide),
            B,
            C,
            state.ssm,
            D=self.D.to(wide),
            z=z,
            delta_bias=self.dt_bias.to(wide),
            delta_softplus=True,
        )
        return self.project_out(y).unsqueeze(1)


@contextmanager
def keep_A(model: nn.Module) -> Iterator[None]:
    """Inside, where no gradients are recorded, every Mamba layer of `model` computes A = -exp(A_log) once and
    not at each step. The weights must not change meanwhile."""
    layers = [m for m in model.modules() if isinstance(m, Mamba) and m.kept_A is None]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.kept_A = layer._A(state_dtype(layer.A_log.dtype))
        yield
    finally:
        for layer in layers:
            layer.kept_A = None
