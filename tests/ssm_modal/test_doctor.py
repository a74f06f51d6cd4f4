"""`ssm-modal doctor`: reports what serves each op, finds what is broken, and says what mends it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
import torch

from ssm_modal.cli import doctor
from ssm_modal.cli.main import main
from ssm_modal.kernels.dispatch import SUPPORT, explain

Capture = pytest.CaptureFixture[str]


def test_reports_every_op_and_finds_nothing_broken(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch            {metadata.version('torch')}" in out
    for op in SUPPORT:
        for dtype, name in (
            (torch.float32, "float32"),
            (torch.bfloat16, "bfloat16"),
            (torch.float64, "float64"),
        ):
            choice = explain(op, device="cpu", dtype=dtype)
            line = next(
                x for x in out.splitlines() if x.startswith("  cpu") and f"{op} " in x and f" {name} " in x
            )
            assert f" {choice.backend} " in line
            assert choice.reason in line
            assert "error" in line
    assert "All that is installed works." in out


@pytest.mark.parametrize("op", list(SUPPORT))
@pytest.mark.parametrize("dtype", doctor.DTYPES)
def test_checks_would_see_a_wrong_op(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.relative_error(op, torch.device("cpu"), dtype) <= doctor.TOLERANCE[dtype]
    right = getattr(doctor, op)

    def times(factor: float) -> Callable[..., Any]:
        def wrong(*args: Any, **options: Any) -> Any:
            made = right(*args, **options)
            return tuple(t * factor for t in made) if isinstance(made, tuple) else made * factor

        return wrong

    monkeypatch.setattr(doctor, op, times(1.02))
    assert doctor.relative_error(op, torch.device("cpu"), dtype) > doctor.TOLERANCE[dtype]
    monkeypatch.setattr(doctor, op, times(float("nan")))
    assert doctor.relative_error(op, torch.device("cpu"), dtype) == float("inf")


def test_broken_op_is_reported_and_exits_with_1(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "rms_norm", lambda *a, **k: torch.zeros(2, 37, 24))

    def fails(*args: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(doctor, "lti_scan", fails)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert (
        "rms_norm in float32 on cpu is wrong: relative error 1, allowed 2e-05; SSM_MODAL_BACKEND=torch" in out
    )
    assert "lti_scan in bfloat16 on cpu fails: no such kernel" in out
    assert out.rstrip().endswith("Something is broken.")
    assert main(["doctor", "--no-check"]) == 0


def test_missing_things_name_the_command_that_mends_them(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    absent = ("tokenizers", "pysam")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in absent else find(name, *a)
    )
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr("ssm_modal.kernels.cpu.loader.why_unavailable", lambda: "no C compiler found")
    assert main(["doctor", "--no-check"]) == 0, "what is missing is not broken"
    out = capsys.readouterr().out
    assert "the extra text: pip install 'ssm-modal[text]'" in out
    assert "the extra genomics: pip install 'ssm-modal[genomics]'" in out
    assert "a C compiler, for the fast CPU kernels: apt install gcc" in out
    assert "the extra train" not in out


def test_compiler_that_fails_is_broken(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssm_modal.kernels.cpu.loader.why_unavailable", lambda: "cc says\nno")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/cc" if name == "cc" else None)
    monkeypatch.delenv("SSM_MODAL_NO_CPU_KERNELS", raising=False)
    assert main(["doctor", "--no-check"]) == 1
    assert "the CPU kernels do not build or load: cc says no" in capsys.readouterr().out


def test_extras_are_those_of_the_project() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    listed = project["optional-dependencies"]
    for extra, distributions in doctor.EXTRAS.items():
        names = {_name(entry) for entry in listed[extra]}
        assert set(distributions) <= names, extra
        assert names - set(distributions) <= {"torch", "numpy"}, extra
    assert set(doctor.EXTRAS) == set(listed) - {"test", "all"}
    assert {_name(entry) for entry in project["dependencies"]} == set(doctor.CORE)


def _name(requirement: str) -> str:
    import re

    match = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert match
    return match[0]
