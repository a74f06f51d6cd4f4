"""The README's script and commands are what they say: its Python block runs on a run of the command line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ssm_modal.io.text import text_files

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _run(args: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(args, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_script_runs_on_a_backbone_trained_by_the_command_line(tmp_path: Path) -> None:
    """`fit` for two steps, then the README's script to the letter, from another folder."""
    config = ROOT / "configs/synthetic/induction_heads.yaml"
    fit = [sys.executable, "-m", "ssm_modal.cli.main", "fit", "--config", str(config)]
    fit += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    fit += ["--model.init_args.schedule.warmup_steps", "0"]
    fit += ["--data.init_args.lengths", "[64]", "--data.init_args.val_lengths", "[64]"]
    done = _run([*fit, "--data.init_args.sequences", "4", "--data.init_args.val_sequences", "4"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        (tmp_path / "runs/induction_heads/lengths.csv")
        .read_text()
        .startswith("length,accuracy,sequences\n64,")
    )
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1, "the README shows one script"
    script = tmp_path / "script.py"
    script.write_text(blocks[0], encoding="utf-8")
    done = _run([sys.executable, str(script)], tmp_path)
    assert done.returncode == 0, done.stderr
    loss = float(re.fullmatch(r"loss (\d+\.\d+)\n", done.stdout)[1])  # type: ignore[index]
    assert 0 < loss < 5


def test_the_text_command_trains_on_the_documentation(tmp_path: Path) -> None:
    """One batch of it, from the repository's root, as the README has it."""
    found = re.findall(r"`ssm-modal (fit --config configs/text/bytes\.yaml [^`]*)`", README)
    assert len(found) == 1
    options = ["--trainer.fast_dev_run=true", "--model.schedule.warmup_steps=0"]
    options += [f"--run_dir={tmp_path}", f"--data.cache_dir={tmp_path}"]
    done = _run([sys.executable, "-m", "ssm_modal.cli.main", *shlex.split(found[0]), *options], ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_name_files_that_exist() -> None:
    named = set(re.findall(r"\bconfigs/[\w/]+\.yaml", README)) | set(
        re.findall(r"\]\(((?:docs/)?[\w/]+\.\w+)\)", README)
    )
    assert "configs/synthetic/induction_heads.yaml" in named
    missing = [name for name in sorted(named) if not (ROOT / name).is_file()]
    assert not missing


def test_the_folder_of_text_that_a_job_trains_on_holds_such_files() -> None:
    found = re.search(r"--data\.init_args\.path (\S+) --data\.init_args\.suffixes \"\[(\S+)\]\"", README)
    assert found is not None
    assert text_files(ROOT / found[1], [found[2]])
