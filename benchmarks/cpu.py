"""Cases of the compiled CPU kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Bar, Check, Options, Report, Unavailable, case, relative_error, time_in_turn
from benchmarks.inputs import GRADIENTS, ScanInputs, reference_gradients, reference_output, scan_inputs
from ssm_modal.kernels.conv import causal_conv1d
from ssm_modal.kernels.cpu.loader import why_unavailable
from ssm_modal.kernels.scan import selective_scan

CPU = torch.device("cpu")
OURS = "ssm_modal, backend cpu"
LOOP = "plain loop, exp(dt A) and dt B u given"
LOOP_WHOLE = "plain loop, these two computed first"
PSCAN = "mambapy parallel scan"


def _need_compiled() -> None:
    reason = why_unavailable()
    if reason is not None:
        raise Unavailable(reason)


def _ours(x: ScanInputs, given: tuple[Tensor, ...] | None = None) -> Tensor:
    u, delta, A, B, C, D, z, bias = given or (x.u, x.delta, x.A, x.B, x.C, x.D, x.z, x.delta_bias)
    return selective_scan(u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True, backend="cpu")


def _discretised(x: ScanInputs) -> tuple[Tensor, Tensor]:
    """exp(dt A) and dt B u of all steps, (batch, length, d_inner, d_state) each."""
    dt = F.softplus(x.delta + x.delta_bias)
    decay = torch.exp(dt.unsqueeze(-1) * x.A)
    added = (dt * x.u).unsqueeze(-1) * x.B.unsqueeze(2)
    return decay, added


def _loop(x: ScanInputs, decay: Tensor, added: Tensor) -> Tensor:
    """The recurrence one step after the other, exp(dt A) and dt B u of all steps being given."""
    h = torch.zeros_like(added[:, 0])
    ys = []
    for t in range(x.u.shape[1]):
        h = decay[:, t] * h + added[:, t]
        ys.append((h * x.C[:, t].unsqueeze(1)).sum(-1))
    return (torch.stack(ys, dim=1) + x.D * x.u) * F.silu(x.z)


def _pscan() -> Callable[[Tensor, Tensor], Tensor]:
    try:
        from mambapy.pscan import pscan
    except ImportError as error:
        raise Unavailable("mambapy is not installed (pip install mambapy)") from error
    return pscan


def _mambapy(pscan: Callable[[Tensor, Tensor], Tensor], given: tuple[Tensor, ...]) -> Tensor:
    """MambaBlock.selective_scan of mambapy on our names, with the step size and the gate around it."""
    u, delta, A, B, C, D, z, bias = given
    dt = F.softplus(delta + bias)
    decay = torch.exp(dt.unsqueeze(-1) * A)
    added = (dt.unsqueeze(-1) * B.unsqueeze(2)) * u.unsqueeze(-1)
    h = pscan(decay, added)
    y = (h @ C.unsqueeze(-1)).squeeze(3)
    return (y + D * u) * F.silu(z)


@case
def cpu_scan_forward(options: Options) -> Report:
    """Selective scan forward, B1 D1536 L2048 N16 fp32, beside a plain loop over time."""
    _need_compiled()
    x = scan_inputs(1, 1536, 2048, 16, CPU, torch.float32)
    report = Report("cpu_scan_forward", x.shape, OURS, bars=(Bar(LOOP_WHOLE, 30.0),))
    with torch.no_grad():
        reference = reference_output(x)
        report.checks.append(Check("output", relative_error(_ours(x), reference), 1e-5))
        if not report.correct:
            return report
        decay, added = _discretised(x)
        report.checks.append(
            Check("output of the plain loop", relative_error(_loop(x, decay, added), reference), 1e-4)
        )
        if not report.correct:
            return report
        slow = min(options.repeats, max(options.slow_repeats, 3))
        report.timings = time_in_turn(
            {
                OURS: lambda: _ours(x),
                LOOP: lambda: _loop(x, decay, added),
                LOOP_WHOLE: lambda: _loop(x, *_discretised(x)),
            },
            {OURS: options.repeats, LOOP: slow, LOOP_WHOLE: slow},
            CPU,
        )
    return report


@case
def cpu_scan_training(options: Options) -> Report:
    """Selective scan forward and backward, B1 D1536 L2048 N16 fp32, beside mambapy's parallel scan."""
    _need_compiled()
    x = scan_inputs(1, 1536, 2048, 16, CPU, torch.float32)
    report = Report("cpu_scan_training", x.shape, OURS, bars=(Bar(PSCAN, 30.0),))
    reference = reference_gradients(x)
    leaves = x.leaves()

    def train_ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(_ours(x, leaves), leaves, x.dout)

    found = train_ours()
    report.checks += [Check(n, relative_error(g, r), 1e-4) for n, g, r in zip(GRADIENTS, found, reference)]
    if not report.correct:
        return report
    candidates: dict[str, Callable[[], object]] = {OURS: train_ours}
    try:
        pscan = _pscan()

        def train_mambapy() -> tuple[Tensor, ...]:
            return torch.autograd.grad(_mambapy(pscan, leaves), leaves, x.dout)

        worst = max(relative_error(g, r) for g, r in zip(train_mambapy(), reference))
        if worst > 1e-3:
            report.notes.append(f"mambapy left out: its gradients are off by {worst:.1e}")
        else:
            candidates[PSCAN] = train_mambapy
    except Unavailable as why:
        report.notes.append(f"mambapy left out: {why}")
    report.timings = time_in_turn(candidates, {OURS: options.repeats, PSCAN: options.slow_repeats}, CPU)
    return report


@case
def cpu_scan_small(options: Options) -> Report:
    """Selective scan forward and backward, B8 D128 L256 N16 fp32, beside the chunked torch form."""
    _need_compiled()
    x = scan_inputs(8, 128, 256, 16, CPU, torch.float32)
    torch_form = "ssm_modal, backend torch"
    report = Report("cpu_scan_small", x.shape, OURS)
    reference = reference_gradients(x)
    leaves = x.leaves()

    def train(backend: str) -> tuple[Tensor, ...]:
        u, delta, A, B, C, D, z, bias = leaves
        out = selective_scan(
            u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True, backend=backend
        )
        return torch.autograd.grad(out, leaves, x.dout)

    found = train("cpu")
    report.checks += [Check(n, relative_error(g, r), 1e-4) for n, g, r in zip(GRADIENTS, found, reference)]
    if report.correct:
        report.timings = time_in_turn(
            {OURS: lambda: train("cpu"), torch_form: lambda: train("torch")},
            {OURS: 4 * options.repeats, torch_form: options.repeats},
            CPU,
        )
    return report


@case
def cpu_conv(options: Options) -> Report:
    """Causal convolution with SiLU, forward and backward, B1 D1536 L2048 width 4 fp32, beside F.conv1d."""
    _need_compiled()
    make = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2048, 1536, generator=make)
    weight, bias = torch.randn(1536, 4, generator=make) / 2, torch.randn(1536, generator=make)
    dout = torch.randn(x.shape, generator=make)
    native = "F.conv1d + silu, channels first"
    turned = "F.conv1d + silu, turned to channels last"
    report = Report("cpu_conv", "B1 D1536 L2048 width 4 float32, forward and backward", OURS)

    def padded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = F.conv1d(x, weight.unsqueeze(1), bias, padding=3, groups=weight.shape[0])
        return F.silu(out[..., : x.shape[2]])

    leaves = tuple(t.detach().requires_grad_() for t in (x, weight, bias))
    first = (x.transpose(1, 2).contiguous().requires_grad_(), *leaves[1:])
    dout_first = dout.transpose(1, 2).contiguous()

    def ours() -> tuple[Tensor, ...]:
        out = causal_conv1d(*leaves, activation="silu", backend="cpu")
        assert isinstance(out, Tensor)
        return torch.autograd.grad(out, leaves, dout)

    def channels_first() -> tuple[Tensor, ...]:
        return torch.autograd.grad(padded(*first), first, dout_first)

    def channels_last() -> tuple[Tensor, ...]:
        out = padded(leaves[0].transpose(1, 2), *leaves[1:]).transpose(1, 2)
        return torch.autograd.grad(out, leaves, dout)

    wide = tuple(t.detach().double().requires_grad_() for t in leaves)
    reference_out = padded(wide[0].transpose(1, 2), *wide[1:]).transpose(1, 2)
    reference = torch.autograd.grad(reference_out, wide, dout.double())
    with torch.no_grad():
        out = causal_conv1d(*leaves, activation="silu", backend="cpu")
    assert isinstance(out, Tensor)
    report.checks.append(Check("output", relative_error(out, reference_out), 1e-5))
    for name, value, right in zip(("dx", "dweight", "dbias"), ours(), reference):
        report.checks.append(Check(name, relative_error(value, right), 1e-4))
    if report.correct:
        rounds = dict.fromkeys((OURS, native, turned), options.repeats)
        report.timings = time_in_turn(
            {OURS: ours, native: channels_first, turned: channels_last}, rounds, CPU
        )
    return report
