"""Cases on an NVIDIA GPU: the Triton selective scan beside mamba_ssm's CUDA kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Check, Options, Report, Unavailable, case, relative_error, time_in_turn
from benchmarks.inputs import GRADIENTS, reference_gradients, scan_inputs
from ssm_modal.kernels.dispatch import why_not
from ssm_modal.kernels.scan import selective_scan

OURS = "ssm_modal, backend triton"
PEER = "mamba_ssm selective_scan_fn"


def _mamba_ssm() -> Callable[..., Tensor]:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise Unavailable(
            f"mamba_ssm does not import ({error}); "
            "MAMBA_FORCE_BUILD=TRUE pip install mamba-ssm builds its kernel"
        ) from error
    return selective_scan_fn


def _scan(options: Options, name: str, batch: int, d_inner: int, length: int, backward: bool) -> Report:
    device = torch.device("cuda")
    reason = "there is no NVIDIA GPU" if not torch.cuda.is_available() else None
    reason = reason or why_not("selective_scan", "triton", device, torch.bfloat16)
    if reason is not None:
        raise Unavailable(reason)

    # The reference loop in fp64 is slow: the check runs on fewer channels and steps than the timing.
    small = scan_inputs(2, 128, 600, 16, device, torch.float32)
    leaves = small.leaves()
    u, delta, A, B, C, D, z, bias = leaves
    out = selective_scan(u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True, backend="triton")
    found = torch.autograd.grad(out, leaves, small.dout)
    x = scan_inputs(batch, d_inner, length, 16, device, torch.bfloat16)
    report = Report(name, x.shape, OURS)
    right = reference_gradients(small)
    report.checks += [
        Check(f"{n} (fp32)", relative_error(g, r), 1e-4) for n, g, r in zip(GRADIENTS, found, right)
    ]
    if not report.correct:
        return report

    given = x.leaves()

    def ours() -> object:
        u, delta, A, B, C, D, z, bias = given
        with torch.set_grad_enabled(backward):
            out = selective_scan(
                u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True, backend="triton"
            )
        return torch.autograd.grad(out, given, x.dout) if backward else out

    candidates: dict[str, Callable[[], object]] = {OURS: ours}
    try:
        function = _mamba_ssm()
        # Its layout is (batch, d_inner, length); handed over contiguous, the turning is not timed.
        turned = tuple(
            t.detach().transpose(1, 2).contiguous().requires_grad_() if t.ndim == 3 else t for t in given
        )
        dout = x.dout.transpose(1, 2).contiguous()

        def peer() -> object:
            u, delta, A, B, C, D, z, bias = turned
            with torch.set_grad_enabled(backward):
                out = function(u, delta, A, B, C, D, z, bias, delta_softplus=True)
            return torch.autograd.grad(out, turned, dout) if backward else out

        candidates[PEER] = peer
    except Unavailable as why:
        report.notes.append(f"mamba_ssm left out: {why}")
    report.timings = time_in_turn(candidates, dict.fromkeys(candidates, options.repeats), device)
    return report


@case
def cuda_scan_forward(options: Options) -> Report:
    """Selective scan forward, B8 D2048 L8192 N16 bf16, beside mamba_ssm."""
    return _scan(options, "cuda_scan_forward", 8, 2048, 8192, backward=False)


@case
def cuda_scan_training(options: Options) -> Report:
    """Selective scan forward and backward, B8 D2048 L8192 N16 bf16, beside mamba_ssm."""
    return _scan(options, "cuda_scan_training", 8, 2048, 8192, backward=True)


@case
def cuda_scan_long(options: Options) -> Report:
    """Selective scan forward and backward, B1 D2048 L131072 N16 bf16, beside mamba_ssm."""
    return _scan(options, "cuda_scan_long", 1, 2048, 131072, backward=True)
