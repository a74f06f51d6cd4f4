"""Short causal depthwise convolution: `causal_conv1d`, alone or beside others; its step, its reference."""

from ssm_modal.kernels.conv.op import causal_conv1d, causal_conv1d_beside
from ssm_modal.kernels.conv.ref import causal_conv1d_ref
from ssm_modal.kernels.conv.step import causal_conv1d_step, causal_conv1d_step_

__all__ = [
    "causal_conv1d",
    "causal_conv1d_beside",
    "causal_conv1d_ref",
    "causal_conv1d_step",
    "causal_conv1d_step_",
]
