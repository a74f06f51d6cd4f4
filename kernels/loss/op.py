"""The public `cross_entropy`: checks its arguments and asks the dispatcher; the gradient is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_modal.kernels.checks import FLOATING, check_classes, check_dtype, check_tensor, state_dtype
from ssm_modal.kernels.dispatch import resolve


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    scale: Tensor | None = None,
    gradient: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Summed cross-entropy in nats of rows of logits, and `scale` times its gradient if it is asked for.

    Not differentiable: made for the inside of an `autograd.Function` that takes the gradient while the logits
    are there. softmax - onehot is taken in fp32 and rounded once.

    Args:
        logits: (rows, vocab), fp32, bf16, fp16 or fp64; left as they are.
        targets: (rows,) int64, each a class.
        scale: () of any floating dtype; None for 1.
        gradient: whether the gradient is wanted.
        backend: None to choose, "triton" or "torch".

    Returns (loss () in fp32, or fp64 for fp64 logits; the gradient as logits, contiguous, or None).

    Raises TypeError or ValueError for arguments of wrong type, dtype or shape and ValueError for targets
    outside the vocabulary (on CUDA a device-side assertion), BackendError for a backend that cannot serve.
    """
    op = "cross_entropy"
    check_tensor(op, "logits", logits)
    check_dtype(op, "logits", logits, FLOATING)
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"{op}: logits has shape {tuple(logits.shape)}, expected (rows, vocab)")
    check_tensor(op, "targets", targets)
    check_dtype(op, "targets", targets, (torch.int64,))
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"{op}: targets has shape {tuple(targets.shape)}, expected ({logits.shape[0]},), "
            "the rows of logits"
        )
    check_classes(f"{op}: targets", targets, logits.shape[1])
    at = targets[:, None]
    grad: Tensor | None = None
    if resolve(op, logits.device, logits.dtype, backend) == "triton":
        from ssm_modal.kernels.loss.triton_softmax import row_softmax

        largest, rest, grad = row_softmax(logits, scale, gradient)
        # The gather sees targets out of range.
        picked = logits.gather(1, at).float() - largest[:, None] - rest[:, None]
    else:
        log_p = torch.log_softmax(logits.to(state_dtype(logits.dtype)), dim=-1)
        picked = log_p.gather(1, at)
        if gradient:
            grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
            if scale is None:
                torch.exp(log_p, out=grad)
            else:
                grad.copy_(log_p.exp_().mul_(scale))
    if grad is not None:
        at_target = picked.expm1()
        grad.scatter_(1, at, (at_target if scale is None else at_target * scale).to(grad.dtype))
    return -picked.sum(), grad
