"""The time-invariant scan in pure torch: any device, any floating dtype with fp64.

Because nothing depends on time, a chunk of T steps is a convolution with the kernel

    K_j = 2 Re(sum_n C_n B_bar_n exp(w_n j)),    w = dt A,

(arXiv 2206.11893, section 3.2) plus what the entering state gives, 2 Re(sum_n C_n exp(w_n (j + 1)) x_n). A
whole sequence of up to 2^15 steps is one chunk and one FFT convolution where neither a state enters nor one
is asked for. Otherwise the states that leave the chunks from zero come from one product over time, and the
carry over chunks takes about the square root of their number of steps.

Exponentials are tables of exp(w a T') exp(w b) for j = a T' + b. Their phases are computed in fp64 (fp32
phases of thousands of radians would lose the digits), at the cost of about sqrt(T) exponentials.

Layout inside: (d_inner, rows, steps), a row a chunk. A chunk that is shorter than T stands at the left end of
its row or at the right end: at the left its first step is step 0, at the right its last step is step T - 1.
What counts steps from the entry of a chunk is computed at the one end, what counts from its exit at the
other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm_modal.kernels.checks import complex_dtype, state_dtype
from ssm_modal.kernels.precision import without_autocast
from ssm_modal.kernels.scan.carry import carry_entering
from ssm_modal.kernels.sequences import ChunkTable, Sequences

# Steps of a chunk where states are carried; one chunk holds everything where none is.
CHUNK = 512
WHOLE = 1 << 15
# Up to here a convolution is a product with a Toeplitz matrix, above it goes through an FFT.
TOEPLITZ = 64


def chunk_size(length: int, seqs: Sequences | None, stateful: bool) -> int:
    """Steps of a chunk."""
    if seqs is None:
        if not stateful and length <= WHOLE:
            return max(length, 1)
        return max(1, min(length, CHUNK))
    # About the mean length, so that padding at most doubles the work.
    filled = [n for n in seqs.lengths if n]
    mean = -(-sum(filled) // len(filled)) if filled else 1
    return min(CHUNK, 1 << (mean - 1).bit_length())


def lti_scan_chunked(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
    with_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """(out, final_state) on checked arguments; the final state is None unless `with_final`."""
    with without_autocast(u.device):
        return _forward(u, dt, A, B, C, D, z, initial_state, seqs, reverse, with_final)


def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
    with_final: bool,
) -> tuple[Tensor, Tensor | None]:
    length = u.shape[1]
    wide = state_dtype(u.dtype)
    inputs = u.to(wide)
    stateful = with_final or initial_state is not None
    size = chunk_size(length, seqs, stateful)
    powers = _Powers.of(dt, A, complex_dtype(u.dtype))
    B_bar = zero_order_hold(dt, A) * B

    if u.numel() == 0:
        y, final = inputs.clone(), None
        if with_final:
            rows = u.shape[0] if seqs is None else seqs.n
            zeros = B_bar.new_zeros(rows, *A.shape)
            final = zeros if initial_state is None else initial_state.clone()
    else:
        y, final = _scan(inputs, powers, B_bar, C, initial_state, seqs, reverse, with_final, size, stateful)
    if D is not None:
        y = torch.addcmul(y, inputs, D)
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(u.dtype), final


def zero_order_hold(dt: Tensor, A: Tensor) -> Tensor:
    """(exp(dt A) - 1) / A: (d_inner, d_state) complex, dtype of A; dt where A is 0.

    As dt (exp(w) - 1) / w, w = dt A, in complex128 and by its series near 0: there the derivative of the
    quotient is a difference of nearly equal numbers.
    """
    step = dt.to(torch.complex128).unsqueeze(-1)
    w = step * A.to(torch.complex128)
    near = w.abs() < 0.1
    small = torch.where(near, w, 0)
    series = torch.ones_like(w)
    for k in range(12, 1, -1):  # 1 + w / 2 (1 + w / 3 (1 + ...))
        series = 1 + series * small / k
    far = torch.where(near, 1, w)
    return (step * torch.where(near, series, torch.expm1(far) / far)).to(A.dtype)


@dataclass(frozen=True)
class _Powers:
    """exp(w j) in `dtype`; w = dt A: (d_inner, d_state) complex128."""

    w: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, dt: Tensor, A: Tensor, dtype: torch.dtype) -> _Powers:
        return cls(dt.unsqueeze(-1).to(torch.complex128) * A.to(torch.complex128), dtype)

    def at(self, steps: Tensor) -> Tensor:
        """exp(w j) for each j of `steps` (n,): (d_inner, d_state, n)."""
        return torch.exp(self.w.unsqueeze(-1) * steps).to(self.dtype)

    def factors(self, n: int) -> tuple[Tensor, Tensor]:
        """Factors (d_inner, d_state, n / T') and (d_inner, d_state, T') of exp(w j), j = 0 ... n - 1."""
        inner = math.isqrt(max(n - 1, 0)) + 1
        coarse = torch.arange(0, n, inner, device=self.w.device)
        return self.at(coarse), self.at(torch.arange(inner, device=self.w.device))

    def table(self, n: int) -> Tensor:
        """exp(w j) for j = 0 ... n - 1: (d_inner, d_state, n)."""
        coarse, fine = self.factors(n)
        return (coarse.unsqueeze(-1) * fine.unsqueeze(-2)).flatten(2)[..., :n]


def _interleaved(m: Tensor) -> Tensor:
    """(d_inner, n, d_state) complex -> (d_inner, n, 2 d_state) real: real and imaginary parts in turn."""
    return torch.view_as_real(m.resolve_conj()).flatten(-2)


def _kernel(powers: _Powers, weights: Tensor, size: int) -> Tensor:
    """K_j = 2 Re(sum_n weights_n exp(w_n j)) for j = 0 ... size - 1: (d_inner, size) real.

    One product a channel of the two factors of exp(w j); no table over states and steps.
    """
    coarse, fine = powers.factors(size)
    left = _interleaved((2 * weights.unsqueeze(-1) * coarse).transpose(1, 2))
    right = _interleaved(fine.conj().transpose(1, 2))
    return torch.bmm(left, right.transpose(1, 2)).flatten(1)[:, :size]


def _convolve(rows: Tensor, kernel: Tensor, reverse: bool) -> Tensor:
    """y_i = sum_j kernel_j rows_{i - j}, or rows_{i + j} in reverse: (d_inner, rows, steps)."""
    size = rows.shape[-1]
    if size <= TOEPLITZ:
        steps = torch.arange(size, device=rows.device)
        lag = steps.unsqueeze(0) - steps.unsqueeze(1)  # of the output (column) behind the input (row)
        if reverse:
            lag = -lag
        toeplitz = kernel[:, lag.clamp(min=0)] * (lag >= 0)
        return torch.bmm(rows, toeplitz)
    return _FFTConvolution.apply(rows, kernel, reverse)


class _FFTConvolution(torch.autograd.Function):
    """`_convolve` through FFTs. Its own backward, for that of `rfft` is a complex FFT of twice the work.

    The gradient of the kernel is summed over rows before its inverse FFT.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, kernel: Tensor, reverse: bool) -> Tensor:
        size = rows.shape[-1]
        n = _fft_length(2 * size - 1)
        weight, spectrum = torch.fft.rfft(kernel, n=n).unsqueeze(1), torch.fft.rfft(rows, n=n)
        ctx.save_for_backward(weight, spectrum)
        ctx.sizes = (size, n, reverse)
        return torch.fft.irfft(spectrum * (weight.conj() if reverse else weight), n=n)[
            ..., :size
        ].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, spectrum = ctx.saved_tensors
        size, n, reverse = ctx.sizes
        grad = torch.fft.rfft(dy, n=n)
        drows = dkernel = None
        if ctx.needs_input_grad[0]:
            drows = torch.fft.irfft(grad * (weight if reverse else weight.conj()), n=n)[..., :size]
        if ctx.needs_input_grad[1]:
            one, other = (spectrum, grad) if reverse else (grad, spectrum)
            dkernel = torch.fft.irfft((one * other.conj()).sum(1), n=n)[..., :size]
        return drows, dkernel, None


def _fft_length(n: int) -> int:
    """The smallest 2^k or 3 * 2^k that is at least n."""
    power = 1 << (n - 1).bit_length()
    return 3 * power // 4 if 3 * power // 4 >= n else power


def _scan(
    inputs: Tensor,
    powers: _Powers,
    B_bar: Tensor,
    C: Tensor,
    initial: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
    with_final: bool,
    size: int,
    stateful: bool,
) -> tuple[Tensor, Tensor | None]:
    """(y, final_state) before skip and gate."""
    cut = _Cut.of(inputs, size, seqs)
    steps_first = inputs.permute(2, 0, 1)
    # Counted from the entry: at the left of the row, or in reverse at its right.
    near = cut.rows(steps_first, right=reverse)
    y = _convolve(near, _kernel(powers, C * B_bar, size), reverse)
    final = None
    if stateful or cut.per_batch > 1 or cut.table is not None:
        far = near if cut.even else cut.rows(steps_first, right=not reverse)
        table = powers.table(size + 1)
        # The state that leaves a chunk from zero: step j of T counted from the exit decays by exp(w j).
        to_exit = table[..., :size] if reverse else table[..., :size].flip(-1)
        weights = _interleaved((B_bar.unsqueeze(-1) * to_exit).transpose(1, 2))
        last = _complex(torch.bmm(far, weights))
        entering, final = _carry(last, powers, cut, initial, reverse)
        from_entry = table[..., 1:].flip(-1) if reverse else table[..., 1:]
        reading = _interleaved((2 * C.unsqueeze(-1) * from_entry).conj().transpose(1, 2))
        y = torch.baddbmm(y, _interleaved(entering), reading.transpose(1, 2))
    out = cut.unrows(y, right=reverse).permute(1, 2, 0).contiguous()
    return out, (final if with_final else None)


def _complex(m: Tensor) -> Tensor:
    """The inverse of `_interleaved`."""
    return torch.view_as_complex(m.unflatten(-1, (-1, 2)))


def _carry(
    last: Tensor, powers: _Powers, cut: _Cut, initial: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """States entering the chunks, (d_inner, rows, d_state), and final states, (..., d_inner, d_state)."""
    d_inner, d_state = powers.w.shape
    # A chunk decays by its own number of steps, the last chunk of a sequence by fewer.
    counts = (cut.end - cut.start).to(torch.float64)
    decay = torch.exp(powers.w * counts.view(-1, 1, 1)).to(powers.dtype)
    last = last.view(d_inner, cut.batch, -1, d_state).permute(1, 2, 0, 3)
    entering, final = carry_entering(decay.unsqueeze(0).expand_as(last), last, initial, cut.table, reverse)
    return entering.permute(2, 0, 1, 3).reshape(d_inner, -1, d_state), final


@dataclass(frozen=True)
class _Cut:
    """How time becomes rows. start, end: (chunks,), the steps of each chunk of one batch entry."""

    size: int
    batch: int
    length: int
    start: Tensor
    end: Tensor
    table: ChunkTable | None
    even: bool

    @classmethod
    def of(cls, inputs: Tensor, size: int, seqs: Sequences | None) -> _Cut:
        batch, length = inputs.shape[:2]
        if seqs is not None:
            table = seqs.chunks(size)
            return cls(size, batch, length, table.start, table.end, table, False)
        start = torch.arange(0, length, size, device=inputs.device)
        return cls(size, batch, length, start, (start + size).clamp(max=length), None, length % size == 0)

    @property
    def per_batch(self) -> int:
        return self.start.shape[0]

    def rows(self, x: Tensor, right: bool) -> Tensor:
        """(d_inner, batch, length) -> (d_inner, batch * chunks, size), zeros where a chunk is shorter."""
        if self.even:
            return x.contiguous().view(x.shape[0], -1, self.size)
        within = torch.arange(self.size, device=x.device)
        at = (self.end - self.size if right else self.start).unsqueeze(1) + within
        inside = (at >= self.start.unsqueeze(1)) & (at < self.end.unsqueeze(1))
        at = at.clamp(0, self.length - 1)
        taken = x[:, :, at].masked_fill(~inside, 0)
        return taken.reshape(x.shape[0], -1, self.size)

    def unrows(self, x: Tensor, right: bool) -> Tensor:
        """The inverse of `rows`."""
        x = x.reshape(x.shape[0], self.batch, -1)
        if self.even:
            return x
        steps = torch.arange(self.length, device=x.device)
        chunk = torch.searchsorted(self.start, steps, right=True) - 1
        origin = (self.end - self.size if right else self.start)[chunk]
        return x.index_select(2, chunk * self.size + steps - origin)
