"""The time-invariant scan (S4D): against the fp64 loop, and the laws it must keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_modal.kernels import (
    BackendError,
    Sequences,
    lti_scan,
    lti_scan_ref,
    lti_scan_step,
    lti_scan_step_,
)
from ssm_modal.kernels.lti import chunked
from tests.kernels.laws import compare, leaves, values_and_gradients
from tests.tolerances import GRADIENT, OUTPUT, assert_close

CPU = torch.device("cpu")
OPTIONAL = ("D", "z", "initial_state")


@dataclass(frozen=True)
class Case:
    """One call: sizes and options. `lengths` packs sequences; `given` are the optional tensors present."""

    batch: int = 2
    length: int = 63
    d_inner: int = 3
    d_state: int = 4
    reverse: bool = False
    lengths: tuple[int, ...] | None = None
    given: tuple[str, ...] = OPTIONAL
    final: bool = True

    def __str__(self) -> str:
        packed = "" if self.lengths is None else "-packed" + "_".join(map(str, self.lengths))
        without = "".join(f"-no_{n}" for n in OPTIONAL if n not in self.given) + "-no_final" * (
            not self.final
        )
        sizes = f"B{self.batch}L{self.length}D{self.d_inner}N{self.d_state}"
        return sizes + packed + "-reverse" * self.reverse + without

    def arguments(self, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """S4D-Lin's A, step sizes from 0.001 to 0.1: slow modes and fast phases, as in training."""
        real = torch.float64 if dtype == torch.float64 else torch.float32
        imaginary = torch.complex128 if dtype == torch.float64 else torch.complex64
        shape = (self.d_inner, self.d_state)
        rows = self.batch if self.lengths is None else len(self.lengths)
        A = torch.complex(torch.full(shape, -0.5), math.pi * torch.arange(self.d_state).expand(shape).float())
        arguments = {
            "u": torch.randn(self.batch, self.length, self.d_inner).to(dtype),
            "dt": torch.logspace(-3, -1, self.d_inner).to(real),
            "A": A.to(imaginary),
            "B": torch.randn(shape, dtype=torch.complex64).to(imaginary),
            "C": torch.randn(shape, dtype=torch.complex64).to(imaginary),
            "D": torch.randn(self.d_inner).to(real),
            "z": torch.randn(self.batch, self.length, self.d_inner).to(dtype),
            "initial_state": torch.randn(rows, *shape, dtype=torch.complex64).to(imaginary),
        }
        return {k: v.to(device) for k, v in arguments.items() if k not in OPTIONAL or k in self.given}

    def options(self, device: torch.device) -> dict[str, Any]:
        seqs = None if self.lengths is None else Sequences.from_lengths(self.lengths, device)
        return {"reverse": self.reverse, "cu_seqlens": seqs, "return_final_state": self.final}


PACKED = (0, 5, 0, 1, 70, 24, 0)
CASES = [
    Case(length=0),
    Case(length=0, given=()),
    Case(length=1),
    Case(length=63),
    Case(length=63, reverse=True),
    Case(length=500, d_state=16),
    Case(length=500, reverse=True, given=("D",), final=False),
    Case(length=500, given=("z",), final=False),
    Case(length=64, d_state=1, given=()),
    Case(batch=1, length=20, d_state=256, d_inner=2),
    Case(batch=1, length=1100),
    Case(batch=1, length=1100, reverse=True, given=("initial_state",), final=False),
    Case(batch=1, length=1024, given=("D",)),
    Case(batch=1, length=100, lengths=PACKED),
    Case(batch=1, length=100, lengths=PACKED, reverse=True),
    Case(batch=1, length=100, lengths=PACKED, given=("z",), final=False),
    Case(batch=1, length=600, lengths=(330, 0, 1, 269), reverse=True, given=("initial_state",)),
    Case(batch=1, length=0, lengths=(0, 0)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(device: torch.device, case: Case) -> None:
    compare(lti_scan, lti_scan_ref, case.arguments(device), case.options(device), case.options(CPU))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs(device: torch.device, dtype: torch.dtype) -> None:
    case = Case(length=130)
    out, final = lti_scan(**case.arguments(device, dtype), **case.options(device))
    assert (out.dtype, final.dtype) == (dtype, torch.complex64)
    compare(
        lti_scan, lti_scan_ref, case.arguments(device, dtype), case.options(device), case.options(CPU), dtype
    )


@pytest.mark.parametrize(
    "case",
    [
        Case(length=9),
        Case(batch=1, length=9, lengths=(4, 0, 5), reverse=True),
        Case(length=70, given=(), final=False),
    ],
    ids=str,
)
def test_fp64_gradcheck(device: torch.device, case: Case) -> None:
    arguments = leaves(
        {k: v[..., :2] if k == "u" else v for k, v in case.arguments(device, torch.float64).items()}
    )
    for name, t in arguments.items():
        arguments[name] = (t[:2] if name in ("dt", "D", "A", "B", "C") else t).detach()
    arguments["u"] = arguments["u"].detach()
    for name in ("z", "initial_state"):
        if name in arguments:
            t = arguments[name]
            arguments[name] = (t[..., :2] if name == "z" else t[:, :2]).detach()
    names = list(arguments)

    def call(*tensors: Tensor) -> Any:
        return lti_scan(**dict(zip(names, tensors)), **case.options(device))

    tensors = tuple(t.clone().requires_grad_() for t in arguments.values())
    assert torch.autograd.gradcheck(call, tensors, fast_mode=case.length > 10)


def test_zero_order_hold_is_exact_for_small_steps_and_at_zero() -> None:
    """Values and derivatives: dt (1 + w / 2 + ...), and dt^2 (1 / 2 + w / 3 + ...) to A."""
    A = torch.tensor([[0.0 + 0j, -1e-6 + 0j, -0.5 + 3j, 0 + 1e-4j, -50 + 80j, -101 + 0j]], requires_grad=True)
    dt = torch.tensor([1e-3])
    hold = chunked.zero_order_hold(dt, A)
    w = (dt.double()[:, None] * A.detach().to(torch.complex128))[:, :5]
    powers = [w**k / math.factorial(k + 1) for k in range(14)]
    slopes = [(k + 1) * w**k / math.factorial(k + 2) for k in range(14)]
    assert_close(hold[:, :5], dt.double() * sum(powers), 1e-6)
    (slope,) = torch.autograd.grad(hold.real.sum(), A)
    assert_close(slope[:, :5], (dt.double() ** 2 * sum(slopes)).conj(), 1e-6)
    assert_close(hold[0, 5:], (torch.expm1(dt.double() * -101) / -101).to(torch.complex128), 1e-6)

    case = Case(batch=1, length=40, d_inner=1, d_state=5)
    small = torch.tensor([[-1e-6 + 0j, -0.5 + 3j, 0 + 1e-4j, -50 + 80j, -101 + 0j]])
    arguments = {**case.arguments(CPU), "A": small, "dt": dt}
    compare(lti_scan, lti_scan_ref, arguments, case.options(CPU), case.options(CPU))
    # At A = 0 the loop integrates its input.
    arguments["A"] = torch.zeros(1, 5, dtype=torch.complex64)
    out = lti_scan(**arguments)
    reference = lti_scan_ref(**arguments)
    assert isinstance(reference, Tensor)
    assert_close(out, reference, OUTPUT[torch.float32])
    state = arguments.pop("initial_state")
    first, _ = lti_scan_step(
        **{k: v[:, 0] if k in ("u", "z") else v for k, v in arguments.items()}, state=state
    )
    assert_close(first, reference[:, 0], OUTPUT[torch.float32])


def test_kernel_of_a_long_sequence() -> None:
    """Phases of thousands of radians keep their digits: an impulse response in closed form."""
    case = Case(batch=1, length=30_000, d_inner=2, d_state=32, given=(), final=False)
    arguments = case.arguments(CPU)
    arguments["u"] = torch.zeros(1, case.length, 2)
    arguments["u"][:, 0] = 1
    out = lti_scan(**arguments)
    A, B, C = (arguments[k].to(torch.complex128) for k in "ABC")
    step = arguments["dt"].double()[:, None] * A
    weight = C * B * torch.expm1(step) / A
    times = torch.arange(case.length, dtype=torch.float64)
    expected = torch.einsum("dn,dnl->ld", weight, torch.exp(step[..., None] * times)).real * 2
    assert_close(out[0], expected, OUTPUT[torch.float32])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("length", [90, 1200])
def test_split_and_carry_equals_whole(device: torch.device, reverse: bool, length: int) -> None:
    arguments = Case(length=length).arguments(device)
    cut = length * 2 // 3

    def split(**tensors: Any) -> tuple[Tensor, Tensor]:
        state = tensors.pop("initial_state")
        pieces: list[Tensor] = []
        spans = [(0, cut), (cut, length)]
        for start, end in reversed(spans) if reverse else spans:
            part = {k: v[:, start:end] if k in ("u", "z") else v for k, v in tensors.items()}
            out, state = lti_scan(**part, initial_state=state, reverse=reverse, return_final_state=True)
            pieces.append(out)
        return torch.cat(pieces[::-1] if reverse else pieces, 1), state

    options = {"reverse": reverse, "return_final_state": True}
    whole, gradients = values_and_gradients(lti_scan, leaves(arguments), options)
    parts, part_gradients = values_and_gradients(split, leaves(arguments), {})
    for one, other in zip(parts, whole):
        assert_close(one, other, OUTPUT[torch.float32])
    for name, gradient in gradients.items():
        assert_close(part_gradients[name], gradient, GRADIENT[torch.float32], name)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed_equals_separate(device: torch.device, reverse: bool) -> None:
    case = Case(batch=1, length=100, lengths=PACKED, reverse=reverse)
    arguments = case.arguments(device)
    out, final = lti_scan(**arguments, **case.options(device))
    start = 0
    for i, n in enumerate(PACKED):
        alone = {k: v[:, start : start + n] if k in ("u", "z") else v for k, v in arguments.items()}
        alone["initial_state"] = arguments["initial_state"][i : i + 1]
        own, own_final = lti_scan(**alone, reverse=reverse, return_final_state=True)
        assert_close(out[:, start : start + n], own, OUTPUT[torch.float32], f"sequence {i}")
        assert_close(final[i : i + 1], own_final, OUTPUT[torch.float32], f"state of sequence {i}")
        if n == 0:
            assert torch.equal(final[i], arguments["initial_state"][i])
        start += n


def test_nothing_crosses_a_border(device: torch.device) -> None:
    lengths = (3, 70, 20)
    arguments = Case(batch=1, length=93, lengths=lengths).arguments(device)
    arguments["u"][:, 3:73] = float("nan")
    seqs = Sequences.from_lengths(lengths, device)
    out, final = lti_scan(**arguments, cu_seqlens=seqs, return_final_state=True)
    assert out[:, 3:73].isnan().all()
    assert not out[:, :3].isnan().any()
    assert not out[:, 73:].isnan().any()
    assert not final[[0, 2]].isnan().any()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("length", [40, 700])
def test_causality(device: torch.device, reverse: bool, length: int) -> None:
    """Other inputs from step k on change nothing before it; through an FFT, nothing beyond its rounding."""
    arguments = Case(length=length, given=()).arguments(device)
    later = slice(0, length // 2) if reverse else slice(length // 2, None)
    earlier = slice(length // 2, None) if reverse else slice(0, length // 2)
    other = {**arguments, "u": arguments["u"].clone()}
    other["u"][:, later] = torch.randn_like(other["u"][:, later])
    before, after = lti_scan(**arguments, reverse=reverse), lti_scan(**other, reverse=reverse)
    assert_close(after[:, earlier], before[:, earlier], 1e-6 if length > chunked.TOEPLITZ else 0.0)
    assert not torch.allclose(before[:, later], after[:, later], atol=1e-2)


def test_reverse_equals_flip_scan_flip(device: torch.device) -> None:
    arguments = Case(length=700).arguments(device)
    flipped = {k: v.flip(1) if k in ("u", "z") else v for k, v in arguments.items()}
    out, final = lti_scan(**arguments, reverse=True, return_final_state=True)
    mirrored, mirrored_final = lti_scan(**flipped, return_final_state=True)
    assert_close(out, mirrored.flip(1), OUTPUT[torch.float32])
    assert_close(final, mirrored_final, OUTPUT[torch.float32])


@pytest.mark.parametrize("given", [OPTIONAL, ("initial_state",)])
def test_step_equals_scan(device: torch.device, given: tuple[str, ...]) -> None:
    arguments = Case(length=20, given=given).arguments(device)
    out, final = lti_scan(**arguments, return_final_state=True)
    state = arguments.pop("initial_state")
    held = state.clone()
    for t in range(20):
        now = {k: v[:, t] if k in ("u", "z") else v for k, v in arguments.items()}
        before = state.clone()
        y, new = lti_scan_step(**now, state=state)
        assert torch.equal(state, before)
        in_place = lti_scan_step_(**now, state=held)
        assert torch.equal(in_place, y)
        assert torch.equal(held, new)
        state = new
        assert_close(y, out[:, t], OUTPUT[torch.float32], f"step {t}")
    assert_close(state, final, OUTPUT[torch.float32])


def test_the_step_in_place_records_no_gradients() -> None:
    arguments = {k: v[:, 0] if k in ("u", "z") else v for k, v in Case(length=1).arguments(CPU).items()}
    arguments["state"] = arguments.pop("initial_state")
    arguments["u"].requires_grad_()
    with pytest.raises(RuntimeError, match="lti_scan_step_ works in place"):
        lti_scan_step_(**arguments)
    with torch.no_grad():
        lti_scan_step_(**arguments)


def test_non_contiguous_views(device: torch.device) -> None:
    arguments = Case(length=70).arguments(device)
    strange = {
        k: v.transpose(-1, -2).contiguous().transpose(-1, -2) if v.ndim > 1 else v
        for k, v in arguments.items()
    }
    assert not strange["u"].is_contiguous()
    expected, final = lti_scan(**arguments, return_final_state=True)
    out, strange_final = lti_scan(**strange, return_final_state=True)
    assert out.is_contiguous()
    assert_close(out, expected, 1e-6)
    assert_close(strange_final, final, 1e-6)


def test_autocast_casts_nothing() -> None:
    arguments = Case(length=40).arguments(CPU)
    expected, expected_final = lti_scan(**arguments, return_final_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, final = lti_scan(**arguments, return_final_state=True)
    assert torch.equal(out, expected)
    assert torch.equal(final, expected_final)


def test_compiled_whole_graph() -> None:
    case = Case(length=700)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda **a: lti_scan(**a, **case.options(CPU)), fullgraph=True, backend="aot_eager"
    )
    arguments = case.arguments(CPU)
    outs, gradients = values_and_gradients(lti_scan, leaves(arguments), case.options(CPU))
    compiled_outs, compiled_gradients = values_and_gradients(compiled, leaves(arguments), {})
    for one, other in zip(compiled_outs, outs):
        assert_close(one, other, 1e-6)
    for name, gradient in gradients.items():
        assert_close(compiled_gradients[name], gradient, 1e-5, name)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"u": torch.ones(2, 3)}, ValueError, r"u has shape \(2, 3\), expected \(batch, length, d_inner\)"),
        ({"u": torch.ones(2, 5, 3, dtype=torch.complex64)}, TypeError, "u has dtype complex64"),
        ({"dt": torch.ones(2)}, ValueError, r"dt has shape \(2,\), expected \(3,\)"),
        ({"dt": torch.ones(3).double()}, TypeError, "dt has dtype float64, expected float32"),
        ({"A": -torch.ones(3, 4)}, TypeError, "A has dtype float32, expected complex64 .with u in float32"),
        ({"A": torch.ones(3, 0, dtype=torch.complex64)}, ValueError, "A has d_state 0"),
        (
            {"B": torch.ones(3, 5, dtype=torch.complex64)},
            ValueError,
            r"B has shape \(3, 5\), expected \(3, 4\)",
        ),
        ({"C": torch.ones(3, 4, dtype=torch.complex128)}, TypeError, "C has dtype complex128"),
        ({"D": torch.ones(4)}, ValueError, "D has shape"),
        ({"z": torch.ones(2, 6, 3)}, ValueError, r"z has shape \(2, 6, 3\)"),
        ({"z": torch.ones(2, 5, 3).half()}, TypeError, "z has dtype float16, expected float32"),
        (
            {"initial_state": torch.ones(1, 3, 4, dtype=torch.complex64)},
            ValueError,
            "initial_state has shape",
        ),
        ({"initial_state": torch.ones(2, 3, 4)}, TypeError, "initial_state has dtype float32"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "u has batch 2, expected 1 with cu_seqlens"),
        ({"backend": "cpu"}, BackendError, "lti_scan has no cpu form"),
        ({"reverse": "no"}, TypeError, "reverse is 'no', expected True or False"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors(change: dict[str, Any], error: type[Exception], words: str) -> None:
    good: dict[str, Any] = Case(length=5, given=()).arguments(CPU)
    lti_scan(**good)
    with pytest.raises(error, match=words):
        lti_scan(**{**good, **change})
