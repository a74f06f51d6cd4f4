"""Which optimizer steps reach the loggers."""

from __future__ import annotations

from lightning.pytorch import Trainer


def logs_this_step(trainer: Trainer) -> bool:
    """Whether what is logged during the step at hand is written: every `log_every_n_steps` of them.

    Lightning leaves the values of all other steps aside, but only after it has taken them in, which costs the
    host most of a millisecond each, and launches on a GPU.
    """
    return (trainer.global_step + 1) % max(1, getattr(trainer, "log_every_n_steps", 1)) == 0
