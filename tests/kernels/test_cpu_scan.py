"""The compiled selective scan and convolution, called directly: values, gradients, extremes, threads and
instruction sets."""

from __future__ import annotations

import ctypes
import multiprocessing
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_modal.kernels.conv.ref import causal_conv1d_ref
from ssm_modal.kernels.cpu import bindings, loader
from ssm_modal.kernels.scan import selective_scan
from ssm_modal.kernels.scan.ref import selective_scan_ref
from ssm_modal.kernels.sequences import Sequences
from tests.tolerances import assert_close

# An fp32 scan rounds a few times a step; these are far inside the table of tests/tolerances.py.
OUTPUT, GRADIENT = 2e-6, 4e-6
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")

pytestmark = pytest.mark.skipif(loader.why_unavailable() is not None, reason="no compiled kernels here")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scan_inputs(
    batch: int, length: int, d_inner: int, d_state: int, groups: int, rows: int, full: bool
) -> dict[str, Tensor | None]:
    """The nine arguments of the scan, the optional ones None unless `full`; steps are positive anyhow."""
    delta = torch.randn(batch, length, d_inner) * 2 - 1
    return {
        "u": torch.randn(batch, length, d_inner),
        "delta": delta if full else delta.abs() / 4,
        "A": -4 * torch.rand(d_inner, d_state) - 0.01,
        "B": torch.randn(batch, length, groups, d_state),
        "C": torch.randn(batch, length, groups, d_state),
        "D": torch.randn(d_inner) if full else None,
        "z": torch.randn(batch, length, d_inner) if full else None,
        "delta_bias": torch.randn(d_inner) if full else None,
        "initial_state": torch.randn(rows, d_inner, d_state) if full else None,
    }


def run_scan(
    x: dict[str, Tensor | None],
    seqs: Sequences | None,
    reverse: bool,
    dout: Tensor,
    dfinal: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    first = [x[n] for n in NAMES[:8]]
    out, final, kept = bindings.selective_scan_fwd(*first, softplus, x["initial_state"], seqs, reverse)  # type: ignore[arg-type]
    grads = bindings.selective_scan_bwd(
        dout,
        dfinal,
        *first,  # type: ignore[arg-type]
        softplus,
        x["initial_state"],
        seqs,
        reverse,
        kept,
    )
    return out, final, grads


def compare_scan(
    x: dict[str, Tensor | None],
    seqs: Sequences | None,
    reverse: bool,
    softplus: bool,
    with_dfinal: bool = True,
) -> None:
    """Output, final state and every gradient beside the fp64 reference loop on the same inputs."""
    u, A = x["u"], x["A"]
    assert u is not None
    assert A is not None
    rows = u.shape[0] if seqs is None else seqs.n
    dout = torch.randn(u.shape)
    dfinal = torch.randn(rows, *A.shape) if with_dfinal else None
    out, final, grads = run_scan(x, seqs, reverse, dout, dfinal, softplus)

    wide = {n: None if t is None else t.detach().double().requires_grad_() for n, t in x.items()}
    keywords = {n: wide[n] for n in ("D", "z", "delta_bias", "initial_state")}
    result = selective_scan_ref(
        *(wide[n] for n in NAMES[:5]),  # type: ignore[arg-type]
        **keywords,  # type: ignore[arg-type]
        delta_softplus=softplus,
        cu_seqlens=seqs,
        reverse=reverse,
        return_final_state=True,
    )
    ref_out, ref_final = result
    assert_close(out, ref_out, OUTPUT, "out")
    assert_close(final, ref_final, OUTPUT, "final state")
    total = (ref_out * dout).sum() + (0 if dfinal is None else (ref_final * dfinal).sum())
    given = [n for n in NAMES if wide[n] is not None]
    right = torch.autograd.grad(total, [wide[n] for n in given], allow_unused=True)  # type: ignore[misc]
    expected = dict(zip(given, right))
    for name, grad in zip(NAMES, grads):
        if wide[name] is None:
            assert grad is None, f"a gradient of {name}, which was not given"
            continue
        ref = expected[name]
        assert grad is not None
        assert_close(grad, torch.zeros(grad.shape) if ref is None else ref, GRADIENT, f"d{name}")


# (batch, length, d_inner, d_state, groups): lanes full and not, tiles full and not, every slice of states.
SHAPES = [
    (2, 37, 16, 16, 1),
    (1, 1, 1, 1, 1),
    (2, 33, 17, 2, 1),
    (1, 64, 15, 3, 3),
    (3, 31, 40, 5, 2),
    (1, 70, 36, 33, 2),
    (1, 130, 3, 65, 1),
    (1, 20, 5, 256, 5),
    (2, 0, 7, 4, 1),
]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int, int, int, int], full: bool, reverse: bool) -> None:
    x = scan_inputs(*shape, rows=shape[0], full=full)
    compare_scan(x, None, reverse, softplus=full, with_dfinal=full)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [(0, 33, 0, 50, 7, 0), (1, 2, 3), (0,)], ids=str)
def test_packed(lengths: tuple[int, ...], reverse: bool, n_threads: int) -> None:
    torch.set_num_threads(n_threads)
    seqs = Sequences.from_lengths(lengths)
    x = scan_inputs(1, seqs.total, 33, 16, 1, rows=seqs.n, full=True)
    compare_scan(x, seqs, reverse, softplus=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, (300, 0, 210, 1, 129)], ids=str)
def test_a_sequence_split_over_threads(lengths: tuple[int, ...] | None, reverse: bool) -> None:
    # One block of channels and six threads: stretches of time are the only work to share.
    torch.set_num_threads(6)
    seqs = None if lengths is None else Sequences.from_lengths(lengths)
    x = scan_inputs(1, 640, 6, 4, 1, rows=1 if seqs is None else seqs.n, full=True)
    compare_scan(x, seqs, reverse, softplus=True)


def test_non_contiguous_inputs() -> None:
    batch, length, d_inner, d_state = 2, 40, 20, 5
    wide = torch.randn(batch, length, 3 * d_inner)
    x = scan_inputs(batch, length, d_inner, d_state, 1, rows=batch, full=True)
    x["u"] = wide[..., :d_inner]
    x["z"] = wide[..., d_inner : 2 * d_inner]
    x["delta"] = torch.randn(batch, d_inner, length).transpose(1, 2)
    x["B"] = torch.randn(1, length, 1, d_state).expand(batch, -1, -1, -1)
    x["C"] = torch.randn(batch, d_state, length).transpose(1, 2).unsqueeze(2)
    x["A"] = -torch.rand(d_state, d_inner).T
    x["D"] = torch.randn(2 * d_inner)[::2]
    x["initial_state"] = torch.randn(batch, d_state, d_inner).transpose(1, 2)
    compare_scan(x, None, False, softplus=True)


def test_no_channels_and_no_batch() -> None:
    for batch, d_inner in ((0, 4), (2, 0)):
        x = scan_inputs(batch, 5, d_inner, 3, 1, rows=batch, full=True)
        out, final, grads = run_scan(
            x, None, False, torch.zeros(batch, 5, d_inner), torch.zeros(batch, d_inner, 3), True
        )
        assert out.shape == (batch, 5, d_inner)
        assert final.shape == (batch, d_inner, 3)
        for name, grad in zip(NAMES, grads):
            given = x[name]
            assert grad is not None
            assert given is not None
            assert grad.shape == given.shape
            assert not grad.any()


@pytest.mark.parametrize("shape", [(3, 100, 96, 16, 1), (1, 640, 6, 4, 1)], ids=str)
def test_threads_change_nothing_that_matters_and_timing_nothing(
    shape: tuple[int, int, int, int, int],
) -> None:
    x = scan_inputs(*shape, rows=shape[0], full=True)
    dout, dfinal = torch.randn(shape[:3]), torch.randn(shape[0], shape[2], shape[3])
    results = {}
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        first, again = (run_scan(x, None, False, dout, dfinal, True) for _ in range(2))
        for a, b in zip((first[0], first[1], *first[2]), (again[0], again[1], *again[2])):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b), f"{n} threads: two runs differ"
        results[n] = (first[0], first[1], *first[2])
    for n in (2, 5):
        for name, a, b in zip(("out", "final state", *NAMES), results[n], results[1]):
            assert a is not None
            assert b is not None
            assert_close(a, b, OUTPUT, f"{name} with {n} threads")


def test_boundaries_have_the_shape_that_is_announced() -> None:
    for d_state in (3, 40, 200):
        x = scan_inputs(2, 150, 6, d_state, 1, rows=2, full=False)
        first = [x[n] for n in NAMES[:8]]
        _, _, kept = bindings.selective_scan_fwd(*first, False, None, None, False)  # type: ignore[arg-type]
        assert tuple(kept.shape) == bindings.boundaries_shape(2, 150, 6, d_state, None)
        out, final, none = bindings.selective_scan_fwd(
            *first, False, None, None, False, save_boundaries=False
        )  # type: ignore[arg-type]
        assert none.numel() == 0
        again = bindings.selective_scan_fwd(*first, False, None, None, False)  # type: ignore[arg-type]
        assert torch.equal(out, again[0])
        assert torch.equal(final, again[1])
    packed = Sequences.from_lengths((33, 0, 32))
    assert bindings.boundaries_shape(1, 65, 6, 16, packed) == (3, 16, 6)


# ---- the functions inside, read off a scan of one step -------------------------------------------


def softplus_of(x: Tensor) -> Tensor:
    """dt of one step, since with B = C = u = 1 and no state before the output is dt."""
    one = torch.ones(1, 1, x.numel())
    unit = torch.ones(1, 1, 1, 1)
    out, _, _ = bindings.selective_scan_fwd(
        one,
        x.view(1, 1, -1),
        -torch.ones(x.numel(), 1),
        unit,
        unit,
        None,
        None,
        None,
        True,
        None,
        None,
        False,
    )
    return out.flatten()


def exp_of(x: Tensor) -> Tensor:
    """The decay of one step with dt = 1 and A = x, read off a state of 1 that nothing is added to."""
    n = x.numel()
    zero, one, unit = torch.zeros(1, 1, n), torch.ones(1, 1, n), torch.ones(1, 1, 1, 1)
    out, _, _ = bindings.selective_scan_fwd(
        zero, one, x.view(n, 1), unit, unit, None, None, None, False, torch.ones(1, n, 1), None, False
    )
    return out.flatten()


def silu_of(x: Tensor) -> Tensor:
    """An output of 1 (through D) gated by x."""
    n = x.numel()
    zero, one, unit = torch.zeros(1, 1, n), torch.ones(1, 1, n), torch.zeros(1, 1, 1, 1)
    out, _, _ = bindings.selective_scan_fwd(
        one,
        zero,
        -torch.ones(n, 1),
        unit,
        unit,
        torch.ones(n),
        x.view(1, 1, n),
        None,
        False,
        None,
        None,
        False,
    )
    return out.flatten()


def worst(value: Tensor, right: Tensor) -> float:
    return float(((value.double() - right) / right).abs().max())


def test_softplus_keeps_small_steps() -> None:
    x = torch.cat(
        [torch.linspace(-86, 100, 20001), torch.tensor([0.0, -0.0, 19.99, 20.0, 20.01, 1e-30, 3e38])]
    )
    wide = x.double()
    right = torch.where(wide > 30, wide, torch.log1p(torch.exp(wide)))
    assert worst(softplus_of(x), right) < 3e-7
    tiny = softplus_of(torch.tensor([-100.0, -1e5, float("-inf")]))
    assert (tiny >= 0).all()
    assert (tiny < 1e-37).all()
    assert softplus_of(torch.tensor([float("inf")])).item() == float("inf")
    assert softplus_of(torch.tensor([float("nan")])).isnan().all()


def test_decay_from_underflow_to_overflow() -> None:
    small = torch.cat([torch.linspace(-1, 1, 4001), torch.tensor([-1e-6, -1e-8, 0.0, -0.0])])
    assert worst(exp_of(small), small.double().exp()) < 2.5e-7
    # The exponent itself carries fp32's rounding, 6e-8 of it twice.
    x = torch.linspace(-86, 86, 20001)
    assert (((exp_of(x).double() / x.double().exp()) - 1).abs() < 2e-7 + 1.3e-7 * x.double().abs()).all()
    assert (exp_of(torch.tensor([-120.0, -1e6, -3e38, float("-inf")])) == 0).all()
    assert (exp_of(torch.tensor([95.0, 1e6, 3e38])) == float("inf")).all()
    assert exp_of(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]
    assert exp_of(torch.tensor([float("nan")])).isnan().all()


def test_gate() -> None:
    x = torch.cat([torch.linspace(-80, 100, 20001), torch.tensor([1e-30, -1e-30, 3e38])])
    wide = x.double()
    right = wide / (1 + torch.exp(-wide))
    value = silu_of(x)
    assert worst(value[right != 0], right[right != 0]) < 4e-7
    assert silu_of(torch.tensor([0.0])).item() == 0.0
    assert silu_of(torch.tensor([float("nan")])).isnan().all()


def test_nan_stays_in_its_channel_its_sequence_and_after_its_step() -> None:
    seqs = Sequences.from_lengths((20, 20))
    x = scan_inputs(1, 40, 20, 4, 1, rows=2, full=True)
    u = x["u"]
    assert u is not None
    u[0, 5, 3] = float("nan")
    first = [x[n] for n in NAMES[:8]]
    out, final, _ = bindings.selective_scan_fwd(*first, True, x["initial_state"], seqs, False)  # type: ignore[arg-type]
    bad = out.isnan()
    assert bad[0, 5:20, 3].all()
    assert int(bad.sum()) == 15
    assert final.isnan().sum() == 4


# ---- convolution ---------------------------------------------------------------------------------


def compare_conv(
    shape: tuple[int, int, int], width: int, seqs: Sequences | None, reverse: bool, silu: bool, full: bool
) -> None:
    batch, _, d_inner = shape
    rows = batch if seqs is None else seqs.n
    x, weight = torch.randn(shape), torch.randn(d_inner, width)
    bias = torch.randn(d_inner) if full else None
    state = torch.randn(rows, d_inner, width - 1) if full else None
    dout, dfinal = torch.randn(shape), torch.randn(rows, d_inner, width - 1) if full else None
    out, final = bindings.causal_conv1d_fwd(x, weight, bias, silu, state, seqs, reverse)
    grads = bindings.causal_conv1d_bwd(dout, dfinal, x, weight, bias, silu, state, seqs, reverse)
    wide = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias, state)]
    result = causal_conv1d_ref(
        wide[0],  # type: ignore[arg-type]
        wide[1],  # type: ignore[arg-type]
        wide[2],
        activation="silu" if silu else None,
        initial_state=wide[3],
        cu_seqlens=seqs,
        reverse=reverse,
        return_final_state=True,
    )
    ref_out, ref_final = result
    assert_close(out, ref_out, OUTPUT, "out")
    assert torch.equal(final.double(), ref_final.detach()), "final state"
    total = (ref_out * dout).sum() + (0 if dfinal is None else (ref_final * dfinal).sum())
    given = [t for t in wide if t is not None]
    total = total + sum(0 * t.sum() for t in given)  # so that a gradient is defined where nothing flows
    right = iter(torch.autograd.grad(total, given, allow_unused=True))
    for name, grad, t in zip(("x", "weight", "bias", "initial state"), grads, wide):
        if t is None:
            assert grad is None
            continue
        ref = next(right)
        assert grad is not None
        assert_close(grad, torch.zeros(grad.shape) if ref is None else ref, GRADIENT, f"d{name}")


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "width", "silu"),
    [
        ((2, 70, 20), 4, True),
        ((1, 200, 35), 3, False),
        ((1, 2, 16), 4, True),
        ((1, 66, 7), 1, True),
        ((2, 65, 32), 9, False),
        ((2, 0, 5), 4, True),
    ],
    ids=str,
)
def test_convolution(shape: tuple[int, int, int], width: int, silu: bool, reverse: bool, full: bool) -> None:
    torch.set_num_threads(2)
    compare_conv(shape, width, None, reverse, silu, full)


@pytest.mark.parametrize("reverse", [False, True])
def test_convolution_packed(reverse: bool) -> None:
    seqs = Sequences.from_lengths((0, 65, 2, 0, 1, 72, 0))
    compare_conv((1, seqs.total, 33), 4, seqs, reverse, True, True)


# ---- processes and instruction sets --------------------------------------------------------------


def child_scan(path: str) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(3)
    x = scan_inputs(2, 100, 64, 16, 1, rows=2, full=True)
    out, _, _ = run_scan(x, None, False, torch.randn(2, 100, 64), None, True)
    torch.save(out, path)


def test_a_forked_child_may_use_threads(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    torch.randn(500, 500) @ torch.randn(500, 500)  # starts OpenMP's threads, which a child does not have
    child_scan(str(tmp_path / "here"))
    torch.set_num_threads(2)
    child = multiprocessing.get_context("fork").Process(target=child_scan, args=(str(tmp_path / "there"),))
    child.start()
    child.join(60)
    hung = child.is_alive()
    if hung:
        child.kill()
    assert not hung
    assert child.exitcode == 0
    assert torch.equal(torch.load(tmp_path / "here"), torch.load(tmp_path / "there"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are flags of x86 compilers")
@pytest.mark.parametrize("narrower", ["-mno-avx512f", "-mno-avx"])
def test_narrower_vectors(narrower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same laws on the 8-lane and the 4-lane build, with its portable rounding and scaling."""
    path = tmp_path / "narrow.so"
    loader._build((*loader._compiler(), narrower), path)
    narrow = ctypes.CDLL(str(path))
    monkeypatch.setattr(bindings, "library", lambda: narrow)
    for shape in ((2, 37, 17, 16, 1), (1, 70, 36, 33, 2)):
        compare_scan(scan_inputs(*shape, rows=shape[0], full=True), None, True, softplus=True)
    compare_conv((2, 70, 21), 4, None, False, True, True)
    test_softplus_keeps_small_steps()
    test_decay_from_underflow_to_overflow()
    test_gate()


@pytest.mark.parametrize("threads", [1, 2])
def test_states_that_fade_away_are_zero_and_the_mode_of_the_thread_is_kept(threads: int) -> None:
    """A state below the normal numbers is 0 in the kernels; outside, such numbers are still there."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        u = torch.zeros(2, 200, 64)
        u[:, 0] = 1.0
        one = torch.ones_like(u)
        rates = torch.full((64, 2), -0.5)
        B = C = torch.ones(2, 200, 2)
        for steps, fraction in ((100, 1.0), (190, 0.0)):
            given = (u[:, :steps], one[:, :steps], rates, B[:, :steps], C[:, :steps])
            _, final = selective_scan(*given, return_final_state=True, backend="cpu")
            # e^-49.5 is a normal number, e^-94.5 = 9e-42 is not.
            expected = fraction * torch.exp(torch.tensor(-0.5 * (steps - 1)))
            torch.testing.assert_close(final, expected.expand_as(final), rtol=1e-4, atol=0.0)
        assert float(torch.tensor([1e-40]) * 0.5) > 0
    finally:
        torch.set_num_threads(before)


def test_without_gradients_no_states_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a third of what a forward call would write, for a backward that cannot come."""
    kept: list[int] = []
    forward = bindings.selective_scan_fwd

    def noted(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        result = forward(*args, **options)
        kept.append(result[2].numel())
        return result

    monkeypatch.setattr(bindings, "selective_scan_fwd", noted)
    u, A, B = torch.randn(1, 70, 8), -torch.rand(8, 4), torch.randn(1, 70, 4)
    with torch.no_grad():
        alone = selective_scan(u, u, A, B, B, delta_softplus=True, backend="cpu")
    recorded = selective_scan(u.requires_grad_(), u, A, B, B, delta_softplus=True, backend="cpu")
    assert kept == [0, 3 * 4 * 8]  # three tiles of 32 steps
    assert torch.equal(alone, recorded)
