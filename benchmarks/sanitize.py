"""Every Triton op once, forward and backward, on odd shapes, for compute-sanitizer:

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m benchmarks.sanitize

Run it once without, so that the kernels are compiled already.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from ssm_modal.kernels import (
    ScanDirection,
    Sequences,
    bidirectional_scan,
    causal_conv1d,
    causal_conv1d_step_,
    cross_entropy,
    rms_norm,
    selective_scan,
    selective_scan_step_,
)

# (batch, lengths, d_inner, d_state, groups, dtype, reverse, an initial state): one length, or those of packed
# sequences.
SCANS: tuple[tuple[int, tuple[int, ...], int, int, int, torch.dtype, bool, bool], ...] = (
    (1, (1,), 1, 1, 1, torch.float32, False, True),
    (2, (131,), 37, 3, 1, torch.bfloat16, True, False),
    (1, (300,), 64, 16, 1, torch.bfloat16, False, True),
    (3, (77,), 48, 16, 3, torch.float16, False, False),
    (1, (5, 0, 200, 1, 130), 33, 16, 1, torch.float32, False, True),
    (1, (290,), 40, 20, 2, torch.bfloat16, False, False),
    (1, (270, 3), 24, 64, 1, torch.bfloat16, True, True),
    (1, (70,), 9, 256, 1, torch.float32, False, False),
)


def scans(device: torch.device, backend: str) -> Iterator[str]:
    """Runs the scans and names each."""
    for batch, lengths, d_inner, d_state, groups, dtype, reverse, initial in SCANS:
        length = sum(lengths)
        packed = len(lengths) > 1
        rows = len(lengths) if packed else batch

        def wide(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, requires_grad=True)

        def narrow(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

        u, delta, z = (narrow(batch, length, d_inner) for _ in range(3))
        B, C = (narrow(batch, length, groups, d_state) for _ in range(2))
        A = (-torch.rand(d_inner, d_state, device=device)).requires_grad_()
        out, final = selective_scan(
            u,
            delta,
            A,
            B,
            C,
            D=wide(d_inner),
            z=z,
            delta_bias=wide(d_inner),
            delta_softplus=True,
            initial_state=wide(rows, d_inner, d_state) if initial else None,
            cu_seqlens=Sequences.from_lengths(lengths, device) if packed else None,
            reverse=reverse,
            return_final_state=True,
            backend=backend,
        )
        (out.float().sum() + final.sum()).backward()
        yield f"selective_scan {tuple(u.shape)} N{d_state} groups {groups} {dtype}"


def both_ways(device: torch.device, backend: str) -> Iterator[str]:
    """Runs bidirectional scans and names each: (length, d_inner, d_state, dtype, gated)."""
    cases = (
        (131, 37, 3, torch.bfloat16, True),
        (300, 64, 16, torch.bfloat16, True),
        (270, 24, 64, torch.bfloat16, True),
        (77, 33, 5, torch.float32, False),
    )
    for length, d_inner, d_state, dtype, gated in cases:

        def narrow(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

        u, z, *deltas = (narrow(2, length, d_inner) for _ in range(4))
        ahead, back = (
            ScanDirection(
                delta,
                (-torch.rand(d_inner, d_state, device=device)).requires_grad_(),
                narrow(2, length, d_state),
                narrow(2, length, d_state),
                torch.randn(d_inner, device=device, requires_grad=True),
            )
            for delta in deltas
        )
        out = bidirectional_scan(u, ahead, back, z=z if gated else None, delta_softplus=True, backend=backend)
        out.float().sum().backward()
        yield f"bidirectional_scan {tuple(u.shape)} N{d_state} {dtype}"


def others(device: torch.device, backend: str) -> Iterator[str]:
    """Runs convolution, norm, loss and the single steps and names each."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(2, 131, 37, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(37, 4, device=device, dtype=dtype, requires_grad=True)
        bias = torch.randn(37, device=device, dtype=dtype, requires_grad=True)
        causal_conv1d(x, weight, bias, activation="silu", backend=backend).float().sum().backward()
        yield f"causal_conv1d {tuple(x.shape)} {dtype}"
        scale = torch.ones(37, device=device, dtype=dtype, requires_grad=True)
        normed, total = rms_norm(x, scale, residual=torch.randn_like(x), backend=backend)
        (normed.float().sum() + total.float().sum()).backward()
        yield f"rms_norm {tuple(x.shape)} {dtype}"
        logits, targets = torch.randn(3, 5001, device=device, dtype=dtype), torch.arange(3, device=device)
        cross_entropy(logits, targets, gradient=True, backend=backend)
        yield f"cross_entropy {tuple(logits.shape)} {dtype}"
        with torch.no_grad():
            row = torch.randn(3, 37, device=device, dtype=dtype)
            state = torch.zeros(3, 37, 5, device=device)
            A = -torch.rand(37, 5, device=device)
            BC = torch.randn(2, 3, 5, device=device, dtype=dtype)
            selective_scan_step_(row, row, A, BC[0], BC[1], state, delta_softplus=True, backend=backend)
            window = torch.zeros(3, 37, 3, device=device, dtype=dtype)
            causal_conv1d_step_(row, weight.detach(), bias.detach(), window, backend=backend)
        yield f"steps {dtype}"


def main(arguments: list[str] | None = None) -> int:
    """0 once all have run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sanitize",
        description="Every Triton op once on odd shapes, for compute-sanitizer.",
    )
    parser.add_argument("--device", default="cuda", help="default cuda; cpu under TRITON_INTERPRET=1")
    device = torch.device(parser.parse_args(arguments).device)
    torch.manual_seed(0)
    for run in (scans, both_ways, others):
        for name in run(device, "triton"):
            if device.type == "cuda":
                torch.cuda.synchronize()
            print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
