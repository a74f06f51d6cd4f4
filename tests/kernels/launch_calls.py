"""Calls of every Triton kernel over what a launch can depend on: dtypes, strides, alignment, sizes of 1."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ssm_modal.kernels.sequences import Sequences

Call = tuple[str, list[Tensor], Callable[[], Any]]

# (batch, length, d_inner, groups, d_state): whole blocks and odd ones, 1 everywhere, multiples of 16 and not.
SHAPES = ((1, 1, 1, 1, 1), (2, 16, 64, 1, 16), (2, 300, 64, 2, 16), (16, 5, 33, 1, 3), (1, 17, 64, 1, 16))
LAYOUTS = ("contiguous", "halves", "shifted", "transposed")


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x` (batch, length, channels), lying in memory as `layout` says."""
    if layout == "halves":
        return torch.cat([x, x], -1)[..., x.shape[-1] :]
    if layout == "shifted":
        room = x.new_zeros(x.numel() + 1)
        return room[1:].view(x.shape).copy_(x)
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


def calls(device: torch.device, *, few: bool = False) -> Iterator[Call]:
    """(name, inputs, call) of each; a call returns tensors, None among them, in tuples.

    few: some sixty binaries to compile, where all need several hundred.
    """
    from ssm_modal.kernels.conv.triton_bwd import causal_conv1d_bwd
    from ssm_modal.kernels.conv.triton_fwd import causal_conv1d_fwd
    from ssm_modal.kernels.conv.triton_step import causal_conv1d_step_triton
    from ssm_modal.kernels.loss.triton_softmax import row_softmax
    from ssm_modal.kernels.norm.triton_bwd import rms_norm_bwd
    from ssm_modal.kernels.norm.triton_fwd import rms_norm_fwd
    from ssm_modal.kernels.scan.triton_bwd import selective_scan_bwd
    from ssm_modal.kernels.scan.triton_fwd import selective_scan_fwd
    from ssm_modal.kernels.scan.triton_step import selective_scan_step_triton

    make = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
        x = torch.randn(*shape, generator=make).to(device, dtype)
        return _laid_out(x, layout) if x.ndim == 3 else x

    for shape in SHAPES[::2] if few else SHAPES:
        for dtype in (torch.bfloat16,) if few else (torch.bfloat16, torch.float32):
            for layout in LAYOUTS[::2] if few else LAYOUTS:
                for full in (True,) if few else (True, False):
                    batch, length, d_inner, groups, n = shape
                    name = f"{shape} {dtype} {layout}{' full' if full else ''}"
                    seqs = None
                    if full and batch == 1 and length > 1:
                        seqs = Sequences.from_lengths((length - 7, 0, 7), device)
                    rows = batch if seqs is None else seqs.n
                    u, delta, z, dout = (
                        random(batch, length, d_inner, dtype=dtype, layout=layout) for _ in range(4)
                    )
                    B, C = (
                        random(batch, length, groups * n, dtype=dtype, layout=layout).unflatten(
                            2, (groups, n)
                        )
                        for _ in range(2)
                    )
                    A, D, bias = -random(d_inner, n).exp(), random(d_inner), random(d_inner)
                    h, dh = random(rows, d_inner, n), random(rows, d_inner, n)
                    optional = (D, z, bias) if full else (None, None, None)
                    initial, dfinal = (h, dh) if full else (None, None)
                    scan = (u, delta, A, B, C, *optional, True, initial, seqs, full)

                    def run_scan(
                        scan: Any = scan, dout: Tensor = dout, dfinal: Tensor | None = dfinal
                    ) -> Any:
                        out, final, states = selective_scan_fwd(*scan)
                        return out, final, selective_scan_bwd(dout, dfinal, *scan, states)

                    yield f"scan {name}", [u, delta, B, C, z, dout, D, bias], run_scan

                    weight = random(d_inner, 4, dtype=dtype)
                    taps = random(d_inner, dtype=dtype) if full else None
                    before, after = (random(rows, d_inner, 3, dtype=dtype) for _ in range(2))
                    old, dnew = (before, after) if full else (None, None)

                    def run_conv(
                        conv: Any = (u, weight, taps, full, old, seqs, full),
                        dout: Tensor = dout,
                        dfinal: Tensor | None = dnew,
                    ) -> Any:
                        return causal_conv1d_fwd(*conv), causal_conv1d_bwd(dout, dfinal, *conv)

                    yield f"conv {name}", [u, weight, dout, before, after], run_conv

                    gamma = random(d_inner, dtype=dtype) if full else None
                    residual = random(batch, length, d_inner, layout=layout) if full else None
                    gate = z if full else None

                    def run_norm(
                        x: Tensor = u,
                        gamma: Tensor | None = gamma,
                        residual: Tensor | None = residual,
                        gate: Tensor | None = gate,
                        dout: Tensor = dout,
                    ) -> Any:
                        out, total, rstd = rms_norm_fwd(x, gamma, residual, gate, 1e-5, False, True, None)
                        s = x if total is None else total
                        wide = None if total is None else torch.float32
                        grads = rms_norm_bwd(dout, total, s, gamma, gate, rstd, False, x.dtype, wide)
                        return out, total, rstd, grads

                    yield f"norm {name}", [u, z, dout], run_norm

                    def run_softmax(
                        x: Tensor = u[:, 0], scale: Tensor | None = bias[-1] if full else None
                    ) -> Any:
                        return row_softmax(x, scale, scale is not None)

                    yield f"softmax {name}", [u, bias], run_softmax

                    step = (u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0])
                    gates = (D, z[:, 0], bias) if full else (None, None, None)
                    state = random(batch, d_inner, n)

                    def run_step(step: Any = step, gates: Any = gates, state: Tensor = state) -> Any:
                        new = torch.empty_like(state)
                        return selective_scan_step_triton(*step, state, *gates, True, new), new

                    yield f"scan step {name}", [*step, state, D, bias], run_step

                    window = random(batch, d_inner, 3, dtype=dtype, layout=layout)

                    def run_conv_step(
                        x: Tensor = step[0],
                        weight: Tensor = weight,
                        taps: Tensor | None = taps,
                        window: Tensor = window,
                    ) -> Any:
                        new = torch.empty_like(window)
                        return causal_conv1d_step_triton(x, weight, taps, window, True, new), new

                    yield f"conv step {name}", [step[0], weight, window], run_conv_step


MODULES = (
    "scan.triton_common", "scan.triton_fwd", "scan.triton_bwd", "scan.gradient_launch", "scan.triton_step",
    "conv.triton_fwd", "conv.triton_bwd", "conv.triton_step", "norm.triton_fwd", "norm.triton_bwd",
    "scan.triton_totals", "triton_sums", "loss.triton_softmax",
)  # fmt: skip


@contextmanager
def from_scratch() -> Iterator[None]:
    """Inside, the ordinary launches, and nothing that these modules keep from call to call is used."""
    from ssm_modal.kernels import launching

    modules = [importlib.import_module(f"ssm_modal.kernels.{name}") for name in MODULES]
    homes = {m.__name__ for m in modules}
    kept = [
        (m, name, f)
        for m in modules
        for name, f in vars(m).items()
        if hasattr(f, "cache_info") and f.__module__ in homes
    ]
    assert len(kept) >= len(MODULES)
    direct = launching.DIRECT
    try:
        launching.DIRECT = False
        for module, name, f in kept:
            setattr(module, name, f.__wrapped__)
        yield
    finally:
        launching.DIRECT = direct
        for module, name, f in kept:
            setattr(module, name, f)


def tensors(result: Any) -> list[Tensor]:
    """The tensors in a call's result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if result is None:
        return []
    return [t for part in result for t in tensors(part)]
