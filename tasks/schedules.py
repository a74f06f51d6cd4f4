"""Learning-rate schedules: warm-up, then constant, linear, cosine or warm-up-stable-decay (WSD)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over the run, as a factor on the peak rate of each parameter group.

    Attributes:
        kind: after the warm-up "constant", "linear" or "cosine" down to the end (Loshchilov and Hutter, arXiv
            1608.03983, one cycle), or "wsd": constant, then linear over the last `decay_fraction` of the
            steps (Hu et al., arXiv 2404.06395).
        warmup_steps: optimizer steps of the linear warm-up; step `warmup_steps`, from 0, is the first at the
            peak.
        min_lr: the rate reached at the last step, for a group without a multiplier. Unused by "constant".
        decay_fraction: share of all steps that "wsd" decays over.
        total_steps: steps of the whole schedule; None takes the trainer's `max_steps`.
    """

    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    min_lr: float = 0.0
    decay_fraction: float = 0.2
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "cosine", "wsd"):
            raise ValueError(f"schedule.kind is {self.kind!r}, expected constant, linear, cosine or wsd")
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps is {self.warmup_steps}, expected 0 or more")
        if self.min_lr < 0:
            raise ValueError(f"schedule.min_lr is {self.min_lr}, expected 0 or more")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(
                f"schedule.decay_fraction is {self.decay_fraction}, expected above 0 and at most 1"
            )
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"schedule.total_steps is {self.total_steps}, expected 1 or more")


def schedule_factor(config: ScheduleConfig, peak_lr: float, total_steps: int) -> Callable[[int], float]:
    """The factor on the peak rate at each optimizer step, counted from 0.

    Raises ValueError where the warm-up does not fit in `total_steps` or `min_lr` is above `peak_lr`.
    """
    if config.warmup_steps >= total_steps and config.kind != "constant":
        raise ValueError(
            f"schedule.warmup_steps is {config.warmup_steps}, expected fewer than the {total_steps} steps of "
            "the run"
        )
    if config.min_lr > peak_lr:
        raise ValueError(f"schedule.min_lr is {config.min_lr}, expected at most optimizer.lr = {peak_lr}")
    floor = config.min_lr / peak_lr
    warmup = config.warmup_steps
    if config.kind == "wsd":
        decay_from = max(warmup, total_steps - round(config.decay_fraction * total_steps))
    else:
        decay_from = warmup
    # Step `decay_from` is still at the peak; the last step, total_steps - 1, is at the floor.
    span = max(1, total_steps - 1 - decay_from)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.kind == "constant" or step < decay_from:
            return 1.0
        progress = min(1.0, (step - decay_from) / span)
        shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
        return floor + (1 - floor) * shape

    return factor


def run_factor(config: ScheduleConfig, peak_lr: float, max_steps: int) -> Callable[[int], float]:
    """`schedule_factor` over `config.total_steps`, or `max_steps` where that is None.

    Raises ValueError as there, and where neither says how long the run is and the schedule needs to know.
    """
    total = config.total_steps if config.total_steps is not None else max_steps
    if total < 1 and config.kind != "constant":
        raise ValueError(
            f"the {config.kind} schedule needs the length of the run: set trainer.max_steps (it is "
            f"{max_steps}) or schedule.total_steps"
        )
    return schedule_factor(config, peak_lr, max(total, 1))


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, peak_lr: float, max_steps: int) -> LambdaLR:
    """The schedule of `optimizer` in a run of `max_steps`; raises as `run_factor`."""
    return LambdaLR(optimizer, run_factor(config, peak_lr, max_steps))
