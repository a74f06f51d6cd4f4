"""Stop at the first loss or gradient that is not finite, and say where it first showed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ssm_modal.cli.logged_steps import logs_this_step


class NonFiniteError(RuntimeError):
    """Training met a loss or gradient that is NaN or infinite."""


@dataclass
class _Step:
    """What there is to know about one optimizer step until it is known to be sound.

    window: its micro-batches: counter, batch and loss. losses, norms: their losses, and the norm of the
    gradient of each of `names`, on the device. checked: finite exactly where all that must be is. read: where
    `checked` arrives on the host, and the event that says when; None where nothing was sent ahead.
    """

    number: int
    window: list[tuple[int, Any, Tensor]]
    losses: Tensor
    names: list[str]
    norms: list[Tensor]
    checked: Tensor
    read: tuple[Tensor, torch.cuda.Event | None] | None = None

    def sound(self) -> bool:
        if self.read is None:
            return math.isfinite(float(self.checked))
        value, arrived = self.read
        if arrived is not None:
            arrived.synchronize()
        return math.isfinite(float(value))


class StopOnNonFinite(Callback):
    """Checks loss and gradient norm of every optimizer step, and no broken step is ever taken.

    The weights are then still the ones that made the number, so running the batch again, with the same random
    numbers, shows the first module whose output is not finite. Also logs `grad_norm` (before clipping).

    Reading the norm before each step would make the host wait for the device, and the device then for the
    host. Where the optimizer is fused, it leaves out a step itself, and all that follow, once it is told by a
    number on the device; the host reads that number a step later.
    """

    def __init__(self) -> None:
        self._window: list[tuple[int, Any, Tensor]] = []
        self._at: tuple[int, Any] | None = None
        # The step before this one, not read yet, and whether any step so far was broken, on the device.
        self._unread: _Step | None = None
        self._broken: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._window, self._unread, self._broken = [], None, None

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
        named = [(n, p.grad) for n, p in pl_module.named_parameters() if p.grad is not None]
        norms = list(torch._foreach_norm([grad for _, grad in named]))
        # Stacked before they are widened: a cast of each would be a launch of each.
        norm = torch.linalg.vector_norm(torch.stack([n.float() for n in norms]), dtype=losses.dtype)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            # fp16's loss scaling meets infinite gradients on purpose, skips the step and lowers the scale.
            norm = norm / scaler.get_scale()
            checked = losses.sum()
        else:
            checked = losses.sum() + norm
        if trainer.world_size > 1:
            # All processes leave a step out or none does, which would wait for the others at the next one.
            torch.distributed.all_reduce(checked)
        if logs_this_step(trainer):
            pl_module.log("grad_norm", norm.float())
        names = [name for name, _ in named]
        step = _Step(trainer.global_step + 1, window, losses, names, norms, checked)
        if scaler is None and all(group.get("fused") for group in optimizer.param_groups):
            self._tell(optimizer, step)
            self._settle(trainer, pl_module)
            self._unread = step
        elif not step.sound():
            raise NonFiniteError(self._message(trainer, pl_module, step))

    def _tell(self, optimizer: Any, step: _Step) -> None:
        """Let the fused optimizer leave out this step, if it or an earlier one is broken."""
        broken = ~step.checked.isfinite()
        self._broken = broken if self._broken is None else self._broken | broken
        optimizer.found_inf = self._broken.float()
        event = torch.cuda.Event() if step.checked.is_cuda else None
        step.read = step.checked.to("cpu", non_blocking=True), event
        if event is not None:
            event.record()

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise NonFiniteError if the step that was not read yet is broken."""
        step, self._unread = self._unread, None
        if step is not None and not step.sound():
            raise NonFiniteError(self._message(trainer, pl_module, step))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._settle(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer, pl_module)
        for optimizer in trainer.optimizers:
            if getattr(optimizer, "found_inf", None) is not None:
                optimizer.found_inf = None  # type: ignore[attr-defined]

    def _message(self, trainer: Trainer, module: LightningModule, step: _Step) -> str:
        where = f"at step {step.number}"
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
        for (counter, batch, _), loss in zip(step.window, step.losses.tolist()):
            if not math.isfinite(loss):
                seen = first_nonfinite(trainer, module, counter, batch)
                return f"the loss is {loss} {where} (batch {counter}); it first showed in {seen}; {advice}"
        broken = [name for name, norm in zip(step.names, step.norms) if not norm.isfinite()]
        several = trainer.world_size > 1
        if several and not broken:
            return f"the loss of another process is not finite {where}, its message says more; {advice}"
        # The gradient comes from the loss's side: the last parameter in forward order was reached first.
        seen = (
            f"the gradient of {broken[-1]} ({len(broken)} in all)" if broken else "the norm of all gradients"
        )
        where += ", in this process," if several else ""
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
    modes = {child: child.training for child in module.modules()}
    if not module.training:
        # A validation that follows the step has put the modules in its own mode already.
        module.train()
    try:
        reseed: Any = getattr(module, "reseed", None)
        if reseed is not None:
            reseed(counter)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            step(batch, "train")
    finally:
        for handle in handles:
            handle.remove()
        for child, training in modes.items():
            child.training = training
    return found[0] if found else "the loss itself, which came from finite outputs"


def _finite(output: Any) -> bool:
    return all(
        bool(leaf.isfinite().all())
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    )
