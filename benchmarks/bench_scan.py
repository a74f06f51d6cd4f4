"""The Triton selective scan on one NVIDIA GPU: checked on a slice first, then timed.

    python -m benchmarks.bench_scan [--only L8192] [--sweep] [--repeats 10]

`--sweep` times other launches of the same kernels beside the shipped one, at the shapes `--only` leaves.
Medians over repeats, by CUDA events, of the kernels alone (`selective_scan_fwd`, `selective_scan_bwd`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from benchmarks.harness import relative_error
from ssm_modal.kernels.dispatch import why_not
from ssm_modal.kernels.scan.launch import ScanLaunch, scan_launch
from ssm_modal.kernels.scan.ref import selective_scan_ref

# (batch, d_inner, length, d_state).
SHAPES = (
    (8, 2048, 2048, 16),
    (8, 2048, 8192, 16),
    (64, 1024, 1024, 16),
    (1, 2048, 131072, 16),
    (1, 1024, 1048576, 16),
    (8, 2048, 8192, 64),
    (1, 4096, 1048576, 16),
)
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
# ||value - reference|| / ||reference|| of bf16 outputs, of gradients in bf16.
OUTPUT, GRADIENT = 4e-3, 8e-3

Inputs = tuple[Tensor, ...]


def inputs(batch: int, d_inner: int, length: int, d_state: int) -> Inputs:
    """u, delta, A, B, C, D, z, delta_bias with step sizes from 0.001 to 0.1, as Mamba starts."""
    half = {"device": "cuda", "dtype": torch.bfloat16}
    dt = torch.exp(torch.empty(d_inner, device="cuda").uniform_(-6.9, -2.3))
    return (
        torch.randn(batch, length, d_inner, **half),
        torch.randn(batch, length, d_inner, **half),
        -torch.arange(1, d_state + 1, device="cuda", dtype=torch.float32).repeat(d_inner, 1),
        torch.randn(batch, length, 1, d_state, **half),
        torch.randn(batch, length, 1, d_state, **half),
        torch.ones(d_inner, device="cuda"),
        torch.randn(batch, length, d_inner, **half),
        torch.log(torch.expm1(dt)),
    )


def forward(x: Inputs, launch: ScanLaunch | None) -> tuple[Tensor, Tensor, Tensor]:
    """out, final state, saved states."""
    from ssm_modal.kernels.scan.triton_fwd import selective_scan_fwd

    return selective_scan_fwd(*x, True, None, None, False, launch=launch)


def backward(x: Inputs, dout: Tensor, states: Tensor, launch: ScanLaunch | None) -> tuple[Tensor | None, ...]:
    """Gradients of the eight inputs, and None for the initial state."""
    from ssm_modal.kernels.scan.triton_bwd import selective_scan_bwd

    return selective_scan_bwd(dout, None, *x, True, None, None, False, states, launch=launch)


def worst_error(launch: ScanLaunch | None, d_state: int) -> tuple[str, float]:
    """The comparison furthest from its limit, as its name and error / limit, on B2 D96 L700, in fp64."""
    x = inputs(2, 96, 700, d_state)
    wide = [t.double().requires_grad_() for t in x]
    u, delta, A, B, C, D, z, bias = wide
    ref = selective_scan_ref(u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True)
    dout = torch.randn_like(x[0])
    ref_grads = torch.autograd.grad(ref, wide, dout.double())
    out, _, states = forward(x, launch)
    found = backward(x, dout, states, launch)
    errors = {"out": relative_error(out, ref) / OUTPUT}
    for name, grad, right in zip(NAMES, found, ref_grads):
        errors[f"d{name}"] = relative_error(grad, right) / GRADIENT
    name = max(errors, key=errors.__getitem__)
    return name, errors[name]


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` calls after one to warm up (and compile)."""
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def sweep(shipped: ScanLaunch) -> list[tuple[str, ScanLaunch]]:
    """The shipped launch and variants of it, by name."""
    found = [("shipped", shipped)]
    for serial, registers in product((False, True), (64, 96, 128, None)):
        variant = replace(shipped, serial=serial, fwd_registers=registers, serial_registers=registers)
        found.append((f"serial {serial} registers {registers}", variant))
    for chunk in (32, 128, 256):
        found.append((f"chunk size {chunk}", replace(shipped, chunk_size=chunk)))
    blocks = ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4))
    for (block, warps), steps in product(blocks, (1, 2, 4)):
        variant = replace(shipped, bwd_block=block, bwd_warps=warps, bwd_steps=steps)
        found.append((f"bwd block {block} warps {warps} steps {steps}", variant))
    for splits in (1, 2, 4, 8, 16):
        found.append((f"bwd splits {splits}", replace(shipped, bwd_splits=splits)))
    return found


def report(label: str, x: Inputs, dout: Tensor, launch: ScanLaunch | None, repeats: int) -> None:
    """One line: forward, backward and both in ms, with the peak memory in GiB."""
    torch.cuda.reset_peak_memory_stats()
    ahead = milliseconds(lambda: forward(x, launch), repeats)
    states = forward(x, launch)[2]
    back = milliseconds(lambda: backward(x, dout, states, launch), repeats)
    print(
        f"{label:36s} fwd {ahead:9.3f} ms  bwd {back:9.3f} ms  fwd+bwd {ahead + back:9.3f} ms  "
        f"peak {torch.cuda.max_memory_allocated() / 2**30:6.2f} GiB",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    """Check, then time; exit status 1 where a check fails or there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_scan", description=main.__doc__)
    parser.add_argument("--only", default="", help="only shapes with this in their name, such as L8192")
    parser.add_argument("--sweep", action="store_true", help="time other launches too")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls a line")
    args = parser.parse_args(argv)
    reason = "there is no NVIDIA GPU" if not torch.cuda.is_available() else None
    reason = reason or why_not("selective_scan", "triton", torch.device("cuda"), torch.bfloat16)
    if reason is not None:
        print(f"bench_scan cannot run: {reason}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for d_state in (16, 64):
        for serial in (None, False, True):
            launch = scan_launch(2, 700, 96, 1, d_state, torch.device("cuda"))
            launch = launch if serial is None else replace(launch, serial=serial)
            name, error = worst_error(launch, d_state)
            print(f"check N{d_state} serial {launch.serial}: {name} at {error:.2f} of its limit")
            if not error <= 1.0:
                return 1
    for shape in SHAPES:
        batch, d_inner, length, d_state = shape
        label = f"B{batch} D{d_inner} L{length} N{d_state} bf16"
        if args.only not in label:
            continue
        try:
            x = inputs(*shape)
            dout = torch.randn_like(x[0])
            shipped = scan_launch(batch, length, d_inner, 1, d_state, torch.device("cuda"))
            report(label, x, dout, shipped, args.repeats)
            for name, launch in sweep(shipped) if args.sweep else []:
                report(f"  {name}", x, dout, launch, max(3, args.repeats // 3))
        except torch.cuda.OutOfMemoryError as error:
            print(f"{label}: out of memory ({str(error).splitlines()[0]})")
        x = dout = None
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
