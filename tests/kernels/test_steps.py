"""The single steps on every backend that serves: values beside fp64, the step = scan law, in place and out of
place, captured in a CUDA graph, compiled, and refused where gradients are recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_modal.kernels import (
    BackendError,
    causal_conv1d,
    causal_conv1d_step,
    causal_conv1d_step_,
    explain,
    selective_scan,
    selective_scan_step,
    selective_scan_step_,
)
from tests.kernels.laws import served, skip_unless_possible
from tests.tolerances import OUTPUT, assert_close

SCAN, CONV = "selective_scan_step", "causal_conv1d_step"

pytestmark = pytest.mark.usefixtures("poison")


def scan_arguments(
    batch: int = 2,
    d_inner: int = 12,
    d_state: int = 5,
    *,
    groups: int | None = None,
    options: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random arguments of one step; D, z and delta_bias with `options`."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    matrix = (batch, d_state) if groups is None else (batch, groups, d_state)
    # Without softplus a step size must not be negative.
    narrow = {"u": draw(batch, d_inner), "delta": draw(batch, d_inner).abs()}
    narrow |= {"B": draw(*matrix), "C": draw(*matrix)}
    kept = {"A": -torch.exp(draw(d_inner, d_state)), "state": draw(batch, d_inner, d_state)}
    if options:
        narrow["z"] = draw(batch, d_inner)
        kept |= {"D": draw(d_inner), "delta_bias": draw(d_inner).abs()}
    return {k: v.to(device, dtype) for k, v in narrow.items()} | {
        k: v.to(device, wide) for k, v in kept.items()
    }


def conv_arguments(
    batch: int = 2,
    d_inner: int = 12,
    taps: int = 4,
    *,
    bias: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Random arguments of one step."""
    wide = torch.float64
    parameter = weight_dtype or dtype
    return {
        "x": torch.randn(batch, d_inner, dtype=wide).to(device, dtype),
        "weight": torch.randn(d_inner, taps, dtype=wide).to(device, parameter),
        "bias": torch.randn(d_inner, dtype=wide).to(device, parameter) if bias else None,
        "state": torch.randn(batch, d_inner, taps - 1, dtype=wide).to(device, dtype),
    }


def in_fp64(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double().cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def slack(backend: str, given: Tensor) -> int:
    """Triton's interpreter cuts fp32 to bf16 where hardware rounds: twice the error, on the CPU alone."""
    return 2 if backend == "triton" and given.device.type == "cpu" and given.dtype == torch.bfloat16 else 1


def check_scan(given: dict[str, Tensor], backend: str, softplus: bool = True) -> None:
    """Both forms against torch in fp64; they agree to the bit, and only the one in place writes."""
    dtype = given["u"].dtype
    want, want_state = selective_scan_step(**in_fp64(given), delta_softplus=softplus, backend="torch")
    before = {k: v.clone() for k, v in given.items()}
    out, state = selective_scan_step(**given, delta_softplus=softplus, backend=backend)
    assert all(torch.equal(given[k], before[k]) for k in given)
    assert out.dtype == dtype
    assert state.dtype == given["state"].dtype
    assert_close(out, want, slack(backend, given["u"]) * OUTPUT[dtype], "out")
    assert_close(state, want_state, OUTPUT[state.dtype], "state")
    again = selective_scan_step_(**given, delta_softplus=softplus, backend=backend)
    assert torch.equal(again, out)
    assert torch.equal(given.pop("state"), state)
    assert all(torch.equal(given[k], before[k]) for k in given)


def check_conv(given: dict[str, Any], backend: str, activation: str | None = "silu") -> None:
    """As `check_scan`; the state holds inputs, which are copied."""
    dtype = given["x"].dtype
    want, want_state = causal_conv1d_step(**in_fp64(given), activation=activation, backend="torch")
    before = given["state"].clone()
    out, state = causal_conv1d_step(**given, activation=activation, backend=backend)
    assert torch.equal(given["state"], before)
    assert out.dtype == dtype
    assert_close(out, want, slack(backend, given["x"]) * OUTPUT[dtype], "out")
    assert torch.equal(state.double().cpu(), want_state)
    again = causal_conv1d_step_(**given, activation=activation, backend=backend)
    assert torch.equal(again, out)
    assert torch.equal(given["state"], state)


# Values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype"), served(SCAN))
@pytest.mark.parametrize(("groups", "options"), [(None, True), (3, True), (1, False), (12, False)])
def test_scan_values(
    device: torch.device, backend: str, dtype: torch.dtype, groups: int | None, options: bool
) -> None:
    skip_unless_possible(SCAN, backend, device, dtype)
    for softplus in (True, False):
        given = scan_arguments(groups=groups, options=options, device=device, dtype=dtype)
        check_scan(given, backend, softplus)


@pytest.mark.parametrize("d_state", [1, 3, 16, 64, 256])
@pytest.mark.parametrize(("batch", "d_inner"), [(1, 1), (3, 37), (0, 4), (2, 300)])
def test_scan_shapes(device: torch.device, d_state: int, batch: int, d_inner: int) -> None:
    skip_unless_possible(SCAN, "triton", device)
    if device.type == "cpu" and d_state * d_inner > 20000:
        pytest.skip("takes seconds in the interpreter")
    check_scan(scan_arguments(batch, d_inner, d_state, device=device), "triton")


def test_scan_strides(device: torch.device) -> None:
    """Slices of projections, a state with other axes first, parameters with gaps."""
    skip_unless_possible(SCAN, "triton", device)
    given = scan_arguments(3, 10, 4, groups=2, device=device)
    for name in ("u", "z", "B", "C"):
        given[name] = torch.cat([given[name], given[name] + 1], -1)[..., : given[name].shape[-1]]
    given["delta"] = torch.stack([given["delta"], given["delta"]], -1)[..., 0]
    given["state"] = given["state"].transpose(0, 2).contiguous().transpose(0, 2)
    given["A"] = given["A"].t().contiguous().t()
    for name in ("D", "delta_bias"):
        given[name] = torch.stack([given[name], -given[name]], -1)[:, 0]
    assert not any(t.is_contiguous() for t in given.values())
    check_scan(given, "triton")


@pytest.mark.parametrize(("backend", "dtype"), served(CONV))
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [False, True])
def test_conv_values(
    device: torch.device, backend: str, dtype: torch.dtype, activation: str | None, bias: bool
) -> None:
    skip_unless_possible(CONV, backend, device, dtype)
    check_conv(conv_arguments(bias=bias, device=device, dtype=dtype), backend, activation)


@pytest.mark.parametrize("taps", [1, 2, 3, 8, 16, 17])
@pytest.mark.parametrize(("batch", "d_inner"), [(1, 1), (3, 37), (0, 4), (2, 300)])
def test_conv_shapes(device: torch.device, taps: int, batch: int, d_inner: int) -> None:
    skip_unless_possible(CONV, "triton", device)
    check_conv(conv_arguments(batch, d_inner, taps, device=device), "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conv_strides_and_fp32_parameters(device: torch.device, dtype: torch.dtype) -> None:
    skip_unless_possible(CONV, "triton", device)
    given = conv_arguments(3, 10, 4, device=device, dtype=dtype, weight_dtype=torch.float32)
    given["x"] = torch.cat([given["x"], given["x"]], -1)[:, :10]
    given["weight"] = given["weight"].t().contiguous().t()
    given["bias"] = torch.stack([given["bias"], given["bias"] + 1], -1)[:, 0]
    given["state"] = given["state"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(t.is_contiguous() for t in given.values())
    check_conv(given, "triton")


# Laws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_scan_steps_equal_the_scan(device: torch.device, in_place: bool) -> None:
    skip_unless_possible(SCAN, "triton", device)
    given = scan_arguments(2, 8, 4, groups=2, device=device)
    start = given.pop("state")
    moving = ("u", "delta", "B", "C", "z")
    steps = [scan_arguments(2, 8, 4, groups=2, device=device) for _ in range(7)]
    whole = given | {k: torch.stack([s[k] for s in steps], 1) for k in moving}
    out, final = selective_scan(
        **whole, initial_state=start, delta_softplus=True, return_final_state=True, backend="torch"
    )
    state = start.clone()
    for t, now in enumerate(steps):
        arguments = given | {k: now[k] for k in moving}
        if in_place:
            y = selective_scan_step_(**arguments, state=state, delta_softplus=True, backend="triton")
        else:
            y, state = selective_scan_step(**arguments, state=state, delta_softplus=True, backend="triton")
        assert_close(y, out[:, t], OUTPUT[torch.float32], f"step {t}")
    assert_close(state, final, OUTPUT[torch.float32])


def test_conv_steps_equal_the_convolution(device: torch.device) -> None:
    skip_unless_possible(CONV, "triton", device)
    given = conv_arguments(2, 8, 4, device=device)
    x = torch.randn(2, 7, 8, device=device)
    out, final = causal_conv1d(
        x, given["weight"], given["bias"], initial_state=given["state"], return_final_state=True,
        activation="silu", backend="torch",
    )  # fmt: skip
    for t in range(7):
        y = causal_conv1d_step_(**{**given, "x": x[:, t]}, activation="silu", backend="triton")
        assert_close(y, out[:, t], OUTPUT[torch.float32], f"step {t}")
    assert torch.equal(given["state"], final)


# Gradients, compile, graphs --------------------------------------------------------------------------------


def test_where_gradients_are_recorded_torch_serves(device: torch.device) -> None:
    """Triton's steps record none: not chosen where they would be needed, and refused where asked for."""
    skip_unless_possible(SCAN, "triton", device)
    choice = explain(SCAN, device="cuda", gradients=True) if device.type == "cuda" else None
    assert choice is None or choice.backend == "torch"
    scan, conv = scan_arguments(device=device), conv_arguments(device=device)
    scan["D"].requires_grad_()
    conv["weight"].requires_grad_()
    assert selective_scan_step(**scan)[0].requires_grad
    assert causal_conv1d_step(**conv)[0].requires_grad
    message = r"backend 'triton' \(the argument backend\) cannot serve: gradients are recorded, which"
    with pytest.raises(BackendError, match=f"selective_scan_step: {message}"):
        selective_scan_step(**scan, backend="triton")
    with pytest.raises(BackendError, match=f"causal_conv1d_step: {message}"):
        causal_conv1d_step(**conv, backend="triton")
    with torch.no_grad():
        assert not selective_scan_step(**scan, backend="triton")[0].requires_grad


IN_PLACE = {
    "scan": (SCAN, selective_scan_step_, scan_arguments),
    "conv": (CONV, causal_conv1d_step_, conv_arguments),
}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("which", IN_PLACE)
def test_autograd_knows_that_the_state_was_written(device: torch.device, backend: str, which: str) -> None:
    op, step, make = IN_PLACE[which]
    skip_unless_possible(op, backend, device)
    given = make(device=device)
    factor = torch.ones_like(given["state"], requires_grad=True)
    product = (factor * given["state"]).sum()
    with torch.no_grad():
        step(**given, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        step(**make(device=device), backend=backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("which", IN_PLACE)
def test_an_expanded_state_is_not_written(device: torch.device, backend: str, which: str) -> None:
    op, step, make = IN_PLACE[which]
    skip_unless_possible(op, backend, device)
    given = make(device=device)
    given["state"] = given["state"][:1].expand(2, *[-1] * (given["state"].ndim - 1))
    with pytest.raises(RuntimeError, match=r"clone"):
        step(**given, backend=backend)


def ordered(arguments: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(arguments.get(n) for n in names)


SCAN_ORDER = ("u", "delta", "A", "B", "C", "state", "D", "z", "delta_bias")
CONV_ORDER = ("x", "weight", "bias", "state")


def test_opcheck(device: torch.device) -> None:
    skip_unless_possible(SCAN, "triton", device)
    torch.use_deterministic_algorithms(False)
    ops = torch.ops.ssm_modal
    for options in (False, True):
        scan = ordered(scan_arguments(groups=3, options=options, device=device), SCAN_ORDER)
        conv = ordered(conv_arguments(bias=options, device=device), CONV_ORDER)
        for op, arguments in (
            (ops.selective_scan_step, scan),
            (ops.selective_scan_step_, scan),
            (ops.causal_conv1d_step, conv),
            (ops.causal_conv1d_step_, conv),
        ):
            torch.library.opcheck(op.default, (*arguments, True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_whole(device: torch.device, backend: str) -> None:
    skip_unless_possible(SCAN, backend, device)
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()

    def run(scan: dict[str, Tensor], conv: dict[str, Any]) -> tuple[Tensor, ...]:
        y, state = selective_scan_step(**scan, delta_softplus=True, backend=backend)
        y_ = selective_scan_step_(**scan, delta_softplus=True, backend=backend)
        x, window = causal_conv1d_step(**conv, activation="silu", backend=backend)
        x_ = causal_conv1d_step_(**conv, activation="silu", backend=backend)
        return y, state, y_, x, window, x_, scan["state"] + 0, conv["state"] + 0

    scan, conv = scan_arguments(device=device), conv_arguments(device=device)
    compiled: Callable[..., Any] = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    with torch.no_grad():
        for f in (run, compiled):
            results.append(f(*({k: v.clone() for k, v in a.items()} for a in (scan, conv))))
    for eager, found in zip(*results):
        assert_close(found, eager, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_in_a_graph(dtype: torch.dtype) -> None:
    """Both steps in one CUDA graph: nothing is read back, and replays go on from the state they left."""
    torch.use_deterministic_algorithms(False)
    scan = scan_arguments(3, 1000, 16, device="cuda", dtype=dtype)
    conv = conv_arguments(3, 1000, 4, device="cuda", dtype=dtype)

    def step() -> tuple[Tensor, Tensor]:
        x = causal_conv1d_step_(**conv, activation="silu", backend="triton")
        return x, selective_scan_step_(**{**scan, "u": x}, delta_softplus=True, backend="triton")

    start = scan["state"].clone(), conv["state"].clone()

    def rewind() -> None:
        scan["state"].copy_(start[0])
        conv["state"].copy_(start[1])

    eager = [tuple(t.clone() for t in step()) for _ in range(3)]
    ends = scan["state"].clone(), conv["state"].clone()
    rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    rewind()
    for want in eager:
        graph.replay()
        assert all(torch.equal(out, w) for out, w in zip(outs, want))
    assert torch.equal(scan["state"], ends[0])
    assert torch.equal(conv["state"], ends[1])


@pytest.mark.gpu
def test_default_backend_on_cuda() -> None:
    for op in (SCAN, CONV):
        assert explain(op, device="cuda").backend == "triton"
        assert "gradients are recorded" in explain(op, device="cuda", gradients=True).reason


def test_there_is_no_compiled_cpu_form() -> None:
    with pytest.raises(BackendError, match=r"selective_scan_step has no cpu form \(it has triton, torch\)"):
        selective_scan_step(**scan_arguments(), backend="cpu")
    with pytest.raises(BackendError, match="causal_conv1d_step has no cpu form"):
        causal_conv1d_step_(**conv_arguments(), backend="cpu")
    with pytest.raises(TypeError, match="selective_scan_step: delta_softplus is 'no'"):
        selective_scan_step(**scan_arguments(), delta_softplus="no")  # type: ignore[arg-type]
