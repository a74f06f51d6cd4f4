"""RMSNorm, plain, with the residual add, gated: `rms_norm` and its reference."""

from ssm_modal.kernels.norm.op import rms_norm
from ssm_modal.kernels.norm.ref import rms_norm_ref

__all__ = ["rms_norm", "rms_norm_ref"]
