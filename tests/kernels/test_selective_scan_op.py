"""The selective scan as an op: errors in words, the custom op's contract, torch.compile, overheads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_modal.kernels import BackendError, Sequences, selective_scan, selective_scan_ref, selective_scan_step
from ssm_modal.kernels.checks import Passed
from ssm_modal.kernels.scan import custom_op
from tests.kernels.laws import Place, leaves, places, skip_unless_served, values_and_gradients
from tests.kernels.test_selective_scan import Case
from tests.tolerances import OUTPUT, assert_close

CPU = torch.device("cpu")


@pytest.fixture(params=places("selective_scan"))
def place(request: pytest.FixtureRequest) -> Place:
    skip_unless_served("selective_scan", request.param)
    return request.param


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"u": [1.0]}, TypeError, "u must be a tensor, got list"),
        ({"reverse": "no"}, TypeError, "reverse is 'no', expected True or False"),
        ({"delta_softplus": 1}, TypeError, "delta_softplus is 1, expected True or False"),
        ({"u": ones(2, 4)}, ValueError, r"u has shape \(2, 4\), expected \(batch, length, d_inner\)"),
        ({"u": ones(2, 5, 4, dtype=torch.int64)}, TypeError, "u has dtype int64, expected float32"),
        ({"delta": ones(2, 6, 4)}, ValueError, r"delta has shape \(2, 6, 4\), expected \(2, 5, 4\)"),
        ({"delta": ones(2, 5, 4).half()}, TypeError, "delta has dtype float16, expected float32"),
        ({"z": ones(2, 5, 1)}, ValueError, r"z has shape \(2, 5, 1\)"),
        ({"u": ones(5, 4)}, ValueError, r"u has shape \(5, 4\), expected \(batch, length, d_inner\)$"),
        ({"A": ones(3, 3)}, ValueError, r"A has shape \(3, 3\), expected \(4, d_state\)"),
        ({"A": ones(4, 3).double()}, TypeError, "A has dtype float64, expected float32 .with u in float32"),
        ({"A": ones(4, 3, dtype=torch.complex64)}, TypeError, "A is complex.*lti_scan"),
        ({"A": ones(4, 0)}, ValueError, "A has d_state 0, expected 1 to 256"),
        ({"A": ones(4, 257)}, ValueError, "A has d_state 257, expected 1 to 256"),
        ({"B": ones(2, 5, 4)}, ValueError, r"B has shape \(2, 5, 4\), expected \(2, 5, 3\)"),
        ({"B": ones(2, 5, 3, 3)}, ValueError, "B has 3 groups, expected a divisor of d_inner, which is 4"),
        ({"C": ones(2, 5, 0, 3)}, ValueError, "C has 0 groups"),
        ({"C": ones(2, 5, 2, 3)}, ValueError, "B has 1 groups and C has 2"),
        ({"C": None}, TypeError, "C must be a tensor, got NoneType"),
        ({"D": ones(3)}, ValueError, r"D has shape \(3,\), expected \(4,\)"),
        ({"D": ones(4).bfloat16()}, TypeError, "D has dtype bfloat16"),
        ({"delta_bias": ones(1)}, ValueError, "delta_bias has shape"),
        ({"initial_state": ones(1, 4, 3)}, ValueError, r"expected \(2, 4, 3\), that is \(batch, d_inner"),
        ({"initial_state": ones(2, 4, 3).half()}, TypeError, "initial_state has dtype float16"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "u has batch 2, expected 1 with cu_seqlens"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
        ({"D": ones(4).to("meta")}, ValueError, "D is on meta, but u is on cpu"),
        ({"delta": ones(2, 5, 4).to("meta")}, ValueError, "delta is on meta, but u is on cpu"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors(change: dict[str, Any], error: type[Exception], words: str) -> None:
    good: dict[str, Any] = {
        "u": ones(2, 5, 4), "delta": ones(2, 5, 4), "A": -ones(4, 3), "B": ones(2, 5, 3), "C": ones(2, 5, 3),
    }  # fmt: skip
    selective_scan(**good)
    with pytest.raises(error, match=words):
        selective_scan(**{**good, **change})


def test_errors_of_packed_calls() -> None:
    case = Case(batch=1, length=7, lengths=(3, 4))
    arguments = case.arguments(CPU)
    with pytest.raises(ValueError, match="cu_seqlens ends at 6, expected 7"):
        selective_scan(**arguments, cu_seqlens=torch.tensor([0, 3, 6]))
    arguments["initial_state"] = ones(1, 4, 3)
    with pytest.raises(ValueError, match=r"expected \(2, 4, 3\), that is \(sequences, d_inner, d_state\)"):
        selective_scan(**arguments, cu_seqlens=torch.tensor([0, 3, 7]))


def test_a_backend_that_cannot_serve_raises() -> None:
    arguments = Case(length=3).arguments(CPU, torch.float64)
    with pytest.raises(BackendError, match="fp64 runs on backend 'torch'"):
        selective_scan(**arguments, backend="triton")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_borders_as_a_tensor(dtype: torch.dtype) -> None:
    case = Case(batch=1, length=7, lengths=(3, 0, 4))
    arguments = case.arguments(CPU)
    out = selective_scan(**arguments, cu_seqlens=torch.tensor([0, 3, 3, 7], dtype=dtype))
    assert torch.equal(out, selective_scan(**arguments, cu_seqlens=Sequences.from_lengths([3, 0, 4])))


def raw_arguments(case: Case, place: Place) -> tuple[Any, ...]:
    """Arguments of the custom op."""
    given = leaves(case.arguments(place.device))
    for name in ("B", "C"):
        given[name] = given[name].detach().view(case.batch, case.length, case.groups, -1).requires_grad_()
    seqs = case.options(place.device)["cu_seqlens"]
    packed = (None, []) if seqs is None else (seqs.cu_seqlens, list(seqs.lengths))
    order = (given.get(n) for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"))
    return (*order, case.softplus, given.get("initial_state"), *packed, case.reverse, place.backend)


@pytest.mark.parametrize(
    "case", [Case(batch=1, length=9, groups=2), Case(batch=1, length=9, lengths=(4, 0, 5), given=())], ids=str
)
def test_opcheck(place: Place, case: Case) -> None:
    if place.interpreted and case.lengths is not None:
        pytest.skip("one case is enough for the interpreter")
    tests: tuple[str, ...] = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not place.interpreted:  # there test_compiled_whole_graph stands for these
        tests += ("test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.ssm_modal.selective_scan_fwd.default, raw_arguments(case, place), test_utils=tests
    )


@pytest.mark.parametrize(
    "case", [Case(batch=1, length=9), Case(batch=1, length=9, lengths=(4, 0, 5), reverse=True)], ids=str
)
def test_compiled_whole_graph(place: Place, case: Case) -> None:
    if place.interpreted and case.lengths is not None:
        pytest.skip("one case is enough for the interpreter")
    arguments = case.arguments(place.device)
    options = {**case.options(place.device), "backend": place.backend}

    def layer(**given: Any) -> tuple[Tensor, Tensor]:
        out, final = selective_scan(**given, **options)
        return 2 * out, final

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outs, gradients = values_and_gradients(layer, leaves(arguments), {})
    compiled_outs, compiled_gradients = values_and_gradients(compiled, leaves(arguments), {})
    for one, other in zip(compiled_outs, outs):
        assert_close(one, other, 1e-6)
    for name, gradient in gradients.items():
        assert_close(compiled_gradients[name], gradient, 1e-5, name)


def test_compiled_with_the_default_backend() -> None:
    """The choice of a backend is made while tracing and breaks no graph."""
    arguments = Case(length=9, given=("D",)).arguments(CPU)
    torch.compiler.reset()
    compiled = torch.compile(lambda **a: selective_scan(**a), fullgraph=True, backend="aot_eager")
    assert_close(compiled(**arguments), selective_scan(**arguments), 1e-6)


def test_double_backward_raises() -> None:
    arguments = leaves(Case(length=5).arguments(CPU))
    out = selective_scan(**arguments, backend="torch")
    (gradient,) = torch.autograd.grad(out.sum(), arguments["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


def test_unused_final_state_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward gets None for it, not zeros; and is not run where no gradient arrives."""
    seen: list[Any] = []
    own = custom_op.chunked.selective_scan_bwd

    def spy(dout: Tensor, dfinal_state: Tensor | None, *rest: Any) -> Any:
        seen.append(dfinal_state)
        return own(dout, dfinal_state, *rest)

    monkeypatch.setattr(custom_op.chunked, "selective_scan_bwd", spy)
    arguments = leaves(Case(length=5).arguments(CPU))
    selective_scan(**arguments, backend="torch").sum().backward()
    assert seen == [None]


def test_without_gradients_the_backend_is_called_directly(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(batch=1, length=5)
    arguments = case.arguments(place.device)
    recorded = selective_scan(**leaves(arguments), backend=place.backend)
    monkeypatch.setattr(custom_op, "cached_sequences", None)  # the custom op's way
    with torch.no_grad():
        direct = selective_scan(**leaves(arguments), backend=place.backend)
    assert torch.equal(direct, recorded)
    assert not direct.requires_grad
    assert torch.equal(selective_scan(**arguments, backend=place.backend), direct)


def test_outputs_alias_no_input(place: Place) -> None:
    """Empty sequences hand their state through as a copy."""
    case = Case(batch=1, length=0, lengths=(0, 0))
    arguments = case.arguments(place.device)
    out, final = selective_scan(**arguments, **case.options(place.device), backend=place.backend)
    assert torch.equal(final, arguments["initial_state"])
    final.add_(1)
    assert not torch.equal(final, arguments["initial_state"])
    assert out.shape == (1, 0, 4)


def test_sequences_are_rebuilt_once_and_survive_a_reused_buffer() -> None:
    borders = torch.tensor([0, 3, 7])
    first = custom_op.cached_sequences(borders, [3, 4])
    assert custom_op.cached_sequences(borders, [3, 4]) is first
    borders.copy_(torch.tensor([0, 5, 7]))
    again = custom_op.cached_sequences(borders, [3, 4])
    assert again is first
    assert again is not None
    assert again.cu_seqlens.tolist() == [0, 3, 7]
    for n in range(20):
        custom_op.cached_sequences(borders, [n])
    assert custom_op.cached_sequences(borders, [5, 2]) is not first


def test_autocast_casts_nothing(place: Place) -> None:
    arguments = Case(batch=1, length=9).arguments(place.device)
    options = {"return_final_state": True, "backend": place.backend}
    expected, gradients = values_and_gradients(selective_scan, leaves(arguments), options)
    with torch.autocast(place.device.type, torch.bfloat16):
        outs, cast_gradients = values_and_gradients(selective_scan, leaves(arguments), options)
        direct, _ = selective_scan(**arguments, return_final_state=True, backend=place.backend)
    assert [out.dtype for out in outs] == [torch.float32] * 2
    assert torch.equal(direct, expected[0])
    for one, other in zip(outs, expected):
        assert torch.equal(one, other)
    for name, gradient in gradients.items():
        assert_close(cast_gradients[name], gradient, 1e-6, name)


def test_autocast_and_the_step() -> None:
    arguments = {k: v[:, 0] if v.ndim == 3 else v for k, v in Case(length=1, given=()).arguments(CPU).items()}
    arguments["state"] = torch.randn(2, 4, 3)
    expected = selective_scan_step(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        cast = selective_scan_step(**arguments)
    assert torch.equal(cast[0], expected[0])
    assert torch.equal(cast[1], expected[1])


def test_large_steps_and_small_steps() -> None:
    """Softplus far out on both sides: 20 and above is the identity, -30 keeps its digits."""
    case = Case(batch=1, length=6, given=())
    arguments = case.arguments(CPU)
    arguments["delta"] = torch.tensor([-30.0, -16.0, 0.0, 15.0, 25.0, 80.0]).view(1, 6, 1).expand(1, 6, 4)
    wide = {k: v.double() for k, v in arguments.items()}
    for backend in ("torch", "cpu"):
        try:
            out = selective_scan(**arguments, delta_softplus=True, backend=backend)
        except BackendError:
            continue
        expected = selective_scan_ref(**wide, delta_softplus=True)
        assert isinstance(expected, Tensor)
        for t in range(6):
            assert_close(out[:, t], expected[:, t], OUTPUT[torch.float32], f"{backend}, step {t}")


def test_arguments_that_passed_are_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same shapes, dtypes and devices pass; anything else is checked, whatever passed before."""
    from ssm_modal.kernels.scan import op

    monkeypatch.setattr(op, "_passed", Passed())
    checked = []
    whole = op.check_scan
    monkeypatch.setattr(op, "check_scan", lambda *a: checked.append(a) or whole(*a))
    given = {
        "u": ones(1, 3, 4),
        "delta": ones(1, 3, 4),
        "A": -ones(4, 2),
        "B": ones(1, 3, 2),
        "C": ones(1, 3, 2),
    }
    first = selective_scan(**given, D=ones(4))
    again = selective_scan(**{n: t.clone() for n, t in given.items()}, D=ones(4))
    assert torch.equal(first, again)
    assert len(checked) == 1
    for change in ({"D": ones(3)}, {"D": ones(4).double()}, {"z": ones(1, 3, 4).half()}, {"D": [1.0] * 4}):
        with pytest.raises((TypeError, ValueError)):
            selective_scan(**given, **change)
    assert torch.equal(
        selective_scan(**given, D=ones(4), cu_seqlens=torch.tensor([0, 1, 3])),
        selective_scan(**given, D=ones(4), cu_seqlens=Sequences.from_lengths((1, 2), CPU)),
    )
    with pytest.raises(ValueError, match="cu_seqlens"):
        selective_scan(**given, D=ones(4), cu_seqlens=torch.tensor([0, 1, 4]))
