"""Train by CUDA graphs: for small models, whose steps are bound by the host that launches their kernels."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class CudaGraphs(Callback):
    """Records forward and backward of the training step as a CUDA graph, one for each kind of batch.

    See `ssm_modal.tasks.graphed.GraphedStep` for what is recorded and what cannot be. On a device that has no
    CUDA graphs it says so when training starts, and the steps run one kernel at a time; their values are the
    same.

    Args:
        most: kinds of batches (names, shapes and dtypes of their tensors) that may be recorded.

    Raises ValueError for `most` below 1, and when training starts for a task that cannot train by graphs.
    """

    def __init__(self, most: int = 16) -> None:
        if most < 1:
            raise ValueError(f"CudaGraphs.most is {most}, expected at least 1")
        self.most = most

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ask: Any = getattr(pl_module, "train_by_graphs", None)
        if ask is None:
            raise ValueError(
                f"CudaGraphs needs a task derived from ssm_modal.tasks.TrainingTask, got "
                f"{type(pl_module).__name__}"
            )
        if pl_module.device.type != "cuda":
            if trainer.is_global_zero:
                print(f"CudaGraphs: the device {pl_module.device} has none; steps run as they are")
            return
        ask(self.most)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        leave: Any = getattr(pl_module, "train_eagerly", None)
        if leave is not None:
            leave()
