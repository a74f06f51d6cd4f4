"""The other ops over whole sequences: causal convolution, RMSNorm with residual, the time-invariant scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Bar, Check, Options, Report, case, relative_error
from benchmarks.inputs import short
from benchmarks.reference import GRADIENT, OUTPUT, spread
from benchmarks.scan import FORWARD, OURS, TRAINING
from benchmarks.timing import Candidate, measure
from ssm_modal.kernels.conv import causal_conv1d
from ssm_modal.kernels.lti import lti_scan
from ssm_modal.kernels.norm import rms_norm, rms_norm_ref

Function = Callable[[Sequence[Tensor]], Tensor | tuple[Tensor, ...]]
Verify = Callable[[object], list[Check]]


def way(
    name: str,
    function: Function,
    given: Sequence[Tensor],
    douts: Sequence[Tensor],
    verify: Verify,
    training: bool,
) -> Candidate:
    """`function` of `given`, forward, or forward and backward from `douts`, one an output.

    The result: the outputs, with training followed by the gradients of `given`.
    """

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(training):
            found = function(given)
        outs = (found,) if isinstance(found, Tensor) else found
        if not training:
            return outs
        return (*(out.detach() for out in outs), *torch.autograd.grad(outs, given, douts))

    return Candidate(name, run, verify, lambda: (*given, *douts) if training else given)


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def compare_both(
    report: Report, options: Options, ways: Callable[[bool, list[str]], list[Candidate]], memory: bool = True
) -> None:
    """Forward, then forward + backward of `ways(training, notes)`."""
    measure(report, FORWARD, ways(False, report.notes), options, options.device)
    measure(report, TRAINING, ways(True, []), options, options.device, memory=memory)


@case(quick=True, seconds=4.0)
def conv(options: Options) -> Report:
    """Causal convolution with SiLU, (batch, length, channel), B8 D2048 L8192 width 4 bf16."""
    options.need("causal_conv1d")
    device, dtype = options.device, torch.bfloat16
    batch, d_inner, length = options.shrink(8, 2048, 8192)
    make = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device=device, dtype=dtype)

    x, weight, bias, dout = normal(batch, length, d_inner), normal(d_inner, 4), normal(d_inner), None
    dout = normal(batch, length, d_inner)
    bars = options.bars(Bar(FORWARD, 0.15), Bar(TRAINING, 0.40))
    report = Report("conv", f"B{batch} D{d_inner} L{length} width 4 {short(dtype)}", OURS, bars=bars)
    verify = conv_reference(x, weight, bias, dout)
    given = (leaf(x), leaf(weight), leaf(bias))

    def ours(given: Sequence[Tensor]) -> Tensor:
        return causal_conv1d(*given, activation="silu", backend=options.backend("causal_conv1d"))

    def ways(training: bool, notes: list[str]) -> list[Candidate]:
        made = [way(OURS, ours, given, (dout,), verify, training)]
        first = (leaf(x.transpose(1, 2).contiguous()), *given[1:])
        dout_first = dout.transpose(1, 2).contiguous()

        def channels_first(function: Function, name: str) -> Candidate:
            return way(name, function, first, (dout_first,), lambda r: verify(peers.turned(r)), training)

        def beside() -> tuple[Candidate, ...]:
            function = peers.peer("causal_conv1d", "causal_conv1d_fn")
            _need_cuda(options)

            def same_layout(given: Sequence[Tensor]) -> Tensor:
                x, weight, bias = given
                return function(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

            return (
                way(f"{peers.CAUSAL_CONV1D}, our layout", same_layout, given, (dout,), verify, training),
                channels_first(
                    lambda g: function(*g, activation="silu"), f"{peers.CAUSAL_CONV1D}, channels first"
                ),
            )

        for found in peers.offer(notes, peers.CAUSAL_CONV1D, beside):
            made += found
        made.append(channels_first(_torch_conv, "F.conv1d + silu, channels first"))
        return made

    compare_both(report, options, ways)
    return report


def _need_cuda(options: Options) -> None:
    if options.device.type != "cuda":
        raise peers.Unavailable("it runs on NVIDIA GPUs only")


def _torch_conv(given: Sequence[Tensor]) -> Tensor:
    x, weight, bias = given
    padded = F.conv1d(x, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=weight.shape[0])
    return F.silu(padded[..., : x.shape[2]])


def conv_reference(x: Tensor, weight: Tensor, bias: Tensor, dout: Tensor) -> Verify:
    """On some channels in fp64: channels do not meet."""
    some = spread(x.shape[2], 16, x.device)
    given = tuple(leaf(t.double()) for t in (x[..., some].transpose(1, 2), weight[some], bias[some]))
    out = _torch_conv(given)
    grads = torch.autograd.grad(out, given, dout[..., some].transpose(1, 2).double())
    right = (out.detach().transpose(1, 2), grads[0].transpose(1, 2), *grads[1:])

    def verify(result: object) -> list[Check]:
        found: tuple[Tensor, ...] = tuple(result)  # type: ignore[arg-type]
        checks = []
        for name, value, r, axis in zip(("out", "dx", "dweight", "dbias"), found, right, (2, 2, 0, 0)):
            limit = (OUTPUT if name == "out" else GRADIENT)[x.dtype]
            checks.append(Check(name, relative_error(value.index_select(axis, some), r), limit))
        return checks

    return verify


@case(quick=True, seconds=4.0)
def norm(options: Options) -> Report:
    """RMSNorm with the residual added in front, the sum in fp32, 65,536 x 1,024 bf16."""
    options.need("rms_norm")
    device, dtype = options.device, torch.bfloat16
    batch, dim, length = options.shrink(8, 1024, 8192)
    make = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=make, device=device, dtype=dtype)

    x, weight = normal(batch, length, dim), normal(dim)
    residual = normal(batch, length, dim, dtype=torch.float32)
    douts = (normal(batch, length, dim), normal(batch, length, dim, dtype=torch.float32))
    report = Report("norm", f"{batch * length} x {dim} {short(dtype)}, residual fp32", OURS)
    verify = _norm_reference(x, weight, residual, douts)
    given = (leaf(x), leaf(weight), leaf(residual))

    def ours(given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        x, weight, residual = given
        backend = options.backend("rms_norm")
        return rms_norm(x, weight, residual=residual, residual_in_fp32=True, backend=backend)

    def composed(given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        x, weight, residual = given
        total = x + residual
        return F.rms_norm(total, (dim,), weight.float(), 1e-5).to(x.dtype), total

    def ways(training: bool, notes: list[str]) -> list[Candidate]:
        def beside() -> Candidate:
            function = peers.peer("mamba_ssm.ops.triton.layer_norm", "rms_norm_fn")
            _need_cuda(options)

            def run(given: Sequence[Tensor]) -> tuple[Tensor, ...]:
                x, weight, residual = given
                return function(
                    x, weight, None, residual=residual, prenorm=True, residual_in_fp32=True, eps=1e-5
                )

            return way(peers.MAMBA_SSM, run, given, douts, verify, training)

        made = [way(OURS, ours, given, douts, verify, training)]
        made += peers.offer(notes, peers.MAMBA_SSM, beside)
        made.append(way("x + residual, F.rms_norm", composed, given, douts, verify, training))
        return made

    compare_both(report, options, ways)
    return report


def _norm_reference(x: Tensor, weight: Tensor, residual: Tensor, douts: Sequence[Tensor]) -> Verify:
    """Rows meet only in the gradient of the weight, and all of them fit in fp64."""
    given = tuple(leaf(t.double()) for t in (x, weight, residual))
    outs = rms_norm_ref(given[0], given[1], residual=given[2])
    grads = torch.autograd.grad(outs, given, [d.double() for d in douts])
    right = (outs[0].detach(), outs[1].detach(), *grads)

    def verify(result: object) -> list[Check]:
        found: tuple[Tensor, ...] = tuple(result)  # type: ignore[arg-type]
        names = ("out", "sum", "dx", "dweight", "dresidual")
        return [
            Check(n, relative_error(v, r), (OUTPUT if n in ("out", "sum") else GRADIENT)[x.dtype])
            for n, v, r in zip(names, found, right)
        ]

    return verify


@case(quick=True, seconds=5.0)
def lti(options: Options) -> Report:
    """The time-invariant scan (S4D), B8 D1024 L8192 N32 fp32, beside one FFT convolution."""
    return _lti("lti", options, 8, 1024, 8192)


@case(seconds=6.0)
def lti_long(options: Options) -> Report:
    """The time-invariant scan (S4D), B1 D512 L131072 N32 fp32, beside one FFT convolution."""
    return _lti("lti_long", options, 1, 512, 131072)


def _lti(name: str, options: Options, batch: int, d_inner: int, length: int) -> Report:
    options.need("lti_scan", torch.float32)
    device = options.device
    batch, d_inner, length, d_state = options.shrink(batch, d_inner, length, 32)
    make = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=make, device=device, dtype=dtype)

    u, dout = normal(batch, length, d_inner), normal(batch, length, d_inner)
    dt = torch.exp(torch.rand(d_inner, generator=make, device=device) * 4.6 - 6.9)
    index = torch.arange(d_state, device=device, dtype=torch.float32)
    A = torch.complex(torch.full_like(index, -0.5), torch.pi * index).repeat(d_inner, 1)
    B, C = torch.ones_like(A), normal(d_inner, d_state, dtype=torch.complex64)
    D = normal(d_inner)
    report = Report(name, f"B{batch} D{d_inner} L{length} N{d_state} fp32", OURS)
    given = tuple(leaf(t) for t in (u, dt, A, B, C, D))
    verify = _lti_reference(given, dout)

    def ours(given: Sequence[Tensor]) -> Tensor:
        u, dt, A, B, C, D = given
        return lti_scan(u, dt, A, B, C, D=D)

    def ways(training: bool, notes: list[str]) -> list[Candidate]:
        return [
            way(OURS, ours, given, (dout,), verify, training),
            way("one FFT convolution", fft_convolution, given, (dout,), verify, training),
        ]

    compare_both(report, options, ways)
    return report


def fft_convolution(given: Sequence[Tensor]) -> Tensor:
    """S4D as its paper computes it (arXiv 2206.11893): the kernel of the whole length, applied by FFT."""
    u, dt, A, B, C, D = given
    length = u.shape[1]
    step = dt.unsqueeze(-1) * A
    weight = C * B * torch.expm1(step) / A
    steps = torch.arange(length, device=u.device, dtype=dt.dtype)
    kernel = 2 * torch.einsum("dn,dnl->dl", weight, torch.exp(step.unsqueeze(-1) * steps)).real
    inputs = u.transpose(1, 2)
    spectrum = torch.fft.rfft(inputs, 2 * length) * torch.fft.rfft(kernel, 2 * length)
    y = torch.fft.irfft(spectrum, 2 * length)[..., :length]
    return y.transpose(1, 2) + D * u


def _lti_reference(given: Sequence[Tensor], dout: Tensor) -> Verify:
    """On some channels in fp64: channels do not meet."""
    some = spread(given[0].shape[2], 4, dout.device)
    axes = (2, 0, 0, 0, 0, 0)
    picked = [t.detach().index_select(axis, some) for t, axis in zip(given, axes)]
    wide = [leaf(t.to(torch.complex128 if t.is_complex() else torch.float64)) for t in picked]
    u, dt, A, B, C, D = wide
    out = lti_scan(u, dt, A, B, C, D=D)
    right = (out.detach(), *torch.autograd.grad(out, wide, dout[..., some].double()))

    def real(t: Tensor) -> Tensor:
        return torch.view_as_real(t) if t.is_complex() else t

    def verify(result: object) -> list[Check]:
        found: tuple[Tensor, ...] = tuple(result)  # type: ignore[arg-type]
        checks = []
        for name, value, r, axis in zip(
            ("out", "du", "ddt", "dA", "dB", "dC", "dD"), found, right, (2, *axes)
        ):
            limit = (OUTPUT if name == "out" else GRADIENT)[torch.float32]
            checks.append(Check(name, relative_error(real(value.index_select(axis, some)), real(r)), limit))
        return checks

    return verify
