"""`ssm-modal fit|validate|test|predict`: LightningCLI in subclass mode, with one fixed folder a run."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ssm_modal.cli.callbacks import Progress, RunCheckpoint, StopOnNonFinite
from ssm_modal.cli.checkpoint_io import AtomicCheckpointIO
from ssm_modal.cli.configs import find_config
from ssm_modal.cli.csv_logger import CsvLogger
from ssm_modal.cli.run_folder import RunFolder, given_option, seeded_run_dir
from ssm_modal.cli.suggest import check_keys, merged, option_tree, read_yaml
from ssm_modal.errors import CheckpointError, ConfigError
from ssm_modal.io.atomic import atomic_write
from ssm_modal.io.left_out import write_left_out

COMMANDS = ("fit", "validate", "test", "predict")

DEFAULT_SEED = 0

# What differs from Lightning's defaults: a run is counted in optimizer steps, over an endless stream of
# batches.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 500,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "logger": True,
}

# Switches that set an option of the task or the data module, where that has it: whose, and what it does.
FLAGS = {
    "plots": ("model", "Draw pictures into the run's folder, such as a confusion matrix."),
    "skip_bad": ("data", "Leave bad input out and list it instead of stopping (also: --skip-bad)."),
}

# Lightning's hints about things that are so on purpose here.
_HINTS = (
    ".*does not have many workers.*",
    ".*LeafSpec.*is deprecated.*",
    ".*overridden `transfer_batch_to_device`.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*is not resumable.*",
    ".*recommended to use `self.log.*sync_dist=True.*",
    ".*Total length of `list` across ranks is zero.*",  # a split that is not there is an empty list
    ".*does not have a test_dataloader.*",
    ".*litlogger.*",
    ".*`tensorboardX`.*",
    ".*Found .* module\\(s\\) in eval mode at the start of training.*",
    ".*GPU available but not used.*",
    ".*No device id is provided via `init_process_group`.*",
    ".*Trying to infer the `batch_size`.*",
)


class TrainingCLI(LightningCLI):
    """LightningCLI with a run folder, checkpoints that a killed run goes on from, and a test after training.

    Top-level keys beside LightningCLI's `trainer`, `model`, `data`, `seed_everything`: `run_dir`,
    `test_after_fit`, `checkpoint` (`RunCheckpoint`'s arguments).
    """

    def __init__(self, args: Sequence[str]) -> None:
        quieten()
        self.given = _plain_flags(args)
        self.resume_from: Path | None = None
        self.resume_step = 0
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=DEFAULT_SEED,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "exit_on_error": False,
                **{command: {"exit_on_error": False} for command in COMMANDS},
            },
            args=_with_shipped_configs(self.given),
        )

    # ------------------------------------------------------------------ configuration

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/default",
            help="The folder of the run: logs, checkpoints, results.",
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=True,
            help="Whether to test the best checkpoint after training.",
        )
        for name, (owner, text) in FLAGS.items():
            parser.add_argument(
                f"--{name}", action="store_true", help=f"{text} Short for {owner}.init_args.{name}: true."
            )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self._check_names(args)
        self.config = parser.parse_args(args)

    def _check_names(self, args: Sequence[str]) -> None:
        """Raise ConfigError for a key in a config file or an option that nothing takes."""
        command = args[0] if args and args[0] in COMMANDS else None
        if command is None:
            return
        _check_order(args[1:])
        valid = [action.dest for action in self._subcommand_parsers[command]._actions]
        config: dict[str, Any] = {}
        for path in _config_files(args):
            content = read_yaml(path)
            check_keys(content, valid, str(path))
            config = merged(config, content)
        options = option_tree(args[1:])
        for name in ("help", "config", "c", "print_config"):
            options.pop(name, None)
        # What an option may set depends on the class that the files, or another option, name.
        for key in ("model", "data"):
            named = config.get(key)
            if isinstance(options.get(key), dict) and isinstance(named, dict) and "class_path" in named:
                options[key] = {"class_path": named["class_path"], **options[key]}
        check_keys(options, valid, "the command line")

    def _parse_ckpt_path(self) -> None:
        # LightningCLI would read the model's arguments out of the checkpoint; here the config says what the
        # model is, and a checkpoint of another architecture is an error.
        return

    @property
    def settings(self) -> Any:
        """The configuration of the command at hand."""
        return self.config[self.subcommand]

    def _spread_flags(self) -> None:
        """Set the options that the switches stand for; ConfigError where the class has no such option."""
        for name, (owner, _) in FLAGS.items():
            if not self.settings[name]:
                continue
            chosen = self.settings.get(owner)
            if chosen is None or name not in chosen.init_args:
                what = "nothing" if chosen is None else chosen.class_path
                raise ConfigError(f"--{name} is given, but {owner} is {what}, which has no option {name!r}")
            chosen.init_args[name] = True
            self.settings[name] = False  # config.yaml says it in one place

    def before_instantiate_classes(self) -> None:
        self._spread_flags()
        settings = self.settings
        if not isinstance(settings.seed_everything, int) or isinstance(settings.seed_everything, bool):
            raise ConfigError(f"seed_everything is {settings.seed_everything}, expected an integer")
        if (
            given_option(self.given, "run_dir") is None
            and given_option(self.given, "seed_everything") is not None
        ):
            settings.run_dir = seeded_run_dir(
                settings.run_dir, settings.seed_everything, _config_seed(self.given)
            )
        self.folder = RunFolder(settings.run_dir)
        settings.trainer.default_root_dir = str(self.folder.path)
        if self.subcommand == "fit":
            self._check_fit(settings.trainer)
        self.resume_from = self._find_checkpoint(settings)
        if self.subcommand == "fit" and self.resume_from is not None:
            self.resume_step = int(AtomicCheckpointIO().load_checkpoint(self.resume_from)["global_step"])

    def _check_fit(self, trainer: Any) -> None:
        if trainer.max_steps < 1 and not trainer.fast_dev_run:
            raise ConfigError(
                f"trainer.max_steps is {trainer.max_steps}, expected the optimizer steps of the run, 1 or "
                "more (training data has no end of its own)"
            )
        every, accumulate = trainer.val_check_interval, trainer.accumulate_grad_batches
        if isinstance(every, int) and every % accumulate:
            raise ConfigError(
                f"trainer.val_check_interval is {every}, expected a multiple of "
                f"trainer.accumulate_grad_batches = {accumulate}: checkpoints are taken "
                "between optimizer steps only"
            )

    def _find_checkpoint(self, settings: Any) -> Path | None:
        """The checkpoint that the command starts from; None to start from the model's own weights."""
        which = settings.get("ckpt_path")
        if which is not None:
            return self.folder.checkpoint(str(which))
        if self.subcommand == "fit":
            return None
        if settings.model.init_args.get("init_from") is not None and not self.folder.checkpoints.is_dir():
            return None
        return self.folder.checkpoint_for_evaluation()

    # ------------------------------------------------------------------ running

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self.config_init[self.subcommand]["trainer"]
        if self.subcommand != "fit":
            # Evaluating must not write into the logs of the training.
            kwargs["logger"] = False
        elif trainer["logger"] is True and not trainer["fast_dev_run"]:
            kwargs["logger"] = self._loggers()
        plugins = trainer["plugins"] or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        callbacks = list(trainer["callbacks"] or []) + [StopOnNonFinite()]
        if trainer["enable_progress_bar"] is not False:
            callbacks.append(Progress())
        kwargs["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)

    def _loggers(self) -> list[Any]:
        loggers: list[Any] = [CsvLogger(self.folder.path)]
        # Events of steps that will be taken again are hidden.
        purge: dict[str, Any] = {"purge_step": self.resume_step} if self.resume_from is not None else {}
        loggers.append(
            TensorBoardLogger(
                str(self.folder.path),
                name="tensorboard",
                version="",
                default_hp_metric=False,
                **purge,
            )
        )
        return loggers

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = None if self.resume_from is None else str(self.resume_from)
        return kwargs

    def before_fit(self) -> None:
        """Make the run's folder ready: kept where the run goes on, an earlier one moved aside otherwise."""
        if self.settings.trainer.fast_dev_run:
            return
        if _first_process():
            check_steps = getattr(self.model, "check_steps", None)
            if check_steps is not None:
                check_steps(self.settings.trainer.max_steps)
            self._check_data()
            if self.resume_from is None:
                aside = self.folder.move_aside()
                if aside is not None:
                    say(f"the earlier run in {self.folder.path} is now in {aside}")
            else:
                self._check_resume(self.resume_from)
                self._forget_after_checkpoint()
            self.save_config()
        size = sum(p.numel() for p in self.model.parameters())
        where = f"going on from {self.resume_from}" if self.resume_from is not None else "from the start"
        say(
            f"{type(self.model).__name__} with {size:,} parameters on {self.trainer.strategy.root_device}, "
            f"precision {self.trainer.precision}, seed {self.settings.seed_everything}, {where}; "
            f"run folder {self.folder.path}"
        )

    def _check_data(self) -> None:
        """Data that is not there or does not fit must not cost an earlier run its place: find out before."""
        if self.datamodule is None:
            return
        self.datamodule.prepare_data()
        for owner, name, arguments in (
            (self.datamodule, "check_fit", ()),
            (self.model, "check_data", (self.datamodule,)),
        ):
            check = getattr(owner, name, None)
            if check is not None:
                check(*arguments)

    def _check_resume(self, path: Path) -> None:
        """A checkpoint of something else must not cost the run its config and logs: ask the model and the
        data what the trainer will ask them."""
        checkpoint = AtomicCheckpointIO().load_checkpoint(path)
        self.trainer.state.fn = TrainerFn.FITTING
        self.model.trainer = self.trainer
        kept = checkpoint.get(type(self.datamodule).__qualname__)
        try:
            self.model.on_load_checkpoint(checkpoint)
            if self.datamodule is not None and kept is not None:
                self.datamodule.trainer = self.trainer
                self.datamodule.load_state_dict(kept)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def _forget_after_checkpoint(self) -> None:
        """Drop the logged rows of steps that will be taken again."""
        for logger in self.trainer.loggers:
            if isinstance(logger, CsvLogger):
                logger.drop_from(self.resume_step)

    def save_config(self) -> None:
        """Write the whole configuration to the run's folder, from where it runs again."""
        parser = self._parser(self.subcommand)
        settings = self.settings.clone()
        settings["ckpt_path"] = None
        atomic_write(self.folder.config, parser.dump(settings, skip_none=False))

    def after_fit(self) -> None:
        """Test the best checkpoint where the task and the data have a test, and say what was left out."""
        if self.settings.trainer.fast_dev_run or not self.trainer.state.finished:
            return
        self._test_best()
        self.list_left_out()

    def _test_best(self) -> None:
        if self.settings.test_after_fit and _has_test(self.model, self.datamodule):
            best = self.folder.checkpoint_for_evaluation()
            say(f"testing {best}")
            metrics = self.trainer.test(
                self.model, datamodule=self.datamodule, ckpt_path=str(best), verbose=False
            )
            self.report("test", metrics)

    def validate(self, **kwargs: Any) -> None:
        self.report("validate", self.trainer.validate(**{**kwargs, "verbose": False}))
        self.list_left_out()

    def test(self, **kwargs: Any) -> None:
        self.report("test", self.trainer.test(**{**kwargs, "verbose": False}))
        self.list_left_out()

    def predict(self, **kwargs: Any) -> None:
        """Write what `predict_step` returns to `results/predictions.pt`, one file a process of several."""
        predictions = self.trainer.predict(**kwargs)
        whole = getattr(self.model, "predictions", None)
        if callable(whole):  # a task that goes on with a killed prediction has what is not returned
            predictions = whole()
        several = self.trainer.world_size > 1
        name = f"predictions-{self.trainer.global_rank}.pt" if several else "predictions.pt"
        path = self.folder.results / name
        AtomicCheckpointIO().save_checkpoint({"predictions": predictions}, path)
        forget = getattr(self.model, "forget_kept_batches", None)
        if callable(forget):
            forget()
        say(f"predictions of {len(predictions or [])} batches are in {path}")
        self.list_left_out()

    def list_left_out(self) -> None:
        """Say what the data module has left out, and write it to `left_out.csv`: in the run's folder where
        it was trained, in `results/` by the other commands."""
        left_out = getattr(self.datamodule, "left_out", ()) if self.datamodule is not None else ()
        if not left_out or not _first_process():
            return
        folder = self.folder.path if self.subcommand == "fit" else self.folder.results
        write_left_out(folder / "left_out.csv", left_out)
        say(f"left out, and listed in {folder / 'left_out.csv'}:")
        for one in left_out:
            say(f"  {one.path}: {one.reason}")

    def report(self, command: str, metrics: Any) -> None:
        """Print the measured means and write them to `results/<command>.json`."""
        if not _first_process() or not metrics:
            return
        found = {name: float(value) for one in metrics for name, value in one.items()}
        if not found:
            return
        width = max(len(name) for name in found)
        for name, value in sorted(found.items(), key=_numbers_by_size):
            print(f"{name:<{width}}  {value:.6g}")
        about = {"checkpoint": None if self.resume_from is None else str(self.resume_from), **found}
        if command == "test" and self.subcommand == "fit":
            about["checkpoint"] = str(self.folder.checkpoint_for_evaluation())
        atomic_write(self.folder.results / f"{command}.json", json.dumps(about, indent=2) + "\n")


def run(args: Sequence[str]) -> int:
    """Run `args`, the command line after the program's name. Returns the exit code."""
    TrainingCLI(args)
    return 0


def say(line: str) -> None:
    """Print a line about the run, from the first process only."""
    if _first_process():
        print(line, file=sys.stderr, flush=True)


def _plain_flags(args: Sequence[str]) -> list[str]:
    """`args` with the switches as jsonargparse knows them: --skip-bad and --skip_bad=true are --skip_bad.

    One that is set to false is left out, since that is what it is without.
    """
    out = []
    for arg in args:
        option, equals, value = arg.partition("=")
        name = option[2:].replace("-", "_")
        if not option.startswith("--") or name not in FLAGS:
            out.append(arg)
        elif not equals or value.lower() == "true":
            out.append(f"--{name}")
        elif value.lower() != "false":
            raise ConfigError(f"{option} is {value!r}, expected true, false or nothing")
    return out


def _numbers_by_size(item: tuple[str, float]) -> list[tuple[int, str]]:
    """A key that sorts accuracy_512 before accuracy_1024."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", item[0])]


def _first_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def quieten() -> None:
    """Silence Lightning's banners and hints; its errors and other warnings stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for hint in _HINTS:
        warnings.filterwarnings("ignore", message=hint)


def _has_test(model: LightningModule, data: LightningDataModule | None) -> bool:
    return is_overridden("test_step", model) and data is not None and is_overridden("test_dataloader", data)


def _config_files(args: Sequence[str]) -> list[str]:
    files = []
    for i, arg in enumerate(args):
        if arg in ("--config", "-c") and i + 1 < len(args):
            files.append(args[i + 1])
        elif arg.startswith("--config="):
            files.append(arg.split("=", 1)[1])
    return files


def _check_order(args: Sequence[str]) -> None:
    """Raise ConfigError where an option that sets a key stands before --config, which would undo it."""
    if not _config_files(args):
        return
    for arg in args:
        name = arg.partition("=")[0]
        if name in ("--config", "-c"):
            return
        if name.startswith("--") and name not in ("--help", "--print_config"):
            raise ConfigError(f"{name} stands before --config, which would undo it; give --config first")


def _config_seed(args: Sequence[str]) -> Any:
    """`seed_everything` as the config files say, or the default."""
    seed: Any = DEFAULT_SEED
    for name in _config_files(args):
        seed = read_yaml(find_config(name)).get("seed_everything", seed)
    return seed


def _with_shipped_configs(args: Sequence[str]) -> list[str]:
    """`args` with the names of shipped configs replaced by their paths, where no such file is here."""
    out = list(args)
    for i, arg in enumerate(out):
        if arg in ("--config", "-c") and i + 1 < len(out):
            out[i + 1] = str(find_config(out[i + 1]))
        elif arg.startswith("--config="):
            out[i] = f"--config={find_config(arg.split('=', 1)[1])}"
    return out
