"""The loss over a large vocabulary: `cross_entropy` of logits with its gradient, and its reference."""

from ssm_modal.kernels.loss.op import cross_entropy
from ssm_modal.kernels.loss.ref import cross_entropy_ref

__all__ = ["cross_entropy", "cross_entropy_ref"]
