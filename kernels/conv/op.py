"""The public `causal_conv1d`: checks its arguments, asks the dispatcher, and ties backends to autograd."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ssm_modal.kernels.checks import Passed, check_flags, check_shape, signature
from ssm_modal.kernels.conv.arguments import check_activation, check_sequence
from ssm_modal.kernels.conv.custom_op import convolve, convolve_beside
from ssm_modal.kernels.conv.shifted import causal_conv1d_shifted
from ssm_modal.kernels.dispatch import resolve
from ssm_modal.kernels.sequences import Sequences

_passed = Passed()


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    activation: str | None = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | Sequences | None = ...,
    reverse: bool = ...,
    return_final_state: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    activation: str | None = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | Sequences | None = ...,
    reverse: bool = ...,
    return_final_state: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    activation: str | None = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | Sequences | None = ...,
    reverse: bool = ...,
    return_final_state: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Short causal depthwise convolution, SiLU fused (Mamba, arXiv 2312.00752, section 3.4).

        out_t = act(bias + sum_j weight[:, d_conv - 1 - j] * x_{t - j}),   j = 0 ... d_conv - 1

    Args:
        x: (batch, length, d_inner), fp32, bf16, fp16 or fp64; any strides, any length from 0.
        weight: (d_inner, d_conv), x's dtype, or fp32 beside bf16 and fp16; `weight[:, -1]` weighs the
            present.
        bias: (d_inner,), dtypes as weight, or None.
        activation: None or "silu".
        initial_state: (batch, d_inner, d_conv - 1), or (sequences, ...) with `cu_seqlens`: the inputs before
            the first step in scan order, the oldest first, in x's dtype. None stands for zeros.
        cu_seqlens: int32 or int64 (sequences + 1,) borders of sequences end to end in a batch of one, or a
            `Sequences`, already validated (needed inside `torch.compile`). No tap crosses a border; a
            sequence of length 0 hands its state through.
        reverse: scan from the last step to the first: out_t depends on x_t, x_{t+1}, ...; the state enters at
            the last step. Equals flip, convolve, flip.
        return_final_state: also return the state after the last step in scan order.
        backend: None to choose, "triton", "cpu" or "torch".

    Returns:
        out (batch, length, d_inner) in x's dtype; with `return_final_state` also the final state, shaped as
        `initial_state`, in x's dtype. Sums run in fp32 (fp64 for fp64). Gradients flow to x, weight, bias and
        initial_state, from both outputs.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device.
        BackendError: the backend asked for cannot serve the call.
    """
    op = "causal_conv1d"
    check_flags(op, reverse=reverse, return_final_state=return_final_state)
    silu = check_activation(op, activation)
    chosen, seqs = _checked(op, x, weight, bias, initial_state, cu_seqlens, backend)
    if chosen == "torch":
        out, final = causal_conv1d_shifted(x, weight, bias, silu, initial_state, seqs, reverse)
    else:
        out, final = convolve(x, weight, bias, silu, initial_state, seqs, reverse, chosen)
    return (out, final) if return_final_state else out


def causal_conv1d_beside(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequences | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`causal_conv1d` of x's first d_inner channels, the others handed through: (out, final state, others).

    x: (batch, length, d_inner + n), as a projection to input and gate gives it. The others: (batch, length,
    n), a view of x that must not be written. All else as of `causal_conv1d`. The gradient of x is written
    once, where `x.split` before a convolution would write it in parts and join them.
    """
    op = "causal_conv1d_beside"
    check_flags(op, reverse=reverse)
    silu = check_activation(op, activation)
    check_shape(op, "weight", weight, ("d_inner", "d_conv"), "(d_inner, d_conv)")
    check_shape(op, "x", x, ("batch", "length", "channels"), "(batch, length, channels)")
    d_inner = weight.shape[0]
    if x.shape[-1] < d_inner:
        raise ValueError(f"{op}: x has {x.shape[-1]} channels, expected at least d_inner {d_inner} of weight")
    own = x[..., :d_inner]
    chosen, seqs = _checked(op, own, weight, bias, initial_state, cu_seqlens, backend)
    if chosen == "torch":
        out, final = causal_conv1d_shifted(own, weight, bias, silu, initial_state, seqs, reverse)
        return out, final, x[..., d_inner:]
    return convolve_beside(x, weight, bias, silu, initial_state, seqs, reverse, chosen)


def _checked(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | Sequences | None,
    backend: str | None,
) -> tuple[str, Sequences | None]:
    """The backend that serves, and the validated sequences."""
    seen = None if cu_seqlens is not None else signature((x, weight, bias, initial_state))
    seqs: Sequences | None = None
    if seen not in _passed:
        seqs = check_sequence(op, x, weight, bias, initial_state, cu_seqlens)
        _passed.add(seen)
    return resolve("causal_conv1d", x.device, x.dtype, backend), seqs
