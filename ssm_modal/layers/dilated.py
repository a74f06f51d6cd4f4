"""The dilated causal convolution of WaveNet (van den Oord et al., arXiv 1609.03499, section 2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_modal.kernels.sequences import Sequences


class DilatedCausalConv(nn.Module):
    """y_t = W [x_{t - (kernel - 1) dilation}, ..., x_{t - dilation}, x_t] + b, zeros before the first step.

    (batch, length, d_in) to (batch, length, d_out), or (1, total, d_in) packed by `seqs`, no tap crossing a
    border. What it carries is `past`: (rows, reach, d_in), the last reach = (kernel - 1) dilation inputs, the
    oldest first. Taps are laid side by side before one matrix product, which tensor cores do quickly.
    """

    def __init__(self, d_in: int, d_out: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.reach = (kernel - 1) * dilation
        self.proj = nn.Linear(kernel * d_in, d_out)

    def forward(self, x: Tensor, past: Tensor, *, seqs: Sequences | None = None) -> tuple[Tensor, Tensor]:
        """Returns (y, the new past)."""
        past = past.to(x.dtype)
        length = x.shape[1]
        if seqs is None:
            stream = torch.cat([past, x], dim=1)
            taps = [stream[:, j * self.dilation :][:, :length] for j in range(self.kernel)]
            return self.proj(torch.cat(taps, dim=-1)), stream[:, length:]
        taps = [
            self._before(x, past, (self.kernel - 1 - j) * self.dilation, seqs) for j in range(self.kernel)
        ]
        return self.proj(torch.cat(taps, dim=-1)), self._last(x, past, seqs)

    def _before(self, x: Tensor, past: Tensor, steps: int, seqs: Sequences) -> Tensor:
        """x as it was `steps` steps earlier in each sequence: (1, total, d_in)."""
        if steps == 0:
            return x
        position = seqs.positions()
        shifted = F.pad(x, (0, 0, steps, 0))[:, : x.shape[1]]
        place = position.clamp(max=steps - 1) + (self.reach - steps)
        older = past[seqs.seq_index(), place]
        return torch.where((position >= steps)[:, None], shifted, older)

    def _last(self, x: Tensor, past: Tensor, seqs: Sequences) -> Tensor:
        """The last `reach` inputs of every sequence, those of its past where it is shorter."""
        lengths = seqs.cu_seqlens.diff()
        place = lengths[:, None] - self.reach + torch.arange(self.reach, device=x.device)
        row = torch.arange(seqs.n, device=x.device)[:, None]
        source = torch.cat([past.flatten(0, 1), x[0]])
        older = row * self.reach + place + self.reach
        newer = past.shape[0] * self.reach + seqs.cu_seqlens[:-1, None] + place
        index = torch.where(place < 0, older, newer)
        return source.index_select(0, index.flatten()).view(past.shape)

    def step_(self, x: Tensor, past: Tensor) -> Tensor:
        """One step, x: (batch, 1, d_in) to (batch, 1, d_out); `past` is changed in place."""
        taps = [past[:, j * self.dilation] for j in range(self.kernel - 1)]
        y = self.proj(torch.cat([*(t.to(x.dtype) for t in taps), x[:, 0]], dim=-1))
        if self.reach:
            past.copy_(torch.cat([past[:, 1:], x.to(past.dtype)], dim=1))
        return y.unsqueeze(1)
