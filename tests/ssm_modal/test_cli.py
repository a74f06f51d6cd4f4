"""The command line: run folders, checkpoints by name, errors as one message, configs."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssm_modal.cli import configs
from ssm_modal.cli.main import main
from ssm_modal.tasks import TrainingTask
from tests.tasks.tiny import assert_same, command, load, weights


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.delenv("SSM_MODAL_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


Capture = pytest.CaptureFixture[str]


def tiny_config(path: Path, **more: Any) -> Path:
    """The tiny run as a YAML file."""
    content: dict[str, Any] = {**more}
    for option in command(Path("runs/tiny"), max_steps=4)[1:]:
        name, value = option.removeprefix("--").split("=", 1)
        *parents, last = name.split(".")
        if name in ("model", "data"):
            parents, last = [name], "class_path"
        elif parents and parents[0] in ("model", "data"):
            parents.insert(1, "init_args")
        node = content
        for part in parents:
            node = node.setdefault(part, {})
        node.setdefault(last, yaml.safe_load(value))
    path.write_text(yaml.safe_dump(content))
    return path


# ---------------------------------------------------------------------- a run's folder


def test_fit_fills_the_run_folder_and_tests_the_best(tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    options = {"test_after_fit": "true", "checkpoint.keep_every_n_steps": 3, "trainer.val_check_interval": 2}
    assert main(command(run, max_steps=6, **options)) == 0
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", "step=00000003.ckpt", "step=00000006.ckpt"]
    assert load(run)["global_step"] == 6
    assert load(run, "step=00000003")["global_step"] == 3
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = {int(r["step"]) + 1: float(r["val/loss"]) for r in rows if r["val/loss"]}
    assert sorted(losses) == [2, 4, 6]
    best = min(losses, key=lambda step: losses[step])
    assert load(run, "best")["global_step"] == best
    assert load(run, "best")["callbacks"]["RunCheckpoint"]["best_score"] == pytest.approx(losses[best])
    assert [int(r["step"]) for r in rows if r["train/loss"]] == [0, 1, 2, 3, 4, 5]
    assert list((run / "tensorboard").glob("events.*"))
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 6
    result = json.loads((run / "results" / "test.json").read_text())
    assert result["test/loss"] == pytest.approx(losses[best], rel=1e-5)
    assert result["checkpoint"].endswith("best.ckpt")
    assert re.search(rf"test/loss +{result['test/loss']:.6g}", capsys.readouterr().out)


def test_config_of_a_run_runs_again_and_the_earlier_run_is_moved_aside(
    tmp_path: Path, capsys: Capture
) -> None:
    config = tiny_config(tmp_path / "tiny.yaml")
    assert main(["fit", "--config", str(config)]) == 0
    first = weights(tmp_path / "runs" / "tiny")
    # config.yaml is inside the folder that is moved.
    assert main(["fit", "--config", "runs/tiny/config.yaml"]) == 0
    assert "the earlier run in runs/tiny is now in runs/tiny.1" in capsys.readouterr().err
    assert_same(weights(tmp_path / "runs" / "tiny.1"), first)
    assert_same(weights(tmp_path / "runs" / "tiny"), first)
    assert main(["fit", "--config", "runs/tiny.1/config.yaml"]) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["tiny", "tiny.1", "tiny.2"]


@pytest.mark.parametrize(
    ("text", "option", "words"),
    [
        ("too short", [], "expected at least 257"),
        ("long enough " * 500, ["--model.init_args.overrides.vocab_size", "100"], "vocabulary of 256 ids"),
    ],
    ids=["short", "vocabulary"],
)
def test_data_that_does_not_fit_leaves_the_earlier_run_where_it_is(
    text: str, option: list[str], words: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSM_MODAL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("earlier")
    fit = ["fit", "--config", "text/bytes.yaml", "--run_dir", str(tmp_path / "run"), *option]
    assert main([*fit, "--data.init_args.path", str(tmp_path / "text.txt")]) == 1
    assert words in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert not (tmp_path / "run.1").exists()


def test_a_value_inside_an_optional_config_is_said_plainly(capsys: Capture) -> None:
    fit = ["fit", "--config", "audio/recordings.yaml", "--data.init_args.augment.gain_db", "-3"]
    assert main(fit) == 2
    assert capsys.readouterr().err.endswith("error: gain_db is -3.0, expected 0 or more\n")


def test_a_missing_gpu_is_said_plainly(tmp_path: Path, capsys: Capture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = tiny_config(tmp_path / "tiny.yaml")
    assert main(["fit", "--config", str(config), "--trainer.accelerator", "cuda"]) == 1
    said = capsys.readouterr().err
    assert "CUDAAccelerator" in said
    assert "MisconfigurationException" not in said


def test_seed_on_the_command_line_has_a_folder_of_its_own(tmp_path: Path) -> None:
    config = str(tiny_config(tmp_path / "tiny.yaml", seed_everything=5))
    assert main(["fit", "--config", config]) == 0
    assert main(["fit", "--config", config, "--seed_everything", "5"]) == 0
    assert main(["fit", "--config", config, "--seed_everything=6"]) == 0
    assert main(["fit", "--config", config, "--seed_everything", "6", "--run_dir", "runs/named"]) == 0
    names = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert names == ["named", "tiny", "tiny-seed6", "tiny.1"]
    assert_same(weights(tmp_path / "runs" / "named"), weights(tmp_path / "runs" / "tiny-seed6"))
    # The same command goes on with, and tests, the folder of its seed.
    assert main(["test", "--config", config, "--seed_everything=6"]) == 0
    assert (tmp_path / "runs" / "tiny-seed6" / "results" / "test.json").is_file()


def test_evaluation_takes_the_runs_checkpoint_and_leaves_its_logs(tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    fit = command(run, max_steps=6, **{"trainer.val_check_interval": 2})
    assert main(fit) == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    found = {}
    for name, extra in {
        "default": [],
        "best": ["--ckpt_path=best"],
        "last": ["--ckpt_path=last"],
        "path": [f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"],
    }.items():
        assert main(["validate", *fit[1:], *extra]) == 0
        found[name] = json.loads((run / "results" / "validate.json").read_text())
    assert found["default"] == found["best"]
    assert found["path"]["val/loss"] == found["last"]["val/loss"]
    score = load(run, "best")["callbacks"]["RunCheckpoint"]["best_score"]
    assert found["best"]["val/loss"] == pytest.approx(score, rel=1e-6)
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.parent.name != "results"}
    assert after == before


def test_predict_writes_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tasks.tiny import TinyData

    monkeypatch.setattr(TinyData, "predict_dataloader", TinyData.val_dataloader)
    run = tmp_path / "run"
    assert main(command(run, max_steps=1)) == 0
    assert main(["predict", *command(run, max_steps=1)[1:]]) == 0
    found = torch.load(run / "results" / "predictions.pt", weights_only=True)["predictions"]
    assert [tuple(batch["nats"].shape) for batch in found] == [(1, 12), (2, 12)]


def test_predict_on_text_gives_the_loss_of_each_token(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be " * 60)
    options = {"data": "ssm_modal.datamodules.text.TextDataModule", "data.path": "text.txt", "data.length": 8}
    more = {"model.overrides.vocab_size": 256, "data.cache_dir": tmp_path / "cache"}
    fit = command(tmp_path / "run", max_steps=1, **options, **more)
    assert main(fit) == 0
    assert main(["validate", *fit[1:]]) == 0
    assert main(["predict", *fit[1:]]) == 0
    found = torch.load(tmp_path / "run/results/predictions.pt", weights_only=True)["predictions"]
    asked = torch.cat([(batch["labels"] != -100).flatten() for batch in found])
    nats = torch.cat([batch["nats"].flatten() for batch in found])
    measured = json.loads((tmp_path / "run/results/validate.json").read_text())["val/loss"]
    assert float(nats[asked].double().mean()) == pytest.approx(measured, rel=1e-5)


def test_an_interrupted_run_says_so_and_goes_on(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    args = command(run, max_steps=4, **{"checkpoint.every_n_steps": 1})
    step = TrainingTask.training_step

    def interrupted(self: TrainingTask, *batch: Any) -> Any:
        if self.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *batch)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(TrainingTask, "training_step", interrupted)
    try:
        assert main(args) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # the trainer ignores further ones
    assert "ssm-modal: interrupted" in capsys.readouterr().err
    assert load(run)["global_step"] == 2
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main([*args, "--ckpt_path=last"]) == 0
    assert load(run)["global_step"] == 4


def test_options_stand_behind_the_config(tmp_path: Path, capsys: Capture) -> None:
    """An option in front of --config would be undone by it, without a word."""
    config = tiny_config(tmp_path / "tiny.yaml")
    assert main(["fit", "--trainer.max_steps=1", "--config", str(config)]) == 2
    assert "--trainer.max_steps stands before --config, which would undo it" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_missing_data_costs_an_earlier_run_nothing(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be " * 60)
    options = {"data": "ssm_modal.datamodules.text.TextDataModule", "data.path": "text.txt", "data.length": 8}
    run = tmp_path / "run"
    args = command(run, max_steps=1, **options, **{"model.overrides.vocab_size": 256})
    args.append(f"--data.cache_dir={tmp_path / 'cache'}")
    assert main(args) == 0
    assert main([*args, "--data.path=elsewhere.txt"]) == 1
    assert "path is 'elsewhere.txt'" in capsys.readouterr().err
    assert run.is_dir()
    assert not (tmp_path / "run.1").exists()


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    assert main([*command(tmp_path / "run"), "--trainer.fast_dev_run=true"]) == 0
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--trainer.max_stepz=3"], 2, "unknown key 'trainer.max_stepz'; did you mean 'trainer.max_steps'?"),
        (["--model.init_args.optimizer.lrr=3"], 2, "did you mean 'model.init_args.optimizer.lr'?"),
        (["--model.optimizer.lr=-3"], 2, "optimizer.lr is -3.0, expected above 0"),
        (
            ["--model.schedule.kind=cosin"],
            2,
            "is cosin, expected one of 'constant', 'linear', 'cosine', 'wsd'",
        ),
        (
            ["--model.overrides.d_modell=3"],
            2,
            "unknown key 'd_modell' for CausalLMConfig; did you mean 'd_model'?",
        ),
        (["--model.model=mamba_ml"], 2, "did you mean 'mamba_lm'?"),
        (["--data.batchsize=3"], 2, "did you mean 'data.batch_size'?"),
        (["--rundir=x"], 2, "did you mean 'run_dir'?"),
        (["--trainer.max_steps=many"], 2, "trainer.max_steps is many, expected int"),
        (["--seed_everything=many"], 2, "seed_everything is many, expected bool or int"),
        (["--trainer.precision=12"], 2, "trainer.precision is 12, expected one of 64, 32, 16 or one of"),
        (["--trainer.max_steps=-1"], 2, "trainer.max_steps is -1, expected the optimizer steps"),
        (["--trainer.accumulate_grad_batches=3"], 2, "a multiple of trainer.accumulate_grad_batches = 3"),
        (["--model=ssm_modal.tasks.LanguageModeling"], 2, "did you mean 'LanguageModelling'?"),
        (["--model.class_path=nowhere.Task"], 2, "there is no module 'nowhere'"),
        (["--checkpoint.every_n_steps=0"], 1, "checkpoint.every_n_steps is 0, expected 1 or more"),
        (["--checkpoint.monitor=val/los"], 1, "checkpoint.monitor is 'val/los', which was not measured"),
        (["--ckpt_path=last"], 1, "last.ckpt (there is no checkpoint at all)"),
        (
            ["--ckpt_path=nothing.ckpt"],
            1,
            "--ckpt_path is 'nothing.ckpt', expected 'last', 'best' or the path",
        ),
        (["--seed_everything=x"], 2, "seed_everything"),
    ],
)
def test_errors_are_one_message(
    tmp_path: Path, capsys: Capture, extra: list[str], code: int, message: str
) -> None:
    assert main([*command(tmp_path / "run", max_steps=4), *extra]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sum("error:" in line for line in error.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trainer:\n  max_stepz: 3\n", "unknown key 'trainer.max_stepz'; did you mean 'trainer.max_steps'?"),
        ("modle: 3\n", "unknown key 'modle'; did you mean 'model'?"),
        (
            "model:\n  class_path: ssm_modal.tasks.LanguageModelling\n  init_args:\n    modell: mamba_lm\n",
            "unknown key 'model.init_args.modell'; did you mean 'model.init_args.model'?",
        ),
        ("a: [b\n", "is no YAML: while parsing a flow sequence"),
        ("- 1\n", "holds a list, expected keys with values"),
    ],
)
def test_errors_in_config_files_name_the_file(
    tmp_path: Path, capsys: Capture, content: str, message: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    assert main(["fit", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert not (tmp_path / "runs").exists()


def test_other_errors_of_the_program(capsys: Capture) -> None:
    assert main(["fitt"]) == 2
    assert "no command is called 'fitt': did you mean 'fit'?" in capsys.readouterr().err
    assert main(["fit", "--config", "text/bites.yaml"]) == 2
    assert "did you mean 'text/bytes.yaml'" in capsys.readouterr().err
    assert main(["fit"]) == 2
    assert "data, model must be given: name a config by --config" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("fit", "validate", "test", "predict", "generate", "stream", "configs", "doctor"):
        assert f"\n  {name} " in out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ssm-modal 0")


def test_traceback_on_request(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [*command(tmp_path / "run"), "--ckpt_path=last"]
    assert main([*args, "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("SSM_MODAL_DEBUG", "1")
    assert main(args) == 1
    assert "Traceback" in capsys.readouterr().err


def test_evaluation_without_a_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    assert main(["test", *command(tmp_path / "run")[1:]]) == 1
    assert "there is no checkpoint in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_lightning_the_extra_is_named(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    assert main(["fit", "--config", "text/bytes.yaml"]) == 1
    assert 'pip install "ssm-modal[train]"' in capsys.readouterr().err


@pytest.mark.slow
def test_the_program_itself(tmp_path: Path) -> None:
    """A process of its own: exit code, nothing noisy on the way, no Lightning for commands that need none."""
    args = command(tmp_path / "run", max_steps=2, test_after_fit="true")
    args.remove("--trainer.enable_progress_bar=false")
    code = "import sys; from ssm_modal.cli.main import main; sys.exit(main())"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.strip().splitlines()
    assert all(
        re.match(r"LanguageModelling with|validation at step|testing |step ", line) for line in lines
    ), lines


def test_light_commands_import_no_lightning(tmp_path: Path) -> None:
    code = (
        "import sys; from ssm_modal.cli.main import main; code = main(['configs', 'list']);"
        "sys.exit(code or int('lightning' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "text/bytes.yaml" in done.stdout


# ---------------------------------------------------------------------- configs


def test_configs_list_and_copy(tmp_path: Path, capsys: Capture) -> None:
    assert main(["configs", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(configs.shipped_configs())
    assert any(line.startswith("text/bytes.yaml") and "small Mamba" in line for line in listed)
    assert [line for line in listed if not line.endswith(".")] == []  # whole sentences
    assert main(["configs", "copy", "text/bytes.yaml"]) == 0
    copied = tmp_path / "bytes.yaml"
    assert copied.read_bytes() == configs.shipped_config("text/bytes").read_bytes()
    copied.write_text("mine")
    assert main(["configs", "copy", "text/bytes.yaml"]) == 2
    assert "bytes.yaml is there already" in capsys.readouterr().err
    assert copied.read_text() == "mine"
    assert main(["configs", "copy", "text/bytes.yaml", "bytes.yaml", "--force"]) == 0
    assert copied.read_text() != "mine"
    assert main(["configs", "copy", "text/bytes.yaml", "new/folder/"]) == 0
    assert (tmp_path / "new" / "folder" / "bytes.yaml").is_file()
    assert main(["configs", "copy", "text/byte.yaml"]) == 2
    assert "did you mean 'text/bytes.yaml'" in capsys.readouterr().err


def test_own_file_wins_over_a_shipped_config(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "bytes.yaml").write_text("run_dir: mine\n")
    assert configs.find_config("text/bytes.yaml") == "text/bytes.yaml"
    assert configs.find_config("configs/text/tinyshakespeare.yaml") != "configs/text/tinyshakespeare.yaml"
