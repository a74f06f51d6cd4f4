"""Reference of `causal_conv1d`: a plain loop over time, in the dtype of its inputs (fp64 for tests).

The short causal depthwise convolution of Mamba (Gu & Dao 2023, arXiv 2312.00752, section 3.4 and figure 3),
taken from H3 (Fu et al. 2022, arXiv 2212.14052):

    y_t = bias + sum_{j = 0}^{K - 1} weight[:, K - 1 - j] * x_{t - j}        out_t = silu(y_t) or y_t

so `weight[:, K - 1]` weighs the present input, as in a left-padded `torch.nn.Conv1d(groups=d_inner)`. Inputs
before the first step are those of the state, (d_inner, K - 1): the last K - 1 inputs in scan order, the
oldest first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.sequences import Sequences


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `causal_conv1d`, one time step after the other; differentiable, any floating dtype.

    x: (batch, length, d_inner). weight: (d_inner, d_conv). bias: (d_inner,). initial_state and the final
    state: (batch or sequences, d_inner, d_conv - 1).
    """
    batch, length, d_inner = x.shape
    history = weight.shape[1] - 1
    if cu_seqlens is None:
        spans = [(row, 0, length) for row in range(batch)]
    else:
        seqs = Sequences.from_cu_seqlens(cu_seqlens, length, x.device)
        spans = [(0, start, start + n) for start, n in zip(seqs.starts, seqs.lengths)]
    if initial_state is None:
        initial_state = x.new_zeros(len(spans), d_inner, history)

    rows: list[Tensor] = []
    states: list[Tensor] = []
    for (row, start, end), state in zip(spans, initial_state):
        steps = range(end - 1, start - 1, -1) if reverse else range(start, end)
        out: list[Tensor] = []
        for t in steps:
            window = torch.cat([state, x[row, t, :, None]], dim=1)  # (d_inner, K): x_{t-K+1} ... x_t
            y = (window * weight).sum(1)
            if bias is not None:
                y = y + bias
            out.append(F.silu(y) if activation == "silu" else y)
            state = window[:, 1:]
        if reverse:
            out.reverse()
        rows.append(torch.stack(out) if out else x.new_zeros(0, d_inner))
        states.append(state)
    result = torch.cat(rows)[None] if cu_seqlens is not None else torch.stack(rows) if rows else x.clone()
    final = torch.stack(states) if states else x.new_zeros(0, d_inner, history)
    return (result, final) if return_final_state else result
