"""The process that the case `first_call` starts: prints as JSON what a first call takes, in seconds.

Nothing of the project is imported before the clock that counts it; torch and the device are ready by then.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch


def main(device: torch.device, tiny: bool) -> dict[str, object]:
    """The seconds that importing the op, its first forward, that with the first backward, and a later call of
    both take; and the checks of the first results, as (name, error, limit)."""
    torch.zeros(8, device=device).sum().item()
    # The first gradient of a process that is not of a scalar makes torch import sympy, which takes seconds.
    ones = torch.ones(8, device=device, requires_grad=True)
    torch.autograd.grad(ones * 2, ones, torch.ones_like(ones))

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timed(call: Callable[[], object]) -> tuple[object, float]:
        wait()
        start = time.perf_counter()
        found = call()
        wait()
        return found, time.perf_counter() - start

    start = time.perf_counter()
    from ssm_modal.kernels import selective_scan  # noqa: F401 - its import is what is timed

    imported = time.perf_counter() - start

    from benchmarks.harness import Options
    from benchmarks.inputs import scan_inputs
    from benchmarks.reference import run_scan, scan_reference

    options = Options(device=device, tiny=tiny)
    x = scan_inputs(*options.shrink(1, 2048, 8192, 16), device=device, dtype=torch.bfloat16)
    leaves, backend = x.leaves(), options.backend("selective_scan")
    out, forward = timed(lambda: run_scan(leaves, backend=backend))
    assert isinstance(out, torch.Tensor)
    grads, backward = timed(lambda: torch.autograd.grad(out, leaves, x.dout))
    assert isinstance(grads, tuple)
    _, later = timed(lambda: torch.autograd.grad(run_scan(leaves, backend=backend), leaves, x.dout))
    checks = scan_reference(x).checks((out.detach(), *grads))
    return {
        "import": imported,
        "forward": forward,
        "both": forward + backward,
        "later": later,
        "checks": [(check.name, check.error, check.limit) for check in checks],
    }


if __name__ == "__main__":
    print(json.dumps(main(torch.device(sys.argv[1]), sys.argv[2] == "1")))
