"""Every Triton kernel compiles for sm_90 and spills nothing: compiled ahead of time, no GPU needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ssm_modal.kernels import aot

pytest.importorskip("triton")


def run_without_interpreter(code: str, timeout: int) -> subprocess.CompletedProcess[str]:
    """Run Python in a process whose kernels are compiled; here they may be the interpreter's."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=timeout, check=False
    )


@pytest.mark.slow
def test_shipped_configurations_spill_nothing() -> None:
    """The representative set; `python -m ssm_modal.kernels.aot` covers every case."""
    done = run_without_interpreter("from ssm_modal.kernels.aot import main; exit(main(['--quick']))", 280)
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["kernel", "config", "warps", "registers", "spills", "shared"]
    kernels = {row.split()[0] for row in rows}
    scan = {"chunk_state_kernel", "output_kernel", "carry_kernel", "chunk_grad_kernel", "grad_kernel"}
    assert scan <= kernels
    for row in rows:
        registers, spills = (int(cell) for cell in row.split()[-3:-1])
        assert 0 < registers <= 255, row
        assert spills == 0, row


def test_a_spill_is_seen() -> None:
    """Thirty-two registers cannot hold the states: the tool has to report local memory."""
    code = """
from dataclasses import replace
from ssm_modal.kernels.aot import resources
from ssm_modal.kernels.scan.triton_fwd import aot_cases
case = next(c for c in aot_cases() if c.name == "chunk_state_kernel" and c.config == "N16 bf16")
print(resources(replace(case, maxnreg=32)).spills)
"""
    done = run_without_interpreter(code, 120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_kernel_modules_are_found_by_name() -> None:
    found = aot.kernel_modules()
    for name in ("triton_common", "triton_fwd", "triton_bwd"):
        assert f"ssm_modal.kernels.scan.{name}" in found


def test_wrong_cases_are_refused() -> None:
    code = """
import dataclasses, os
from ssm_modal.kernels.aot import compile_case
from ssm_modal.kernels.scan.triton_common import aot_cases
case = aot_cases()[0]
for change in ({"a_ptr": "fp32"}, {"n_chunks": object()}, None):
    args = {} if change is None else case.args | change
    try:
        compile_case(dataclasses.replace(case, args=args))
    except (TypeError, ValueError) as error:
        print(error)
"""
    done = run_without_interpreter(code, 60)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert "a_ptr is 'fp32', expected a pointer type" in lines[0]
    assert "n_chunks has type object" in lines[1]
    assert "arguments missing ['BLOCK'" in lines[2]


def test_interpreted_kernels_are_refused() -> None:
    class Interpreted:
        __name__ = "kernel"

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        aot.compile_case(aot.AotCase(Interpreted(), "x", {}))
