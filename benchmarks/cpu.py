"""Cases of the compiled CPU kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Bar, Check, Options, Report, Unavailable, case, relative_error
from benchmarks.inputs import GRADIENTS, ScanInputs, reference_gradients, reference_output, scan_inputs
from benchmarks.ops import leaf
from benchmarks.reference import run_scan
from benchmarks.timing import Candidate, measure
from ssm_modal.kernels.conv import causal_conv1d
from ssm_modal.kernels.cpu.loader import why_unavailable

CPU = torch.device("cpu")
OURS = "ssm_modal, backend cpu"
LOOP = "plain loop, decays given"
LOOP_WHOLE = "plain loop"
PSCAN = "mambapy parallel scan"
FORWARD, TRAINING = "forward", "forward + backward"
OUTPUT, GRADIENT = 1e-5, 1e-4


def _need_compiled() -> None:
    reason = why_unavailable()
    if reason is not None:
        raise Unavailable(reason)


def _sizes(options: Options, *sizes: int) -> ScanInputs:
    return scan_inputs(*options.shrink(*sizes), device=CPU, dtype=torch.float32)


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


def _close(
    names: tuple[str, ...], right: tuple[Tensor, ...], limit: float
) -> Callable[[object], list[Check]]:
    def verify(result: object) -> list[Check]:
        found: tuple[Tensor, ...] = (result,) if isinstance(result, Tensor) else tuple(result)  # type: ignore[arg-type]
        return [Check(n, relative_error(v, r), limit) for n, v, r in zip(names, found, right)]

    return verify


@case(on="cpu", seconds=20.0)
def cpu_scan_forward(options: Options) -> Report:
    """Selective scan forward, B1 D1536 L2048 N16 fp32, beside a plain loop over time."""
    _need_compiled()
    x = _sizes(options, 1, 1536, 2048, 16)
    report = Report("cpu_scan_forward", x.shape, OURS, bars=options.bars(Bar(FORWARD, 1 / 30, LOOP_WHOLE)))
    with torch.no_grad():
        verify = _close(("output",), (reference_output(x),), OUTPUT)
        decay, added = _discretised(x)
        ways = [
            Candidate(OURS, lambda: run_scan(x.given, backend="cpu"), verify),
            Candidate(LOOP, lambda: _loop(x, decay, added), verify, slow=True),
            Candidate(LOOP_WHOLE, lambda: _loop(x, *_discretised(x)), verify, slow=True),
        ]
        measure(report, FORWARD, ways, options, CPU)
    return report


@case(on="cpu", seconds=30.0)
def cpu_scan_training(options: Options) -> Report:
    """Selective scan forward and backward, B1 D1536 L2048 N16 fp32, beside mambapy's parallel scan."""
    _need_compiled()
    x = _sizes(options, 1, 1536, 2048, 16)
    report = Report("cpu_scan_training", x.shape, OURS, bars=options.bars(Bar(TRAINING, 1 / 30, PSCAN)))
    verify = _close(GRADIENTS, reference_gradients(x), GRADIENT)
    leaves = x.leaves()

    def mambapy() -> Candidate:
        peers.peer("mambapy.pscan", "pscan")
        return Candidate(PSCAN, lambda: _gradients(x, leaves, peers.mambapy_scan), verify, slow=True)

    ways = [Candidate(OURS, lambda: _gradients(x, leaves, _compiled), verify)]
    ways += peers.offer(report.notes, PSCAN, mambapy)
    measure(report, TRAINING, ways, options, CPU)
    return report


def _compiled(given: tuple[Tensor, ...]) -> Tensor:
    return run_scan(given, backend="cpu")


def _gradients(x: ScanInputs, leaves: tuple[Tensor, ...], scan: Callable) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scan(leaves), leaves, x.dout)


@case(on="cpu", quick=True, seconds=4.0)
def cpu_scan_small(options: Options) -> Report:
    """Selective scan forward and backward, B8 D128 L256 N16 fp32, beside the chunked torch form."""
    _need_compiled()
    x = _sizes(options, 8, 128, 256, 16)
    report = Report("cpu_scan_small", x.shape, OURS)
    verify = _close(GRADIENTS, reference_gradients(x), GRADIENT)
    leaves = x.leaves()
    ways = [
        Candidate(OURS, lambda: _gradients(x, leaves, _compiled), verify),
        Candidate(
            "ssm_modal, backend torch",
            lambda: _gradients(x, leaves, lambda given: run_scan(given, backend="torch")),
            verify,
        ),
    ]
    measure(report, TRAINING, ways, options, CPU)
    return report


@case(on="cpu", seconds=10.0)
def cpu_conv(options: Options) -> Report:
    """Causal convolution with SiLU, forward and backward, B1 D1536 L2048 width 4 fp32, beside F.conv1d."""
    _need_compiled()
    batch, d_inner, length = options.shrink(1, 1536, 2048)
    make = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, d_inner, generator=make)
    weight, bias = torch.randn(d_inner, 4, generator=make) / 2, torch.randn(d_inner, generator=make)
    dout = torch.randn(x.shape, generator=make)
    report = Report("cpu_conv", f"B{batch} D{d_inner} L{length} width 4 fp32", OURS)

    def padded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = F.conv1d(x, weight.unsqueeze(1), bias, padding=3, groups=weight.shape[0])
        return F.silu(out[..., : x.shape[2]])

    def train(function: Callable, given: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor, ...]:
        out = function(*given)
        return (out.detach(), *torch.autograd.grad(out, given, dout))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, activation="silu", backend="cpu")

    def turning(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return padded(x.transpose(1, 2), weight, bias).transpose(1, 2)

    leaves = (leaf(x), leaf(weight), leaf(bias))
    first = (leaf(x.transpose(1, 2).contiguous()), *leaves[1:])
    dout_first = dout.transpose(1, 2).contiguous()
    right = train(turning, tuple(leaf(t.double()) for t in leaves), dout.double())

    def verify(result: object) -> list[Check]:
        checks = _close(("output", "dx", "dweight", "dbias"), right, GRADIENT)(result)
        return [Check(checks[0].name, checks[0].error, OUTPUT), *checks[1:]]

    ways = [
        Candidate(OURS, lambda: train(ours, leaves, dout), verify),
        Candidate(
            "F.conv1d + silu, channels first",
            lambda: train(padded, first, dout_first),
            lambda result: verify(peers.turned(result)),
        ),
        Candidate("F.conv1d + silu, turned", lambda: train(turning, leaves, dout), verify),
    ]
    measure(report, TRAINING, ways, options, CPU)
    return report
