"""One step of `causal_conv1d`, out of place and in place, in plain torch on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.checks import check_no_gradient, state_dtype
from ssm_modal.kernels.conv.arguments import check_step


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """One step of the causal depthwise convolution; `state` is left as it is.

    x: (batch, d_inner). weight: (d_inner, d_conv). bias: (d_inner,) or None. activation: None or "silu".
    state: (batch, d_inner, d_conv - 1), the last inputs, the oldest first, in x's dtype.

    Returns out (batch, d_inner) and the new state, both in x's dtype; differentiable in every tensor. Sums
    run in fp32 (fp64 for fp64 inputs).

    Raises TypeError or ValueError naming the argument as `causal_conv1d` does.
    """
    silu = check_step("causal_conv1d_step", x, weight, bias, state, activation)
    out, window = _step(x, weight, bias, state, silu)
    return out, window[..., 1:].contiguous()


def causal_conv1d_step_(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, activation: str | None = None
) -> Tensor:
    """As `causal_conv1d_step`, writing the new state over `state`; returns out (batch, d_inner).

    Without autograd: raises RuntimeError where gradients are recorded and any argument requires them.
    """
    silu = check_step("causal_conv1d_step_", x, weight, bias, state, activation)
    check_no_gradient("causal_conv1d_step_", (x, weight, bias, state))
    out, window = _step(x, weight, bias, state, silu)
    state.copy_(window[..., 1:])
    return out


def _step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    wide = state_dtype(x.dtype)
    window = torch.cat([state, x.unsqueeze(-1)], dim=-1)  # (batch, d_inner, d_conv)
    out = (window.to(wide) * weight.to(wide)).sum(-1)
    if bias is not None:
        out = out + bias.to(wide)
    if silu:
        out = F.silu(out)
    return out.to(x.dtype), window
