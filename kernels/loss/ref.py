"""The definition of `cross_entropy`, for reading and for tests."""

from __future__ import annotations

from torch import Tensor

from ssm_modal.kernels.checks import state_dtype


def cross_entropy_ref(
    logits: Tensor, targets: Tensor, *, scale: Tensor | None = None, gradient: bool = False
) -> tuple[Tensor, Tensor | None]:
    """loss = sum over rows of log(sum exp(logits)) - logits[target]; its gradient is softmax - onehot.

    Arguments and results as of `cross_entropy`; in fp32, or fp64 for fp64 logits.
    """
    x = logits.to(state_dtype(logits.dtype))
    at = targets[:, None]
    loss = (x.logsumexp(-1, keepdim=True) - x.gather(1, at)).sum()
    if not gradient:
        return loss, None
    grad = x.softmax(-1).scatter_add(1, at, -x.new_ones(at.shape))
    return loss, (grad if scale is None else grad * scale).to(logits.dtype)
