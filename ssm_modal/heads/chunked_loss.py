"""Cross-entropy over a large vocabulary, a chunk of positions at a time: the full logits never exist."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssm_modal.backbone.recompute import (
    RandomState,
    Surroundings,
    hooks_held,
    refuse_second_derivatives,
)
from ssm_modal.kernels.checks import check_classes
from ssm_modal.kernels.loss import cross_entropy

IGNORE = -100
"""The label of a position at which nothing is predicted."""

# Elements of one chunk's logits: on CUDA enough to keep a matrix unit busy (1 GiB in fp32), on a CPU 64 MiB.
_CUDA_ELEMENTS, _CPU_ELEMENTS = 1 << 28, 1 << 24


def default_chunk(vocab_size: int, device: torch.device) -> int:
    """Positions a chunk for logits over `vocab_size` classes on `device`."""
    elements = _CPU_ELEMENTS if device.type == "cpu" else _CUDA_ELEMENTS
    return max(1, elements // vocab_size)


def chunked_cross_entropy(
    logits: Callable[[Tensor], Tensor],
    parameters: Iterable[Tensor],
    hidden: Tensor,
    labels: Tensor,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats and the number of targets, with logits of `chunk` positions at a time.

    Equal to `cross_entropy(logits(hidden).float(), labels, ignore_index=-100, reduction="sum")` in value and
    in every gradient. Each chunk's gradients are taken while its logits are there, in the forward, and only
    scaled in the backward, so that nothing is computed twice. Where the logits are fp16 (or autocast makes
    them so) the backward computes them again, with the loss's scale in hand, since fp16 gradients need it.
    Logits are computed at labelled positions alone; finding them reads the labels' device once a call.

    Args:
        logits: (rows, d_model) to (rows, vocab) logits, each row on its own, any floating dtype.
        parameters: every tensor requiring gradients that `logits` uses; others may be among them.
        hidden: (..., d_model).
        labels: (...) int64, -100 where nothing is predicted.
        chunk: positions whose logits exist at once, at least 1.

    Returns (loss () in fp32, or fp64 for fp64 logits; count () int64). First derivatives only.

    Raises TypeError or ValueError for arguments of wrong type or shape, ValueError for labels outside the
    vocabulary (a device-side assertion on CUDA).
    """
    if not isinstance(chunk, int) or isinstance(chunk, bool):
        raise TypeError(f"chunk must be a whole number, got {type(chunk).__name__}")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected 1 or more positions")
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:-1])}, that of hidden "
            "without its last axis"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels has dtype {labels.dtype}, expected int64")
    rows = hidden.reshape(-1, hidden.shape[-1])
    targets = labels.reshape(-1)
    found = (targets != IGNORE).nonzero().squeeze(1)
    if len(found) < len(targets):
        rows, targets = rows[found], targets[found]
    count = torch.tensor(len(found), device=labels.device)
    wanted = tuple(p for p in parameters if p.requires_grad)
    work = _Chunks(logits, wanted, chunk, hidden.device)
    if torch.is_grad_enabled() and (hidden.requires_grad or wanted):
        loss = _ChunkedLoss.apply(work, rows, targets, *wanted)
    else:
        loss = work.loss(rows, targets)
    return loss, count


class _Chunks:
    """One call of `chunked_cross_entropy`: how to go through its chunks."""

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        parameters: tuple[Tensor, ...],
        chunk: int,
        device: torch.device,
    ) -> None:
        self.logits, self.parameters, self.chunk = logits, parameters, chunk
        self.surroundings = Surroundings(device)

    def scaled_later(self, rows: Tensor) -> bool:
        """Whether the gradients must wait for the loss's scale."""
        return rows.dtype == torch.float16 or self.surroundings.narrow

    def _spans(self, rows: Tensor) -> Iterator[tuple[int, int]]:
        for start in range(0, max(1, len(rows)), self.chunk):
            yield start, min(start + self.chunk, len(rows))

    def loss(self, rows: Tensor, targets: Tensor) -> Tensor:
        """The summed loss, without gradients."""
        total = None
        for start, end in self._spans(rows):
            logits = self.surroundings.run(self.logits, rows[start:end], grad=False)
            part, _ = cross_entropy(_checked(logits, targets[start:end]), targets[start:end])
            total = part if total is None else total + part
        assert total is not None
        return total

    def gradients(
        self, rows: Tensor, targets: Tensor, scale: Tensor | None, need_rows: bool
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """The summed loss, and the gradients of `scale` (None: 1) times it for rows and parameters."""
        drows = torch.empty_like(rows) if need_rows else None
        sums: list[Tensor | None] = [None] * len(self.parameters)
        total = None
        for start, end in self._spans(rows):
            own = rows[start:end].detach().requires_grad_(need_rows)
            logits = self.surroundings.run(self.logits, own, grad=True)
            with torch.no_grad():
                given = _checked(logits.detach(), targets[start:end])
                part, dlogits = cross_entropy(given, targets[start:end], scale=scale, gradient=True)
                total = part if total is None else total + part
            if not logits.requires_grad:
                continue
            wanted = [own, *self.parameters] if need_rows else list(self.parameters)
            with hooks_held(self.parameters):
                found = list(torch.autograd.grad(logits, wanted, dlogits, allow_unused=True))
            del logits, dlogits, given
            if drows is not None:
                own_grad = found.pop(0)
                drows[start:end] = 0 if own_grad is None else own_grad
            for i, g in enumerate(found):
                mine = sums[i]
                if g is None:
                    continue
                if mine is not None:
                    mine.add_(g)
                else:
                    wide = torch.float32 if g.dtype in (torch.bfloat16, torch.float16) else g.dtype
                    sums[i] = g.to(wide, copy=True)
        assert total is not None
        return total, drows, sums


def _checked(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must give (rows, vocab) floating logits, got {tuple(logits.shape)} in {logits.dtype}"
        )
    check_classes("labels", targets, logits.shape[1], f", or {IGNORE} for no target")
    return logits


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss of `_Chunks`."""

    @staticmethod
    def forward(ctx: Any, work: _Chunks, rows: Tensor, targets: Tensor, *parameters: Tensor) -> Tensor:
        ctx.work = work
        ctx.later = work.scaled_later(rows)
        if ctx.later:
            ctx.random = RandomState.of(rows.device)
            ctx.save_for_backward(rows, targets)
            return work.loss(rows, targets)
        loss, drows, sums = work.gradients(rows, targets, None, ctx.needs_input_grad[1])
        grads = [drows, *sums]
        ctx.present = [g is not None for g in grads]
        ctx.save_for_backward(*(g for g in grads if g is not None))
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        refuse_second_derivatives("chunked_cross_entropy")
        work: _Chunks = ctx.work
        grads: list[Tensor | None]
        if ctx.later:
            rows, targets = ctx.saved_tensors
            after = RandomState.of(rows.device)
            ctx.random.restore(rows.device)
            _, drows, sums = work.gradients(rows, targets, dloss, ctx.needs_input_grad[1])
            after.restore(rows.device)
            grads = [drows, *sums]
        else:
            saved = iter(ctx.saved_tensors)
            grads = [next(saved) * dloss if there else None for there in ctx.present]
        drows, sums = grads[0], grads[1:]
        narrowed = (None if g is None else g.to(p.dtype) for g, p in zip(sums, work.parameters))
        return (None, drows, None, *narrowed)
