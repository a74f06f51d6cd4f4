"""The benchmarks' framework: no figure without a passed check, and exit codes that say so."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Bar, Check, Options, Report, Timing, Unavailable, run
from benchmarks.inputs import GRADIENTS, reference_gradients, reference_output, scan_inputs
from ssm_modal.kernels.scan import selective_scan


def report(error: float, peer_seconds: float = 4.0) -> Report:
    return Report(
        "made_up",
        "B1",
        "ours",
        checks=[Check("output", error, 1e-5)],
        timings={"ours": Timing((0.2, 0.1, 9.0)), "peer": Timing((peer_seconds,))},
        bars=(Bar("peer", 30.0),),
    )


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> dict[str, harness.Case]:
    def refuses(options: Options) -> Report:
        raise Unavailable("no such machine")

    made: dict[str, harness.Case] = {
        "scan_right": lambda o: report(1e-6, peer_seconds=8.0),
        "scan_slow": lambda o: report(1e-6, peer_seconds=4.0),
        "conv_wrong": lambda o: report(1e-4),
        "conv_nan": lambda o: report(float("nan")),
        "absent": refuses,
    }
    monkeypatch.setattr(harness, "CASES", made)
    return made


def test_no_time_is_printed_after_a_failed_check(
    cases: dict[str, harness.Case], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["scan_right", "conv_wrong", "conv_nan"], Options(), tmp_path / "x.csv", False) == 1
    right, wrong, nan = capsys.readouterr().out.split("\n\n")[1:4]
    assert "median    200.00 ms   best    100.00 ms" in right
    assert "40.0 x: met" in right
    for text in (wrong, nan):
        assert "WRONG" in text
        assert "median" not in text
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert [(r["case"], r["candidate"]) for r in rows] == [("scan_right", "ours"), ("scan_right", "peer")]
    assert rows[1]["times_ours"] == "40.000"
    assert rows[1]["bar_met"] == "True"


def test_exit_codes(cases: dict[str, harness.Case], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["scan_right", "absent"], Options(), None, True) == 0
    assert "absent: skipped, no such machine" in capsys.readouterr().out
    assert run(["scan_slow"], Options(), None, False) == 0
    assert "20.0 x: MISSED" in capsys.readouterr().out
    assert run(["scan_slow"], Options(), None, True) == 2


def test_choosing_cases(cases: dict[str, harness.Case]) -> None:
    assert harness.chosen("scan") == ["scan_right", "scan_slow"]
    assert harness.chosen("absent,scan_s,scan") == ["absent", "scan_slow", "scan_right"]
    assert harness.chosen(None) == list(cases)
    with pytest.raises(ValueError, match="'norm' picks no case; there are scan_right, "):
        harness.chosen("scan,norm")


def test_the_references_of_the_benchmarks_agree_with_the_op() -> None:
    x = scan_inputs(2, 12, 20, 4, "cpu", torch.float64)
    u, delta, A, B, C, D, z, bias = leaves = x.leaves()
    A, D, bias = (t.double() for t in (A, D, bias))
    out = selective_scan(u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True, backend="torch")
    torch.testing.assert_close(reference_output(x, slab=5), out.detach())
    for name, a, b in zip(
        GRADIENTS, torch.autograd.grad(out, leaves, x.dout), reference_gradients(x, slab=5)
    ):
        torch.testing.assert_close(a, b.to(a.dtype), msg=lambda m, name=name: f"{name}: {m}")
