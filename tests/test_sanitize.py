"""`python -m benchmarks.sanitize`: its cases are valid calls, forward and backward."""

from __future__ import annotations

import torch

from benchmarks.sanitize import SCANS, both_ways, others, scans


def test_every_case_is_a_valid_call() -> None:
    cpu = torch.device("cpu")
    assert len(list(scans(cpu, "torch"))) == len(SCANS)
    assert len(list(both_ways(cpu, "torch"))) == 4
    assert list(others(cpu, "torch")) == [
        f"{name} {dtype}"
        for dtype in (torch.bfloat16, torch.float32)
        for name in (
            "causal_conv1d (2, 131, 37)",
            "rms_norm (2, 131, 37)",
            "cross_entropy (3, 5001)",
            "steps",
        )
    ]
