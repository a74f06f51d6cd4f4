"""What every training task shares: the model, AdamW and its schedule, exact means, resuming."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssm_modal
from ssm_modal.backbone import BackboneBase
from ssm_modal.checkpoints.fit import check_fit
from ssm_modal.cli.logged_steps import logs_this_step
from ssm_modal.errors import CheckpointError
from ssm_modal.heads.chunked_loss import IGNORE
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers import collect_routing, load_balancing_loss
from ssm_modal.layers.moe import moe_layers
from ssm_modal.tasks.architecture import architecture_differences
from ssm_modal.tasks.graphed import GraphedStep
from ssm_modal.tasks.optimizers import OptimizerConfig, build_optimizer
from ssm_modal.tasks.schedules import ScheduleConfig, build_schedule, run_factor
from ssm_modal.tasks.step_output import StepOutput

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.callbacks import WeightAveraging
except ImportError as error:
    raise ImportError('training needs Lightning: pip install "ssm-modal[train]"') from error

DEFAULT_OPTIMIZER = OptimizerConfig()
DEFAULT_SCHEDULE = ScheduleConfig()
Recompute = Literal["none", "blocks"]
InitPart = Literal["all", "backbone", "encoder"]

MODEL_INPUTS = ("ids", "waveform", "pixels", "images")
_CHECKPOINT_KEY = "ssm_modal"


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats, and the number of targets.

    logits: (batch, length, vocab), any floating dtype, the sum is taken in fp32 (fp64 for fp64). labels:
    (batch, length) int64, aligned with the logits, -100 where nothing is predicted.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, expected {tuple(logits.shape[:-1])}, the logits'"
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, (labels != IGNORE).sum()


def model_input(batch: Mapping[str, Any]) -> Tensor:
    """What the model reads of a batch: its `ids` or `waveform` (batch, length), its `pixels` (batch, length,
    channels) or its `images` (batch, channels, height, width)."""
    for name in MODEL_INPUTS:
        if name in batch:
            return batch[name]
    raise ValueError(
        f"the batch has the keys {', '.join(map(str, batch))}, expected one of {', '.join(MODEL_INPUTS)}"
    )


class TrainingTask(LightningModule):
    """A model of the registry, trained by AdamW. A task derives from it and writes `step`.

    Args:
        model: a name of `ssm_modal.list_models()`.
        overrides: fields of its config to change, as in `ssm_modal.create_model(model, **overrides)`.
        optimizer: AdamW and its parameter groups.
        schedule: the learning rate over the run.
        init_from: weights to start from: a folder of `save_pretrained`, a run's folder or a `.ckpt`.
        init_part: "all" of them; the "encoder", which is the token embedding and the backbone, under a new
            head; or the "backbone" alone, under a new head and embedding. Names and shapes must be the same.
        recompute: "blocks" keeps only the input of each block in training and computes the rest of it again
            in the backward (memory: one block's activations beside the inputs of all), for models that need
            the whole sequence, such as bidirectional ones; "none" leaves it to the model's own
            `gradient_checkpointing`. Gradients are the same.

    A batch is a dict with `ids` (batch, length) int64, `waveform` (batch, length) float32, `pixels` (batch,
    length, channels) float32 or `images` (batch, channels, height, width) float32, `labels` (-100 where
    nothing is predicted) and optionally `cu_seqlens`, which becomes `seqs`, a `Sequences`, checked once
    a batch and on the host.
    """

    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        model: str,
        overrides: dict[str, Any] | None = None,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        schedule: ScheduleConfig = DEFAULT_SCHEDULE,
        init_from: str | None = None,
        init_part: InitPart = "all",
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        if init_part not in ("all", "backbone", "encoder"):
            raise ValueError(f"init_part is {init_part!r}, expected all, backbone or encoder")
        if recompute not in ("none", "blocks"):
            raise ValueError(f"recompute is {recompute!r}, expected none or blocks")
        overrides = dict(overrides or {})
        self.optimizer_config, self.schedule_config = optimizer, schedule
        self.model = self.make_model(model, overrides)
        # Plain data only: a checkpoint must load under torch.load(weights_only=True).
        self.save_hyperparameters(
            {"model": model, "overrides": overrides, "model_config": self.model_config()}
        )
        if init_from is not None:
            self._start_from(init_from, init_part)
        self.recompute = recompute
        if recompute == "blocks":
            self._backbone("recompute").gradient_checkpointing = True
        self._totals: dict[str, Tensor] = {}
        self._graphed: GraphedStep | None = None

    # ------------------------------------------------------------------ what a task writes

    def step(self, batch: Mapping[str, Any], stage: str) -> StepOutput:
        """The loss of one batch on the device, and what else `stage` ("train", "val" or "test") measures."""
        raise NotImplementedError(f"{type(self).__name__} must define step(batch, stage)")

    def derived_metrics(self, stage: str, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics computed from the exact means of a whole validation or test, such as perplexity."""
        return {}

    # ------------------------------------------------------------------ model

    def make_model(self, name: str, overrides: dict[str, Any]) -> nn.Module:
        """The model to train; called once, from `__init__`."""
        return ssm_modal.create_model(name, **overrides)

    def forward(self, ids: Tensor, state: Any = None, *, seqs: Sequences | None = None) -> tuple[Tensor, Any]:
        """As the model's forward: `(logits, state)`."""
        return self.model(ids, state, seqs=seqs)

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """The model's logits for a batch, packed or not."""
        x, seqs = model_input(batch), batch.get("seqs")
        out = self.model(x, seqs=seqs) if seqs is not None else self.model(x)
        return out if isinstance(out, Tensor) else out[0]  # models of images carry no state

    def model_config(self) -> dict[str, Any]:
        """The model's whole config as plain data."""
        return self.model.config.to_dict()  # type: ignore[union-attr, operator]

    def _backbone(self, option: str) -> BackboneBase:
        """The model's backbone; `option` is the argument that needs one."""
        backbone = getattr(self.model, "backbone", None)
        if not isinstance(backbone, BackboneBase):
            raise ValueError(f"{option} needs a model with a backbone, {type(self.model).__name__} has none")
        return backbone

    def check_segment(self, option: str, segment: int | None) -> None:
        """Raise ValueError where `segment`, the argument `option`, is not a length to run this model by."""
        if segment is None:
            return
        if isinstance(segment, bool) or not isinstance(segment, int) or segment < 1:
            raise ValueError(f"{option} is {segment!r}, expected a whole number of 1 or more tokens, or null")
        if not self._backbone(option).has_state:
            raise ValueError(
                f"{option} is {segment}, but {self.hparams['model']} has a layer that needs the whole "
                "sequence and carries no state; set recompute: blocks instead"
            )

    def _start_from(self, path: str, part: InitPart) -> None:
        source: Any = ssm_modal.load_pretrained(path)
        for name, target, given in _parts(self.model, source, f"init_from={path!r}", part):
            tensors = given.state_dict()
            try:
                check_fit(target, tensors, f"init_from={path!r} ({name})")
            except CheckpointError as error:
                other = "" if part == "backbone" else ", or take init_part: backbone"
                raise CheckpointError(f"{error}; set the model's overrides as there{other}") from None
            target.load_state_dict(tensors)

    # ------------------------------------------------------------------ optimisation

    def configure_optimizers(self) -> Any:
        """AdamW, with the schedule moved once an optimizer step."""
        # Under mixed precision Lightning refuses to clip gradients beside a fused optimizer, bf16 included.
        allow_fused = "mixed" not in str(self.trainer.precision)
        optimizer = build_optimizer(self, self.optimizer_config, allow_fused=allow_fused)
        schedule = build_schedule(
            optimizer, self.schedule_config, self.optimizer_config.lr, int(self.trainer.max_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.reseed()

    def reseed(self, counter: int | None = None) -> None:
        """Seed every generator for the training batch at hand, a function of (seed, process, batch counter).

        So dropout draws the same numbers after a resume, without any generator's state in the checkpoint.
        Does nothing where the run has no seed (`seed_everything` was never called).
        """
        seed = os.environ.get("PL_GLOBAL_SEED")
        if seed is None:
            return
        if counter is None:
            counter = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        # Seeding with a string hashes it (SHA-512), the same in every process.
        own = random.Random(f"{seed}/{self.trainer.global_rank}/{counter}").getrandbits(63)
        random.seed(own)
        if self.device.type == "cpu":
            # torch.manual_seed would take down the whole stack for a GPU that may come: 2 ms at every step.
            torch.default_generator.manual_seed(own)
        else:
            torch.manual_seed(own)
        try:
            import numpy as np
        except ImportError:
            return
        np.random.seed(own % 2**32)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The mean loss over the targets of all processes' batches, and of a mixture of experts the
        load-balancing loss of this process' batch times `aux_loss_coef`."""
        with collect_routing(self.model) as routing:
            out = self._train_step(batch)
        totals = torch.stack([out.loss.detach().double(), out.count.double()])
        world = int(self.trainer.world_size)
        if world > 1:
            torch.distributed.all_reduce(totals)
        count = totals[1].clamp(min=1)
        # DDP averages gradients over the processes: with this factor the result is the mean over all targets,
        # also where the processes hold unequal numbers of them.
        loss = out.loss * (world / count).to(out.loss.dtype)
        if routing:
            balance = load_balancing_loss(routing)
            loss = loss + self._backbone("aux_loss_coef").config.aux_loss_coef * balance
            if logs_this_step(self.trainer):
                self.log("train/load_balancing_loss", balance.detach().float())
        if logs_this_step(self.trainer):
            self.log("train/loss", (totals[0] / count).float(), prog_bar=True)
        return loss

    def _train_step(self, batch: Mapping[str, Any]) -> StepOutput:
        return self.step(batch, "train") if self._graphed is None else self._graphed(batch)

    def train_by_graphs(self, most: int) -> None:
        """From now on forward and backward of a training step are one CUDA graph for each kind of batch.

        most: kinds that may be recorded; see `GraphedStep`. Raises ValueError for a mixture of experts, whose
        load-balancing loss is added outside of what is recorded.
        """
        if moe_layers(self.model):
            raise ValueError(
                f"{type(self.model).__name__} is a mixture of experts, whose training steps cannot be CUDA "
                "graphs; leave CudaGraphs out"
            )
        self._graphed = GraphedStep(
            lambda batch: self.step(batch, "train"), list(self.parameters()), most=most
        )

    def train_eagerly(self) -> None:
        """Training steps run one kernel at a time again; what was recorded is let go."""
        self._graphed = None

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        if logs_this_step(self.trainer):
            self.log("lr", optimizer.param_groups[0]["lr"])

    # ------------------------------------------------------------------ validation and test

    def on_validation_epoch_start(self) -> None:
        self._totals = {}

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._add(self.step(batch, "val"))

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_test_epoch_start(self) -> None:
        self._totals = {}

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._add(self.step(batch, "test"))

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def _add(self, out: StepOutput) -> None:
        for name, (total, count) in {**out.sums, "loss": (out.loss, out.count)}.items():
            pair = torch.stack([total.detach().double(), count.double()])
            self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def _log_means(self, stage: str) -> None:
        means = self.reduce_totals()
        for name, value in {**means, **self.derived_metrics(stage, means)}.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "loss")

    def reduce_totals(self) -> dict[str, float]:
        """The exact mean of every metric over the batches of all processes so far (same names everywhere)."""
        names = sorted(self._totals)
        world = int(self.trainer.world_size)
        if world > 1:
            # A process that had no batch has no totals: the names travel too.
            gathered: list[Any] = [None] * world
            torch.distributed.all_gather_object(gathered, {n: self._totals[n].tolist() for n in names})
        else:
            gathered = [{n: self._totals[n].tolist() for n in names}]
        means = {}
        for name in sorted({n for one in gathered for n in one}):
            total = math.fsum(one[name][0] for one in gathered if name in one)
            count = math.fsum(one[name][1] for one in gathered if name in one)
            means[name] = total / count if count else math.nan
        return means

    # ------------------------------------------------------------------ batches and checkpoints

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; `cu_seqlens` becomes `seqs`, checked on the host, so no layer reads the device."""
        if not isinstance(batch, dict) or "cu_seqlens" not in batch:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        rest = {k: v for k, v in batch.items() if k != "cu_seqlens"}
        host = batch["cu_seqlens"].cpu()
        seqs = Sequences.from_cu_seqlens(host, model_input(batch).shape[1], host.device)
        moved = super().transfer_batch_to_device(rest, device, dataloader_idx)
        return {**moved, "seqs": seqs.to(device)}

    @property
    def run_dir(self) -> Path:
        """The folder of the run, where a task writes its results."""
        return Path(self.trainer.default_root_dir)

    def setup(self, stage: str) -> None:
        self.check_data(getattr(self.trainer, "datamodule", None))

    def check_data(self, data: Any) -> None:
        """Raise ValueError where the model cannot take the ids of the data module `data`."""
        have = self.hparams["model_config"].get("vocab_size")
        wanted = getattr(data, "vocab_size", None) if have is not None else None
        if isinstance(wanted, int) and isinstance(have, int) and wanted > have:
            raise ValueError(
                f"the data has a vocabulary of {wanted} ids, but the model's vocab_size is {have}; set "
                f"model.init_args.overrides.vocab_size to {wanted} or more"
            )

    def check_steps(self, max_steps: int) -> None:
        """Raise ValueError where the schedule does not fit in a run of `max_steps` optimizer steps."""
        run_factor(self.schedule_config, self.optimizer_config.lr, max_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_CHECKPOINT_KEY] = {
            "version": ssm_modal.__version__,
            "task": f"{type(self).__module__}.{type(self).__qualname__}",
            "seed": os.environ.get("PL_GLOBAL_SEED"),
            "world_size": int(self.trainer.world_size),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError for a checkpoint of another architecture; in resuming also of another seed, and
        for one that averaged its weights where this run does not."""
        there = checkpoint.get("hyper_parameters", {}).get("model_config")
        if there is not None:
            wrong = architecture_differences(there, self.model_config())
            if wrong:
                raise ValueError("the checkpoint is of another architecture: " + _some(wrong))
        about = checkpoint.get(_CHECKPOINT_KEY, {})
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        if not fitting or not about:
            return
        seed = os.environ.get("PL_GLOBAL_SEED")
        if about["seed"] != seed:
            raise ValueError(
                f"the checkpoint is of a run with seed {about['seed']}, but this one has seed {seed}: it "
                "would not go on with the same batches; use the same --seed_everything, or another run_dir"
            )
        trainer: Any = self.trainer
        averaging = any(isinstance(c, WeightAveraging) for c in trainer.callbacks)
        if "current_model_state" in checkpoint and not averaging:
            raise ValueError(
                "the checkpoint is of a run that averages its weights, but this one does not: it would go on "
                "from the average with an optimizer that is at the weights; give the callback WeightAverage "
                "in trainer.callbacks as there, or start another run from the average with init_from"
            )


def _parts(target: Any, source: Any, where: str, part: InitPart) -> list[tuple[str, nn.Module, nn.Module]]:
    """The modules of the models `target` and `source` that `part` means, each with its name."""
    if part == "all":
        return [("all", target, source)]
    names = ["backbone"] if part == "backbone" else ["token_embedding", "backbone"]
    for whose, model in ((where, source), ("the model", target)):
        for name in names:
            if getattr(model, name, None) is None:
                raise ValueError(
                    f"init_part is {part!r}, but {whose} is a {type(model).__name__} without "
                    f"{name.replace('_', ' ')}"
                )
    return [(name.replace("_", " "), getattr(target, name), getattr(source, name)) for name in names]


def _some(items: list[str], most: int = 4) -> str:
    more = len(items) - most
    return "; ".join(items[:most]) + (f"; and {more} more" if more > 0 else "")
