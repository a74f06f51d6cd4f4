"""S4D: the time-invariant diagonal state-space layer, the baseline beside Mamba (arXiv 2206.11893).

A is complex and comes in conjugate pairs, of which one of each is kept: y is twice the real part of their
sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_modal.errors import ConfigError
from ssm_modal.kernels.checks import complex_dtype, state_dtype
from ssm_modal.kernels.lti import lti_scan, lti_scan_step
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.inputs import StridedWaveformInput
from ssm_modal.layers.mixer import ROW_CHUNK, Mixer, MixerConfig, check_input, check_state, outward
from ssm_modal.layers.wide import WideParameters
from ssm_modal.state import State


@dataclass(frozen=True)
class S4DConfig(MixerConfig):
    """d_state counts the conjugate pairs kept: d_state 32 is the paper's N = 64.

    output: "glu" is the paper's block, scan -> GELU -> Linear -> GLU; "gate" is Mamba's block with its
    selection and convolution taken out, scan * silu(z) -> Linear. expand widens the scan: with 2, either has
    the 6 d_model^2 weights of a Mamba layer. expand 1 with "glu" has no input projection, as in the paper.
    init: "lin" (A_n = -1/2 + i pi n) or "inv" (A_n = -1/2 + i N/pi (N / (2n + 1) - 1)), equations 9 and 8 of
    the paper.
    """

    type: ClassVar[str] = "s4d"
    d_state: int = 32
    expand: int = 2
    init: Literal["lin", "inv"] = "lin"
    output: Literal["glu", "gate"] = "glu"
    dt_min: float = 0.001
    dt_max: float = 0.1
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "S4DConfig"
        check_positive(name, d_state=self.d_state, expand=self.expand, dt_min=self.dt_min)
        if self.d_state > 256:
            raise ConfigError(f"{name}: d_state is {self.d_state}, expected 1 to 256")
        if self.dt_max < self.dt_min:
            raise ConfigError(
                f"{name}: dt_max is {self.dt_max}, expected at least dt_min, which is {self.dt_min}"
            )

    def build(self, d_model: int) -> S4D:
        return S4D(d_model, self)


@dataclass(frozen=True)
class S4DState(State):
    """ssm: (batch, d_inner, d_state) complex64, complex128 in an fp64 model: the state of the scan."""

    wide: ClassVar[frozenset[str]] = frozenset({"ssm"})
    ssm: Tensor


class S4D(Mixer, WideParameters):
    """The S4D layer: (batch, length, d_model) to the same, with an `S4DState` of constant size.

    Parameters: log_dt (d_inner,), A_log = log(-Re A) and A_imag (d_inner, d_state), C (d_inner, d_state, 2)
    as real and imaginary parts, D (d_inner,). B is one: only its product with C matters. Complex numbers are
    stored as real tensors, so that casts, optimisers and safetensors know what to do.

    Attributes: dt_scale, what exp(log_dt) is multiplied by, 1.0 unless `set_time_step_scale` changed it.
    """

    state_type = S4DState
    wide_parameters = ("A_log", "A_imag", "C", "D", "log_dt")
    undecayed_parameters = ("A_log", "A_imag", "D", "log_dt")

    def __init__(self, d_model: int, config: S4DConfig) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.d_inner = config.expand * d_model
        self.d_state = config.d_state
        self.dt_scale = 1.0
        glu = config.output == "glu"
        self.in_proj: nn.Linear | None = None
        if not glu or config.expand != 1:
            self.in_proj = nn.Linear(d_model, self.d_inner if glu else 2 * self.d_inner, bias=config.bias)
        shape = (self.d_inner, self.d_state)
        self.log_dt = nn.Parameter(torch.empty(self.d_inner))
        self.A_log = nn.Parameter(torch.full(shape, math.log(0.5)))
        self.A_imag = nn.Parameter(torch.empty(shape))
        # A standard complex normal: half the variance in each part.
        self.C = nn.Parameter(torch.randn(*shape, 2) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, 2 * d_model if glu else d_model, bias=config.bias)
        self._init_ssm()
        self.mark_parameters()

    @torch.no_grad()
    def _init_ssm(self) -> None:
        n = torch.arange(self.d_state, dtype=torch.float32)
        full = 2 * self.d_state  # the paper's N counts both of each pair
        imag = math.pi * n if self.config.init == "lin" else full / math.pi * (full / (2 * n + 1) - 1)
        self.A_imag.copy_(imag.expand_as(self.A_imag))
        low, high = math.log(self.config.dt_min), math.log(self.config.dt_max)
        self.log_dt.copy_(torch.rand(self.d_inner) * (high - low) + low)

    def project_in(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) to (batch, length, d_inner), or twice that with the gate beside it."""
        return x if self.in_proj is None else self.in_proj(x)

    def project_out(self, y: Tensor) -> Tensor:
        out = self.out_proj(F.gelu(y) if self.config.output == "glu" else y)
        return F.glu(out, dim=-1) if self.config.output == "glu" else out

    def drop_projections(self) -> None:
        self.in_proj = None
        del self.out_proj

    def mix(
        self,
        projected: Tensor,
        state: S4DState | None = None,
        *,
        seqs: Sequences | None = None,
        reverse: bool = False,
        return_state: bool = True,
    ) -> tuple[Tensor, S4DState | None]:
        u, z = self._split(projected)
        if state is not None and seqs is None and u.shape[1] == 1:
            y, new = self._step(u[:, 0], None if z is None else z[:, 0], state)
            return y.unsqueeze(1), new
        dt, A, B, C, D = self._coefficients(u.dtype)
        y, ssm = lti_scan(
            u,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            initial_state=None if state is None else state.ssm.to(A.dtype),
            cu_seqlens=seqs,
            reverse=reverse,
            return_final_state=True,
        )
        return y, S4DState(ssm) if return_state else None

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
        """The convolution kernel K_{position - s} of each of the d_inner channels, the same for every input.

        The skip D and, with output "gate", the gate are not in it. See `Mixer.attention_row`; what is
        projected does not matter here.
        """
        check_input(self, x)
        dt, A, B, C, _ = self._coefficients(x.dtype)
        state = A.new_zeros(1, *A.shape)
        for start, end in outward(position, x.shape[1], reverse, chunk_size):
            # The kernel is the answer to a single one, read the other way.
            impulse = dt.new_zeros(1, end - start, self.d_inner)
            if start <= position < end:
                impulse[:, position - start] = 1.0
            row, state = lti_scan(
                impulse, dt, A, B, C, initial_state=state, reverse=not reverse, return_final_state=True
            )
            yield start, row.expand(x.shape[0], -1, -1)

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.config.output == "glu":
            return projected, None
        u, z = projected.chunk(2, dim=-1)
        return u, z

    def _coefficients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dt, A, B, C, D in the precision that inputs of `dtype` take.

        dt, D: (d_inner,) real. A, B, C: (d_inner, d_state) complex.
        """
        wide = state_dtype(dtype)
        A = torch.complex(-torch.exp(self.A_log.to(wide)), self.A_imag.to(wide))
        C = torch.view_as_complex(self.C.to(wide).contiguous())
        return torch.exp(self.log_dt.to(wide)) * self.dt_scale, A, torch.ones_like(A), C, self.D.to(wide)

    def _step(self, u: Tensor, z: Tensor | None, state: S4DState) -> tuple[Tensor, S4DState]:
        dt, A, B, C, D = self._coefficients(u.dtype)
        y, ssm = lti_scan_step(u, dt, A, B, C, state.ssm.to(A.dtype), D=D, z=z)
        return y, S4DState(ssm)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> S4DState:
        device, dtype = device or self.D.device, dtype or self.D.dtype
        return S4DState(
            torch.zeros(batch, self.d_inner, self.d_state, device=device, dtype=complex_dtype(dtype))
        )

    @torch.no_grad()
    def step_(self, x: Tensor, state: S4DState) -> Tensor:
        check_input(self, x)
        check_state(self, state, x)
        u, z = self._split(self.project_in(x[:, 0]))
        y, new = self._step(u, z, state)
        state.ssm.copy_(new.ssm)
        return self.project_out(y).unsqueeze(1)


def set_time_step_scale(model: nn.Module, scale: float) -> None:
    """Run a trained model on signals of another sample rate, without training it again.

    scale: the rate it was trained at divided by that of the signals: 2.0 for every second sample. The time
    step of every S4D layer is multiplied by it, so that the layers stay the same systems in continuous time
    (S4D, arXiv 2206.11893, section 3; the input held between samples). The weights are left as they are; 1.0
    undoes it. A model of which any other layer knows about neighbouring steps would not be the same system.

    Raises ValueError for a scale that is not above 0 and for a model with a mixer that is not S4D, or with a
    strided input layer.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}, expected more than 0")
    layers = [module for module in model.modules() if isinstance(module, S4D)]
    others = {type(m).__name__ for m in model.modules() if isinstance(m, Mixer) and not isinstance(m, S4D)}
    others |= {type(m).__name__ for m in model.modules() if isinstance(m, StridedWaveformInput)}
    if others or not layers:
        have = ", ".join(sorted(others)) or "no S4D layer"
        raise ValueError(
            f"the model has {have}, expected S4D layers alone behind an input of single samples: their time "
            "step is what can be rescaled"
        )
    for layer in layers:
        layer.dt_scale = float(scale)
