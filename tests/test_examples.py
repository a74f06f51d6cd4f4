"""The examples run as a user runs them, on little data; what they save can be loaded."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssm_modal

ROOT = Path(__file__).parents[1]


def _run(name: str, cwd: Path, *options: object) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    args = [sys.executable, str(ROOT / "examples" / name), *map(str, options)]
    done = subprocess.run(args, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_plain_loop_learns_and_finds_what_it_learnt(tmp_path: Path) -> None:
    out = _run("plain_pytorch.py", tmp_path, "--steps", 100)
    accuracy = re.search(r"accuracy (\d\.\d+)", out)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.95
    assert out.strip().endswith("which holds 7")


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "accelerate")),
    reason="needs transformers and accelerate",
)
def test_a_hugging_face_trainer_trains(tmp_path: Path) -> None:
    out = _run("hugging_face_trainer.py", tmp_path, "--steps", 12, "--length", 32, "--d-model", 16)
    loss = re.search(r"loss (\d+\.\d+) nats", out)
    assert loss is not None
    assert 1 < float(loss[1]) < 5.6  # ln 256 is 5.55
    assert ssm_modal.load_pretrained(tmp_path / "byte_model").config.vocab_size == 256  # type: ignore[attr-defined]


def test_a_timm_pipeline_trains(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    out = _run("timm_training.py", tmp_path, "--epochs", 6, "--size", 16, "--depth", 2, "--width", 32)
    right = re.search(r"(\d+) of 64 training images right", out)
    assert right is not None
    assert int(right[1]) > 40
    assert ssm_modal.load_pretrained(tmp_path / "picture_model").config.n_classes == 2  # type: ignore[attr-defined]
