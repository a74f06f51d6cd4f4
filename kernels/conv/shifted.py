"""`causal_conv1d` in plain torch: one multiply-add a tap over shifted views, on any device in any dtype.

On the CPU, shifted multiply-adds over (batch, length, d_inner) take about half the time of
`F.conv1d(groups=d_inner)`, which wants the channels before the length and runs on strided views here.
Gradients, of every order, are autograd's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.checks import state_dtype
from ssm_modal.kernels.sequences import Sequences


def causal_conv1d_shifted(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    seqs: Sequences | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Output (batch, length, d_inner) and final state (rows, d_inner, d_conv - 1), both in x's dtype.

    x: (batch, length, d_inner). weight: (d_inner, d_conv). bias: (d_inner,). initial_state: (rows, d_inner,
    d_conv - 1) with rows = batch, or sequences with `seqs`. Sums run in fp32 (fp64 for fp64 inputs).
    """
    taps = weight.shape[1]
    history = taps - 1
    length, d_inner = x.shape[1:]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0] if seqs is None else seqs.n, d_inner, history)
    # Every sequence gets its history next to its first step in scan order: `padded` stands in time order, so
    # the history lies behind the inputs when scanning backwards.
    before = initial_state.transpose(1, 2)
    if reverse:
        before = before.flip(1)
    if history == 0:
        padded = x
        final = initial_state.clone()
    elif seqs is None:
        padded = torch.cat([x, before] if reverse else [before, x], dim=1)
        last = padded[:, :history].flip(1) if reverse else padded[:, length:]
        final = last.transpose(1, 2).contiguous()
    else:
        tables = _tables(seqs, history, reverse)
        padded = x.new_empty(1, length + seqs.n * history, d_inner)
        padded = padded.index_copy(1, tables["inputs"], x)
        padded = padded.index_copy(1, tables["history"], before.reshape(1, -1, d_inner))
        last = padded.index_select(1, tables["last"]).reshape(seqs.n, history, d_inner)
        final = last.transpose(1, 2).contiguous()

    wide = state_dtype(x.dtype)
    steps = padded.shape[1] - history
    padded, weight = padded.to(wide), weight.to(wide)
    out = padded[:, :steps] * weight[:, history if reverse else 0]
    for j in range(1, taps):
        out = torch.addcmul(out, padded[:, j : j + steps], weight[:, history - j if reverse else j])
    if seqs is not None and history > 0:
        out = out.index_select(1, _tables(seqs, history, reverse)["outputs"])
    if bias is not None:
        out = out + bias.to(wide)
    if silu:
        out = F.silu(out)
    return out.to(x.dtype), final


def _tables(seqs: Sequences, history: int, reverse: bool) -> dict[str, Tensor]:
    """Where inputs, histories, outputs and final states stand among the padded steps; built once for `seqs`.

    All int64: inputs, outputs (total,); history, last (sequences * history,). Sequence i takes the padded
    steps [starts[i] + i * history, ...) of number lengths[i] + history.
    """
    key = f"conv_{history}_{'reverse' if reverse else 'forward'}_"
    names = ("inputs", "history", "outputs", "last")
    if key + names[0] not in seqs._extra:
        lengths = torch.tensor(seqs.lengths, dtype=torch.int64)
        index = torch.repeat_interleave(torch.arange(seqs.n), lengths)
        steps = torch.arange(seqs.total)
        first = torch.tensor(seqs.starts, dtype=torch.int64) + torch.arange(seqs.n) * history
        offsets = torch.arange(history)
        plain = steps + index * history
        front = (first[:, None] + offsets).reshape(-1)
        back = (first[:, None] + lengths[:, None] + offsets).reshape(-1)
        # The outputs of a sequence stand where its windows begin, `history` before its inputs going forward.
        table = {
            "inputs": plain if reverse else plain + history,
            "history": back if reverse else front,
            "outputs": plain,
            "last": (first[:, None] + offsets.flip(0)).reshape(-1) if reverse else back,
        }
        for name in names:
            seqs._extra[key + name] = table[name].to(seqs.cu_seqlens.device)
    return {name: seqs._extra[key + name] for name in names}
