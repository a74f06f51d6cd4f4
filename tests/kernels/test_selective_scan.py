"""The selective scan: every backend against the fp64 loop, and the laws it must keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_modal.kernels import Sequences, selective_scan, selective_scan_ref
from ssm_modal.kernels.scan import selective_scan_step, selective_scan_step_
from ssm_modal.kernels.scan.carry import carry_states
from tests.kernels.laws import Place, compare, leaves, places, skip_unless_served, values_and_gradients
from tests.tolerances import GRADIENT, OUTPUT, assert_close

OPTIONAL = ("D", "z", "delta_bias", "initial_state")


@dataclass(frozen=True)
class Case:
    """One call: sizes and options. `lengths` packs sequences; `given` are the optional tensors present."""

    batch: int = 2
    length: int = 63
    d_inner: int = 4
    d_state: int = 3
    groups: int = 1
    reverse: bool = False
    softplus: bool = True
    lengths: tuple[int, ...] | None = None
    given: tuple[str, ...] = OPTIONAL

    def __str__(self) -> str:
        packed = "" if self.lengths is None else "-packed" + "_".join(map(str, self.lengths))
        without = "".join(f"-no_{n}" for n in OPTIONAL if n not in self.given)
        sizes = f"B{self.batch}L{self.length}D{self.d_inner}N{self.d_state}G{self.groups}"
        return sizes + packed + "-reverse" * self.reverse + "-raw" * (not self.softplus) + without

    def arguments(self, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Tensors drawn on the CPU, so that every device sees the same numbers."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        batch, length, d_inner, d_state = self.batch, self.length, self.d_inner, self.d_state
        rows = batch if self.lengths is None else len(self.lengths)
        maps = (batch, length, d_state) if self.groups == 1 else (batch, length, self.groups, d_state)
        # Without softplus delta is the step size itself and must not be negative.
        delta = torch.randn(batch, length, d_inner) if self.softplus else torch.rand(batch, length, d_inner)
        arguments = {
            "u": torch.randn(batch, length, d_inner),
            "delta": delta,
            "A": -2 * torch.rand(d_inner, d_state) - 0.05,
            "B": torch.randn(maps),
            "C": torch.randn(maps),
            "D": torch.randn(d_inner),
            "z": torch.randn(batch, length, d_inner),
            "delta_bias": 0.5 * torch.rand(d_inner),
            "initial_state": torch.randn(rows, d_inner, d_state),
        }
        return {
            name: t.to(device, wide if name in ("A", "D", "delta_bias", "initial_state") else dtype)
            for name, t in arguments.items()
            if name not in OPTIONAL or name in self.given
        }

    def options(self, device: torch.device) -> dict[str, Any]:
        seqs = None if self.lengths is None else Sequences.from_lengths(self.lengths, device)
        return {
            "delta_softplus": self.softplus,
            "reverse": self.reverse,
            "cu_seqlens": seqs,
            "return_final_state": True,
        }


PACKED = (0, 5, 0, 1, 70, 24, 0)
CASES = [
    Case(length=0),
    Case(length=1, reverse=True),
    Case(length=63),
    Case(length=63, reverse=True, groups=2),
    Case(batch=1, length=500, d_inner=3),
    Case(batch=1, length=500, d_inner=3, d_state=1, reverse=True, given=()),
    Case(length=20, d_state=16, d_inner=33, softplus=False),
    Case(batch=1, length=17, d_state=256, d_inner=6, groups=3),
    Case(batch=3, length=7, d_inner=6, d_state=5, groups=6, given=("D",)),
    Case(length=63, given=("z", "initial_state")),
    Case(length=63, given=("delta_bias",), softplus=False, reverse=True),
    Case(batch=1, length=100, lengths=PACKED),
    Case(batch=1, length=100, lengths=PACKED, reverse=True, groups=2, given=("z", "initial_state")),
    Case(batch=1, length=100, lengths=PACKED, given=()),
    Case(batch=1, length=0, lengths=(0, 0)),
    # Enough channels and states that the torch form goes chunk after chunk instead of all at once.
    Case(batch=1, length=70, d_inner=512, d_state=32, given=("D", "z")),
    Case(batch=1, length=70, d_inner=512, d_state=32, reverse=True, groups=2),
]
TINY = [
    Case(batch=1, length=0),
    Case(batch=2, length=9, groups=2),
    Case(batch=1, length=11, reverse=True, softplus=False, given=("z",)),
    Case(batch=1, length=12, lengths=(0, 5, 0, 7), reverse=True, given=("D", "delta_bias", "initial_state")),
]


def case_at(place: Place, case: Case) -> Case:
    """The case, or a tiny one of the same kind for the interpreter."""
    if not place.interpreted:
        return case
    if case.lengths is not None:
        return replace(case, length=9, lengths=(0, 4, 0, 5))
    return replace(case, batch=1, length=min(case.length, 9))


@pytest.fixture(params=places("selective_scan"))
def place(request: pytest.FixtureRequest) -> Place:
    skip_unless_served("selective_scan", request.param)
    return request.param


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(place: Place, case: Case) -> None:
    if place.interpreted:
        pytest.skip("the interpreter runs the tiny cases")
    options = case.options(place.device)
    reference = {**options, "cu_seqlens": case.options(torch.device("cpu"))["cu_seqlens"]}
    arguments = case.arguments(place.device)
    compare(selective_scan, selective_scan_ref, arguments, {**options, "backend": place.backend}, reference)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_values_and_gradients_of_tiny_cases(place: Place, case: Case) -> None:
    options = case.options(place.device)
    reference = {**options, "cu_seqlens": case.options(torch.device("cpu"))["cu_seqlens"]}
    arguments = case.arguments(place.device)
    compare(selective_scan, selective_scan_ref, arguments, {**options, "backend": place.backend}, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [None, (0, 6, 4)], ids=["dense", "packed"])
def test_16_bit_inputs(place: Place, dtype: torch.dtype, lengths: tuple[int, ...] | None) -> None:
    """Against fp64 on the same rounded inputs: the state is kept in fp32."""
    skip_unless_served("selective_scan", place, dtype)
    if place.interpreted and lengths is not None:
        pytest.skip("the dense case stands for both under the interpreter")
    case = Case(batch=1, length=10, lengths=lengths)
    options = case.options(place.device)
    reference = {**options, "cu_seqlens": case.options(torch.device("cpu"))["cu_seqlens"]}
    arguments = case.arguments(place.device, dtype)
    out, final = selective_scan(**arguments, **options, backend=place.backend)
    assert (out.dtype, final.dtype) == (dtype, torch.float32)
    compare(
        selective_scan, selective_scan_ref, arguments, {**options, "backend": place.backend}, reference, dtype
    )


@pytest.mark.parametrize(
    "case", [Case(length=12), Case(batch=1, length=9, lengths=(4, 0, 5), reverse=True)], ids=str
)
def test_fp64_gradcheck(device: torch.device, case: Case) -> None:
    case = replace(case, d_inner=2, d_state=2)
    arguments = leaves(case.arguments(device, torch.float64))
    names = list(arguments)
    options = case.options(device)

    def call(*tensors: Tensor) -> Any:
        return selective_scan(**dict(zip(names, tensors)), **options, backend="torch")

    assert torch.autograd.gradcheck(call, tuple(arguments.values()))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_split_and_carry_equals_whole(place: Place, reverse: bool) -> None:
    case = case_at(place, Case(length=70, groups=2, reverse=reverse))
    arguments = case.arguments(place.device)
    cut = case.length * 2 // 3
    times = ("u", "delta", "B", "C", "z")

    def split(**tensors: Any) -> tuple[Tensor, Tensor]:
        state = tensors.pop("initial_state")
        pieces: list[Tensor] = []
        spans = [(0, cut), (cut, case.length)]
        for start, end in reversed(spans) if reverse else spans:
            part = {k: v[:, start:end] if k in times else v for k, v in tensors.items()}
            out, state = selective_scan(**part, initial_state=state)
            pieces.append(out)
        return torch.cat(pieces[::-1] if reverse else pieces, 1), state

    options = {**case.options(place.device), "backend": place.backend}
    whole, gradients = values_and_gradients(selective_scan, leaves(arguments), options)
    parts, part_gradients = values_and_gradients(split, leaves(arguments), options)
    for one, other in zip(parts, whole):
        assert_close(one, other, OUTPUT[torch.float32])
    for name, gradient in gradients.items():
        assert_close(part_gradients[name], gradient, GRADIENT[torch.float32], name)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed_equals_separate(place: Place, reverse: bool) -> None:
    case = case_at(place, Case(batch=1, length=100, lengths=PACKED, reverse=reverse))
    assert case.lengths is not None
    arguments = leaves(case.arguments(place.device))
    options = {**case.options(place.device), "backend": place.backend}
    out, final = selective_scan(**arguments, **options)
    start = 0
    for i, n in enumerate(case.lengths):
        alone = {
            k: v[:, start : start + n] if k in ("u", "delta", "B", "C", "z") else v
            for k, v in arguments.items()
        }
        alone["initial_state"] = arguments["initial_state"][i : i + 1]
        own, own_final = selective_scan(**alone, **{**options, "cu_seqlens": None})
        assert_close(out[:, start : start + n], own, OUTPUT[torch.float32], f"sequence {i}")
        assert_close(final[i : i + 1], own_final, OUTPUT[torch.float32], f"state of sequence {i}")
        if n == 0:
            assert torch.equal(final[i], arguments["initial_state"][i])
        start += n


def test_nothing_crosses_a_border(place: Place) -> None:
    """NaN in one sequence stays there, in outputs, states and gradients."""
    lengths = (3, 4, 2) if place.interpreted else (3, 70, 20)
    case = Case(batch=1, length=sum(lengths), lengths=lengths, given=("initial_state",))
    arguments = case.arguments(place.device)
    arguments["u"][:, 3 : 3 + lengths[1]] = float("nan")
    own = leaves(arguments)
    out, final = selective_scan(**own, **case.options(place.device), backend=place.backend)
    (out.nansum() + final[0].sum() + final[2].sum()).backward()
    inside = torch.zeros(case.length, dtype=torch.bool, device=place.device)
    inside[3 : 3 + lengths[1]] = True
    assert out[:, inside].isnan().any()
    assert not out[:, ~inside].isnan().any()
    assert not final[[0, 2]].isnan().any()
    gradient = own["delta"].grad
    assert gradient is not None
    assert not gradient[:, ~inside].isnan().any()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_causality(place: Place, reverse: bool) -> None:
    """Other inputs from step k on leave the steps before it bit for bit as they were."""
    case = case_at(place, Case(length=70, reverse=reverse))
    arguments = case.arguments(place.device)
    k = case.length // 2
    later = slice(0, k) if reverse else slice(k, None)
    earlier = slice(k, None) if reverse else slice(0, k)
    other = dict(arguments)
    for name in ("u", "delta", "B", "C", "z"):
        other[name] = arguments[name].clone()
        other[name][:, later] = torch.randn_like(arguments[name][:, later])
    options = {**case.options(place.device), "backend": place.backend}
    before, _ = selective_scan(**arguments, **options)
    after, _ = selective_scan(**other, **options)
    assert torch.equal(before[:, earlier], after[:, earlier])
    assert not torch.equal(before[:, later], after[:, later])


def test_reverse_equals_flip_scan_flip(place: Place) -> None:
    case = case_at(place, Case(length=70, groups=2, reverse=True))
    arguments = case.arguments(place.device)
    flipped = {k: v.flip(1) if k in ("u", "delta", "B", "C", "z") else v for k, v in arguments.items()}
    options = {**case.options(place.device), "backend": place.backend}
    out, final = selective_scan(**arguments, **options)
    mirrored, mirrored_final = selective_scan(**flipped, **{**options, "reverse": False})
    assert_close(out, mirrored.flip(1), OUTPUT[torch.float32])
    assert_close(final, mirrored_final, OUTPUT[torch.float32])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "case", [Case(length=9, groups=2), Case(length=9, softplus=False, given=())], ids=str
)
def test_step_equals_scan(place: Place, case: Case, in_place: bool) -> None:
    case = case_at(place, case)
    arguments = case.arguments(place.device)
    out, final = selective_scan(**arguments, **case.options(place.device), backend=place.backend)
    shape = (case.batch, case.d_inner, case.d_state)
    state = arguments.pop("initial_state", torch.zeros(shape, device=place.device)).clone()
    preallocated = state
    for t in range(case.length):
        now = {k: v[:, t] if k in ("u", "delta", "B", "C", "z") else v for k, v in arguments.items()}
        given = state.clone()
        if in_place:
            y = selective_scan_step_(**now, state=state, delta_softplus=case.softplus)
            assert state is preallocated
        else:
            y, new = selective_scan_step(**now, state=state, delta_softplus=case.softplus)
            assert torch.equal(state, given)
            state = new
        assert_close(y, out[:, t], OUTPUT[torch.float32], f"step {t}")
    assert_close(state, final, OUTPUT[torch.float32])


def test_gradients_of_the_step(device: torch.device) -> None:
    arguments = Case(length=1).arguments(device)
    whole = leaves(arguments)
    out, final = selective_scan(**whole, delta_softplus=True, return_final_state=True, backend="torch")
    (out.sum() + final.square().sum()).backward()
    own = leaves(arguments)
    now = {k: v[:, 0] if k in ("u", "delta", "B", "C", "z") else v for k, v in own.items()}
    now["state"] = now.pop("initial_state")
    y, state = selective_scan_step(**now, delta_softplus=True)
    (y.sum() + state.square().sum()).backward()
    for name, tensor in own.items():
        assert tensor.grad is not None
        assert whole[name].grad is not None
        assert_close(tensor.grad, whole[name].grad, GRADIENT[torch.float32], name)
    with pytest.raises(RuntimeError, match="selective_scan_step_ works in place"):
        selective_scan_step_(**now)


def test_non_contiguous_views(place: Place) -> None:
    case = case_at(place, Case(length=20, d_state=3, groups=2))
    arguments = case.arguments(place.device)
    strange = {}
    for name, t in arguments.items():
        if name in ("u", "z"):
            strange[name] = t.transpose(1, 2).contiguous().transpose(1, 2)
        elif name == "delta":
            strange[name] = torch.stack([t, t + 1], -1)[..., 0]
        elif name in ("B", "C"):
            # Slices of one projection, as a layer cuts them.
            strange[name] = torch.cat([t, t.flip(1)], -1)[..., : case.d_state]
        elif name in ("D", "delta_bias"):
            strange[name] = torch.stack([t, -t], -1)[:, 0]
        else:
            strange[name] = t.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert torch.equal(strange[name], t)
        assert not strange[name].is_contiguous()
    options = {**case.options(place.device), "backend": place.backend}
    outs, gradients = values_and_gradients(selective_scan, leaves(arguments), options)
    views = {k: v.detach().requires_grad_() for k, v in strange.items()}
    strange_outs, strange_gradients = values_and_gradients(selective_scan, views, options)
    for one, other in zip(strange_outs, outs):
        assert one.is_contiguous()
        assert_close(one, other, 1e-6)
    for name, gradient in gradients.items():
        assert_close(strange_gradients[name], gradient, 1e-5, name)


def test_one_output_alone(place: Place) -> None:
    """The gradient from the final state alone, and without the final state in use."""
    case = case_at(place, Case(length=10, given=("initial_state", "z")))
    arguments = case.arguments(place.device)
    options = {**case.options(place.device), "backend": place.backend}
    for index in (0, 1):

        def one(index: int = index, **given: Any) -> Tensor:
            function = selective_scan if "backend" in given else selective_scan_ref
            return function(**given)[index]

        cpu = case.options(torch.device("cpu"))
        compare(one, one, arguments, options, cpu)


def test_the_carry_over_many_chunks() -> None:
    """Two levels of chunks of chunks, of real and of complex states, beside a loop."""
    for n in (1, 16, 17, 300):
        for dtype in (torch.float64, torch.complex128):
            decay, last = torch.randn(2, 2, n, 3, dtype=dtype).unbind(0)
            decay = decay / decay.abs() * 0.9
            h, expected = torch.zeros(2, 3, dtype=dtype), []
            for k in range(n):
                h = decay[:, k] * h + last[:, k]
                expected.append(h)
            assert_close(carry_states(decay, last), torch.stack(expected, 1), 1e-12)


def test_backward_keeps_boundary_states_only(place: Place) -> None:
    """What a call saves beside its arguments is a small part of all states."""
    if place.interpreted:
        pytest.skip("lengths for which memory counts are too long for the interpreter")
    case = Case(batch=1, length=1024, d_inner=8, d_state=16, given=())
    arguments = leaves(case.arguments(place.device))
    own = {t.data_ptr() for t in arguments.values()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            saved[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        selective_scan(**arguments, **case.options(place.device), backend=place.backend)
    assert 0 < sum(saved.values()) <= 1024 * 8 * 16 / 16
