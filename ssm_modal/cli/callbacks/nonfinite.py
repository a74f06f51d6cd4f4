"""Stop at the first loss or gradient that is not finite, and say where it first showed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves


class NonFiniteError(RuntimeError):
    """Training met a loss or gradient that is NaN or infinite."""


class StopOnNonFinite(Callback):
    """Checks loss and gradient norm before each optimizer step, so that no broken step is ever taken.

    The weights are then still the ones that made the number, so running the batch again, with the same random
    numbers, shows the first module whose output is not finite. Also logs `grad_norm` (before clipping).
    """

    def __init__(self) -> None:
        # The micro-batches of the optimizer step at hand: their counter, the batch and its loss.
        self._window: list[tuple[int, Any, Tensor]] = []
        self._at: tuple[int, Any] | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._at = (trainer.fit_loop.epoch_loop.batch_progress.total.ready, batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._at is not None:
            self._window.append((*self._at, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        window, self._window = self._window, []
        losses = torch.stack([loss for _, _, loss in window]).double()
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            # fp16's loss scaling meets infinite gradients on purpose, skips the step and lowers the scale.
            norm = norm / scaler.get_scale()
            checked = losses.sum()
        else:
            checked = losses.sum() + norm
        # One read of the device a step.
        if math.isfinite(float(checked)):
            pl_module.log("grad_norm", norm)
            return
        raise NonFiniteError(self._message(trainer, pl_module, window, losses))

    def _message(
        self,
        trainer: Trainer,
        module: LightningModule,
        window: list[tuple[int, Any, Tensor]],
        losses: Tensor,
    ) -> str:
        step = trainer.global_step + 1
        where = f"at step {step}"
        folder = Path(trainer.default_root_dir) / "checkpoints"
        kept = (
            f"the checkpoints in {folder} are from before"
            if folder.is_dir()
            else "there is no checkpoint yet"
        )
        advice = (
            f"the run stopped and no broken step was taken; {kept}. A lower learning rate, a longer warm-up "
            "or gradient clipping usually helps"
        )
        for (counter, batch, _), loss in zip(window, losses.tolist()):
            if not math.isfinite(loss):
                seen = first_nonfinite(trainer, module, counter, batch)
                return f"the loss is {loss} {where} (batch {counter}); it first showed in {seen}; {advice}"
        broken = [
            n for n, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
        ]
        # The gradient comes from the loss's side: the last parameter in forward order was reached first.
        seen = (
            f"the gradient of {broken[-1]} ({len(broken)} in all)" if broken else "the norm of all gradients"
        )
        return f"the loss is finite {where} but the gradient is not; it first showed in {seen}; {advice}"


def first_nonfinite(trainer: Trainer, module: LightningModule, counter: int, batch: Any) -> str:
    """Where a NaN or infinity first shows when `batch` runs again: a parameter, a module or the loss."""
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name}, which was no longer finite before the step"
    step: Any = getattr(module, "step", None)
    if step is None:
        return f"an unknown layer ({type(module).__name__} has no step(batch, stage) to run again)"
    found: list[str] = []
    names = {child: name for name, child in module.named_modules()}

    def hook(child: nn.Module, inputs: Any, output: Any) -> None:
        if not found and not _finite(output):
            found.append(f"the output of {names[child] or 'the task'} ({type(child).__name__})")

    handles = [child.register_forward_hook(hook) for child in module.modules()]
    try:
        reseed: Any = getattr(module, "reseed", None)
        if reseed is not None:
            reseed(counter)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            step(batch, "train")
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself, which came from finite outputs"


def _finite(output: Any) -> bool:
    return all(
        bool(leaf.isfinite().all())
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    )
