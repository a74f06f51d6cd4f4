"""`python -m benchmarks.long_training`: it trains, says what it measured, and times nothing that is wrong."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from benchmarks import long_training
from benchmarks.long_training import GIB, build, estimate, main

SMALL = [
    "--layers",
    "1",
    "--d-model",
    "16",
    "--vocab",
    "50",
    "--d-state",
    "4",
    "--steps",
    "1",
    "--warmup",
    "0",
]


@pytest.mark.parametrize("more", [["--segment", "300"], ["--bidirectional"]])
def test_a_step_on_the_cpu(more: list[str]) -> None:
    said: list[str] = []
    torch.manual_seed(7)
    assert main([*SMALL, "--length", "1000", "--device", "cpu", *more], said.append) == 0
    assert re.search(r"check in fp32 on 333 tokens: ok, .* differs by \d\.\d\de-\d\d", said[2])
    found = re.match(r"([\d,]+) tokens a second: ([\d.]+) s a step .* loss ([\d.]+)$", said[4])
    assert found is not None, said[4]
    speed, seconds, loss = (float(n.replace(",", "")) for n in found.groups())
    assert speed == pytest.approx(1000 / seconds, rel=0.1)
    assert 3.5 < loss < 4.5  # the logarithm of 50 is 3.91


def test_no_time_is_printed_where_gradients_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = long_training.long_token_loss

    def wrong(*args: object, **options: object) -> tuple[Tensor, Tensor]:
        loss, count = real(*args, **options)  # type: ignore[arg-type]
        return loss * 1.001 - loss.detach() * 0.001, count

    monkeypatch.setattr(long_training, "long_token_loss", wrong)
    said: list[str] = []
    assert main([*SMALL, "--length", "1000", "--device", "cpu"], said.append) == 1
    assert "FAILED, gradient of" in said[-1]
    assert not any("second" in line for line in said)


def test_bad_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--segment", "0"])
    assert "--segment is 0, expected at least 1" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize(
    "more", [["--segment", "8192"], ["--segment", "16384", "--recompute"], ["--bidirectional"]]
)
def test_the_estimate_of_the_memory_holds_on_a_gpu(more: list[str]) -> None:
    said: list[str] = []
    sizes = ["--length", "65536", "--layers", "6", "--d-model", "512", "--vocab", "5000", "--chunk", "4096"]
    assert main([*sizes, *more, "--steps", "1"], said.append) == 0
    expected = float(re.search(r"memory expected: ([\d.]+)", said[3])[1])  # type: ignore[index]
    found = float(re.search(r"peak memory ([\d.]+)", said[5])[1])  # type: ignore[index]
    assert 0.6 * expected < found < 1.3 * expected


def test_the_estimate_of_the_issues_cases() -> None:
    """A 130M model: a million tokens within 24 GiB and four within 32; bidirectional within 40."""
    for arguments, most in (
        (["--length", "1048576"], 24),
        (["--length", "4194304"], 32),
        (["--length", "1048576", "--bidirectional"], 40),
    ):
        options = long_training._options([*arguments, "--chunk", "5338"])
        parts = estimate(build(options, torch.device("meta")), options.length, True, False)
        assert sum(parts.values()) < most * GIB
