"""Single steps, as generation takes them: in place on the state, called eagerly and replayed from a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Check, Options, Report, case, relative_error
from benchmarks.inputs import short
from benchmarks.reference import OUTPUT
from benchmarks.scan import OURS
from benchmarks.timing import Candidate, measure
from ssm_modal.kernels.conv import causal_conv1d_step, causal_conv1d_step_
from ssm_modal.kernels.lti import lti_scan_step, lti_scan_step_
from ssm_modal.kernels.scan import selective_scan_step, selective_scan_step_

EAGER, GRAPH = "step, eager", "step, in a graph"
DTYPE = torch.bfloat16


def _both(report: Report, options: Options, made: Callable[[], list[Candidate]]) -> Report:
    measure(report, EAGER, made(), options, options.device, how="wall")
    if options.device.type == "cuda":
        measure(report, GRAPH, made(), options, options.device, how="graph")
    return report


def _check(state: Tensor, start: Tensor, right: tuple[Tensor, Tensor], dtype: torch.dtype) -> Callable:
    """The first call's output and what it made of the state, which then starts anew."""

    def verify(result: object) -> list[Check]:
        assert isinstance(result, Tensor)
        after = torch.view_as_real(state) if state.is_complex() else state
        expected = torch.view_as_real(right[1]) if right[1].is_complex() else right[1]
        wide = OUTPUT[torch.float32] if state.dtype != dtype else OUTPUT[dtype]
        checks = [
            Check("out", relative_error(result, right[0]), OUTPUT[dtype]),
            Check("state", relative_error(after, expected), wide),
        ]
        state.copy_(start)
        return checks

    return verify


@case(quick=True, seconds=3.0)
def step_scan(options: Options) -> Report:
    """selective_scan_step_, B64 D2048 N16 bf16, beside mamba_ssm's selective_state_update."""
    options.need()
    device = options.device
    batch, d_inner, _, d_state = options.shrink(64, 2048, 1, 16)
    make = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(*shape, generator=make, device=device, dtype=dtype)

    u, delta, z = (normal(batch, d_inner) for _ in range(3))
    B, C = (normal(batch, d_state) for _ in range(2))
    A = -torch.arange(1.0, d_state + 1, device=device).repeat(d_inner, 1)
    D, bias = normal(d_inner, dtype=torch.float32), normal(d_inner, dtype=torch.float32) - 4
    start = normal(batch, d_inner, d_state, dtype=torch.float32)
    wide = [t.double() for t in (u, delta, A, B, C, start)]
    right = selective_scan_step(
        *wide, D=D.double(), z=z.double(), delta_bias=bias.double(), delta_softplus=True
    )
    report = Report("step_scan", f"B{batch} D{d_inner} N{d_state} {short(DTYPE)}", OURS)

    def made() -> list[Candidate]:
        mine = start.clone()

        def ours() -> Tensor:
            return selective_scan_step_(
                u, delta, A, B, C, mine, D=D, z=z, delta_bias=bias, delta_softplus=True
            )

        def beside() -> Candidate:
            update = peers.peer("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
            state = start.clone()

            def run() -> Tensor:
                return update(state, u, delta, A, B, C, D, z=z, dt_bias=bias, dt_softplus=True)

            return Candidate(peers.MAMBA_SSM, run, _check(state, start, right, DTYPE))

        notes: list[str] = [] if report.figures else report.notes
        found = [Candidate(OURS, ours, _check(mine, start, right, DTYPE))]
        return found + peers.offer(notes, peers.MAMBA_SSM, beside)

    return _both(report, options, made)


@case(quick=True, seconds=3.0)
def step_conv(options: Options) -> Report:
    """causal_conv1d_step_, B64 D2048 width 4 bf16, beside causal_conv1d_update."""
    options.need("causal_conv1d")
    device = options.device
    batch, d_inner = options.shrink(64, 2048)
    make = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device=device, dtype=DTYPE)

    x, weight, bias, start = (
        normal(batch, d_inner),
        normal(d_inner, 4),
        normal(d_inner),
        normal(batch, d_inner, 3),
    )
    wide = [t.double() for t in (x, weight, bias, start)]
    right = causal_conv1d_step(*wide, activation="silu")
    report = Report("step_conv", f"B{batch} D{d_inner} width 4 {short(DTYPE)}", OURS)

    def made() -> list[Candidate]:
        mine = start.clone()

        def ours() -> Tensor:
            return causal_conv1d_step_(x, weight, bias, mine, activation="silu")

        def beside() -> Candidate:
            update = peers.peer("causal_conv1d", "causal_conv1d_update")
            state = start.clone()

            def run() -> Tensor:
                return update(x, state, weight, bias, activation="silu")

            return Candidate(peers.CAUSAL_CONV1D, run, _check(state, start, right, DTYPE))

        notes: list[str] = [] if report.figures else report.notes
        found = [Candidate(OURS, ours, _check(mine, start, right, DTYPE))]
        return found + peers.offer(notes, peers.CAUSAL_CONV1D, beside)

    return _both(report, options, made)


@case(seconds=3.0)
def step_lti(options: Options) -> Report:
    """lti_scan_step_, B64 D1024 N32 bf16."""
    options.need("lti_scan")
    device = options.device
    batch, d_inner, _, d_state = options.shrink(64, 1024, 1, 32)
    make = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.complex64) -> Tensor:
        return torch.randn(*shape, generator=make, device=device, dtype=dtype)

    u, z = normal(batch, d_inner, dtype=DTYPE), normal(batch, d_inner, dtype=DTYPE)
    dt = torch.rand(d_inner, generator=make, device=device) * 0.1 + 1e-3
    A = torch.complex(torch.tensor(-0.5), torch.tensor(3.0)).to(device) * torch.ones(
        d_inner, d_state, device=device
    )
    B, C = (normal(d_inner, d_state) for _ in range(2))
    start = normal(batch, d_inner, d_state)
    D = normal(d_inner, dtype=torch.float32)
    wide = [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (u, dt, A, B, C, start)]
    right = lti_scan_step(*wide, D=D.double(), z=z.double())
    report = Report("step_lti", f"B{batch} D{d_inner} N{d_state} {short(DTYPE)}", OURS)

    def made() -> list[Candidate]:
        mine = start.clone()

        def ours() -> Tensor:
            return lti_scan_step_(u, dt, A, B, C, mine, D=D, z=z)

        return [Candidate(OURS, ours, _check(mine, start, right, DTYPE))]

    return _both(report, options, made)
