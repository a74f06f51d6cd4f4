"""One step of `causal_conv1d`, out of place and in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.checks import check_no_gradient, recording, state_dtype
from ssm_modal.kernels.conv.arguments import check_step
from ssm_modal.kernels.custom_ops import goes_straight, written
from ssm_modal.kernels.dispatch import resolve

OP = "causal_conv1d_step"

torch.library.define(
    "ssm_modal::causal_conv1d_step",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor state, bool silu) -> (Tensor, Tensor)",
)
torch.library.define(
    "ssm_modal::causal_conv1d_step_",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, bool silu) -> Tensor",
)


def causal_conv1d_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the causal depthwise convolution; `state` is left as it is.

    x: (batch, d_inner). weight: (d_inner, d_conv). bias: (d_inner,) or None. activation: None or "silu".
    state: (batch, d_inner, d_conv - 1), the last inputs, the oldest first, in x's dtype. backend: None to
    choose, "triton" or "torch". Where gradients are recorded "torch" serves, by autograd, and "triton", asked
    for, raises.

    Returns out (batch, d_inner) and the new state, both in x's dtype. Sums run in fp32 (fp64 for fp64
    inputs).

    Raises TypeError or ValueError naming the argument as `causal_conv1d` does, and BackendError where the
    backend asked for cannot serve.
    """
    silu = check_step(OP, x, weight, bias, state, activation)
    given = (x, weight, bias, state)
    if resolve(OP, x.device, x.dtype, backend, recording(given)) == "torch":
        out, window = _step(x, weight, bias, state, silu)
        return out, window[..., 1:].contiguous()
    if goes_straight(given):
        return _triton(x, weight, bias, state, silu)
    return torch.ops.ssm_modal.causal_conv1d_step(x, weight, bias, state, silu)


def causal_conv1d_step_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """As `causal_conv1d_step`, writing the new state over `state`; returns out (batch, d_inner).

    Without autograd: raises RuntimeError where gradients are recorded and any argument requires them.
    """
    silu = check_step("causal_conv1d_step_", x, weight, bias, state, activation)
    given = (x, weight, bias, state)
    check_no_gradient("causal_conv1d_step_", given)
    if resolve(OP, x.device, x.dtype, backend) == "torch":
        out, window = _step(x, weight, bias, state, silu)
        state.copy_(window[..., 1:])
        return out
    if goes_straight(given):
        written("causal_conv1d_step_", "state", state)
        return _triton_(x, weight, bias, state, silu)
    return torch.ops.ssm_modal.causal_conv1d_step_(x, weight, bias, state, silu)


def _step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """The step in torch: out, and the window of d_conv inputs whose last d_conv - 1 are the new state."""
    wide = state_dtype(x.dtype)
    window = torch.cat([state, x.unsqueeze(-1)], dim=-1)  # (batch, d_inner, d_conv)
    out = (window.to(wide) * weight.to(wide)).sum(-1)
    if bias is not None:
        out = out + bias.to(wide)
    if silu:
        out = F.silu(out)
    return out.to(x.dtype), window


def _triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    from ssm_modal.kernels.conv.triton_step import causal_conv1d_step_triton

    new = state.new_empty(state.shape)
    return causal_conv1d_step_triton(x, weight, bias, state, silu, new), new


def _triton_(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    from ssm_modal.kernels.conv.triton_step import causal_conv1d_step_triton

    return causal_conv1d_step_triton(x, weight, bias, state, silu, state)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _fake_(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


torch.library.impl("ssm_modal::causal_conv1d_step", "default")(_triton)
torch.library.impl("ssm_modal::causal_conv1d_step_", "default")(_triton_)
torch.library.register_fake("ssm_modal::causal_conv1d_step")(_fake)
torch.library.register_fake("ssm_modal::causal_conv1d_step_")(_fake_)
