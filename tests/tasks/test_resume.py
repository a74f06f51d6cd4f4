"""A run that is killed and goes on ends with the weights of one left alone, bit for bit."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ssm_modal.cli.main import main
from tests.tasks.processes import run
from tests.tasks.tiny import assert_same, command, load, weights


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def kill_at(batch: int) -> dict[str, str]:
    return {"trainer.callbacks": f"[{{class_path: tests.tasks.tiny.KillAt, init_args: {{batch: {batch}}}}}]"}


@pytest.mark.parametrize(
    ("accumulate", "every", "workers"), [(1, 1, 0), (2, 2, 0), (3, 1, 2)], ids=["plain", "sparse", "workers"]
)
def test_killed_and_resumed_equals_left_alone(
    tmp_path: Path, accumulate: int, every: int, workers: int
) -> None:
    steps = 8
    options: dict[str, Any] = {
        "max_steps": steps,
        "trainer.accumulate_grad_batches": accumulate,
        "trainer.val_check_interval": 4 * accumulate,
        "checkpoint.every_n_steps": every,
        "data.num_workers": workers,
    }
    assert main(command(tmp_path / "alone", **options)) == 0

    # Two kills, the second after going on; any batch, in the middle of an accumulation or not.
    last = steps * accumulate
    first, second = sorted(random.sample(range(every * accumulate + 1, last + 1), 2))
    broken = tmp_path / "broken"
    assert run(command(broken, **options, **kill_at(first))) == [-signal.SIGKILL], f"kill at {first}"
    assert run([*command(broken, **options, **kill_at(second)), "--ckpt_path=last"]) == [-signal.SIGKILL]
    assert load(broken)["global_step"] < steps
    assert main([*command(broken, **options), "--ckpt_path=last"]) == 0

    assert load(broken)["global_step"] == steps
    assert_same(weights(broken), weights(tmp_path / "alone"))
    ours, theirs = load(broken)["optimizer_states"][0], load(tmp_path / "alone")["optimizer_states"][0]
    for key, state in theirs["state"].items():
        assert torch.equal(ours["state"][key]["exp_avg_sq"], state["exp_avg_sq"])
    # The logs read as if nothing had happened: no step missing, none twice, the same figures.
    assert (broken / "metrics.csv").read_text() == (tmp_path / "alone" / "metrics.csv").read_text()
    assert_same(weights(broken, "best"), weights(tmp_path / "alone", "best"))


def test_dropout_and_batches_matter(tmp_path: Path) -> None:
    # What the test above compares would differ had the random numbers, or the batches, not been the same.
    assert main(command(tmp_path / "a", max_steps=2)) == 0
    assert main([*command(tmp_path / "b", max_steps=2), "--model.overrides.dropout=0.0"]) == 0
    assert main([*command(tmp_path / "c", max_steps=2), "--seed_everything=1"]) == 0
    a = weights(tmp_path / "a")
    name = "model.embedding.weight" if "model.embedding.weight" in a else next(iter(a))
    for other in ("b", "c"):
        assert not torch.equal(a[name], weights(tmp_path / other)[name])


def test_resume_refuses_another_architecture_and_another_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path / "run", max_steps=2)) == 0
    before = {f: f.read_bytes() for f in sorted((tmp_path / "run").rglob("*")) if f.is_file()}
    capsys.readouterr()
    args = [*command(tmp_path / "run", max_steps=4), "--ckpt_path=last"]
    assert main([*args, "--model.overrides.n_layers=2"]) == 1
    told = capsys.readouterr().err
    assert "last.ckpt: the checkpoint is of another architecture: backbone.n_layers is 1 there and 2" in told
    assert main([*args, "--seed_everything=3"]) == 1
    assert "is of a run with seed 0, but this one has seed 3" in capsys.readouterr().err
    # Neither the weights, nor the config and the logs of the run that they belong to.
    assert {f: f.read_bytes() for f in sorted((tmp_path / "run").rglob("*")) if f.is_file()} == before
    assert main([*command(tmp_path / "new", max_steps=4), f"--ckpt_path={tmp_path}/run/metrics.csv"]) == 1
    assert not (tmp_path / "new").exists()


def test_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main(command(run_dir, max_steps=2)) == 0
    good = weights(run_dir)
    save, calls = torch.save, []

    def full(content: Any, file: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) < 3:
            return save(content, file, **options)
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ssm_modal.cli.checkpoint_io.torch.save", full)
    capsys.readouterr()
    assert main([*command(run_dir, max_steps=8), "--ckpt_path=last"]) == 1
    error = capsys.readouterr().err
    assert "could not write the checkpoint" in error
    assert "No space left on device" in error
    assert load(run_dir)["global_step"] == 4
    left = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert left == ["best.ckpt", "last.ckpt"], "nothing half-written is left"
    assert not torch.equal(next(iter(good.values())), torch.zeros(1))
    # With room again the run goes on from there, to the weights of one that never stopped.
    monkeypatch.setattr("ssm_modal.cli.checkpoint_io.torch.save", save)
    assert main([*command(run_dir, max_steps=8), "--ckpt_path=last"]) == 0
    assert load(run_dir)["global_step"] == 8


def test_file_size_limit_leaves_what_stood_there(tmp_path: Path) -> None:
    """The real thing: the operating system refuses the write half way."""
    from ssm_modal.cli.checkpoint_io import AtomicCheckpointIO
    from ssm_modal.errors import CheckpointError

    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not write .*File too large.*is whole"):
            io.save_checkpoint({"big": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert io.load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_broken_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert main(command(run_dir, max_steps=1)) == 0
    path = run_dir / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    capsys.readouterr()
    assert main([*command(run_dir, max_steps=2), "--ckpt_path=last"]) == 1
    error = capsys.readouterr().err
    assert f"{path} is no checkpoint" in error
