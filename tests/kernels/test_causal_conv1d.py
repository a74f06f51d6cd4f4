"""`causal_conv1d`: values and every gradient against the fp64 loop, and the laws, on every backend that
serves."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_modal.kernels.conv import (
    causal_conv1d,
    causal_conv1d_ref,
    causal_conv1d_step,
    causal_conv1d_step_,
)
from ssm_modal.kernels.sequences import Sequences
from tests.kernels.laws import served, skip_unless_possible
from tests.tolerances import GRADIENT, OUTPUT, assert_close

BACKENDS = ("torch", "cpu", "triton")
SERVED = served("causal_conv1d")

skip_unserved = functools.partial(skip_unless_possible, "causal_conv1d")

pytestmark = pytest.mark.usefixtures("poison")


def make(
    batch: int,
    length: int,
    d_inner: int,
    taps: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    bias: bool = True,
    state_rows: int | None = None,
) -> dict[str, Tensor]:
    """Random arguments, those asked for; x is laid out (batch, length, d_inner)."""
    wide = torch.float64
    given = {
        "x": torch.randn(batch, length, d_inner, dtype=wide).to(device, dtype),
        "weight": (torch.randn(d_inner, taps, dtype=wide) / taps**0.5).to(device, weight_dtype or dtype),
    }
    if bias:
        given["bias"] = torch.randn(d_inner, dtype=wide).to(device, weight_dtype or dtype)
    if state_rows is not None:
        given["initial_state"] = torch.randn(state_rows, d_inner, taps - 1, dtype=wide).to(device, dtype)
    return given


def check(given: dict[str, Tensor], backend: str, what: str = "", **options: Any) -> None:
    """Both outputs and every gradient, from both outputs, against the loop in fp64 on the same rounded
    inputs."""
    dtype = given["x"].dtype
    leaves = {k: v.detach().requires_grad_() for k, v in given.items()}
    wide = {k: v.detach().double().cpu().requires_grad_() for k, v in given.items()}
    out, final = causal_conv1d(**leaves, **options, return_final_state=True, backend=backend)
    seqs = options.pop("cu_seqlens", None)
    if seqs is not None:
        seqs = seqs.to("cpu")
    ref, ref_final = causal_conv1d_ref(**wide, **options, cu_seqlens=seqs, return_final_state=True)
    assert out.dtype == dtype
    assert final.dtype == dtype
    assert_close(out, ref, OUTPUT[dtype], f"{what} out")
    # The state holds inputs: they are copied, never computed with.
    assert torch.equal(final.cpu().double(), ref_final), f"{what} final state"

    dout, dfinal = torch.randn_like(ref).to(dtype), torch.randn_like(ref_final).to(dtype)
    loss = (out * dout.to(out.device)).sum() + (final * dfinal.to(out.device)).sum()
    # In fp64 from the same rounded gradients: a loss summed in half precision would add its own rounding.
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    ref_loss = (ref * dout.double()).sum() + (ref_final * dfinal.double()).sum()
    ref_grads = torch.autograd.grad(ref_loss, list(wide.values()), allow_unused=True)
    for name, grad, want in zip(leaves, grads, ref_grads):
        want = torch.zeros_like(wide[name]) if want is None else want
        if grad is None:
            assert want.abs().sum() == 0, f"{what} d{name} is missing"
            continue
        assert grad.dtype == given[name].dtype, name
        assert_close(grad, want, GRADIENT[dtype], f"{what} d{name}")


# Values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("every", [False, True])
def test_values(
    device: torch.device, backend: str, dtype: torch.dtype, activation: str | None, every: bool
) -> None:
    skip_unserved(backend, device, dtype)
    given = make(2, 34, 5, 4, device=device, dtype=dtype, bias=every, state_rows=2 if every else None)
    for reverse in (False, True):
        check(given, backend, activation=activation, reverse=reverse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bias", "state"), [(True, False), (False, True)])
def test_each_option_alone(device: torch.device, backend: str, bias: bool, state: bool) -> None:
    skip_unserved(backend, device)
    given = make(2, 9, 3, 4, device=device, bias=bias, state_rows=2 if state else None)
    check(given, backend, activation="silu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fp32_parameters_beside_half_precision(
    device: torch.device, backend: str, dtype: torch.dtype
) -> None:
    skip_unserved(backend, device, dtype)
    given = make(1, 17, 4, 4, device=device, dtype=dtype, weight_dtype=torch.float32, state_rows=1)
    check(given, backend, activation="silu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [0, 1, 2, 63, 500])
def test_lengths(device: torch.device, backend: str, length: int) -> None:
    skip_unserved(backend, device)
    for reverse in (False, True) if length < 100 else (True,):
        given = make(1 if length == 500 else 2, length, 3, 4, device=device, state_rows=1 + (length != 500))
        check(given, backend, f"length {length}", activation="silu", reverse=reverse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taps", [1, 2, 3, 5, 8, 16])
def test_window_widths(device: torch.device, backend: str, taps: int) -> None:
    skip_unserved(backend, device)
    check(make(1, 21, 3, taps, device=device, state_rows=1), backend, f"d_conv {taps}", activation="silu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d_inner", [1, 16, 150])
def test_channel_counts(device: torch.device, backend: str, d_inner: int) -> None:
    skip_unserved(backend, device)
    check(make(2, 6, d_inner, 4, device=device, state_rows=2), backend, activation="silu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(device: torch.device, backend: str) -> None:
    skip_unserved(backend, device)
    check(make(0, 5, 3, 4, device=device, state_rows=0), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_non_contiguous(device: torch.device, backend: str, reverse: bool) -> None:
    skip_unserved(backend, device)
    given = make(2, 11, 4, 4, device=device, state_rows=2)
    strided = {
        "x": given["x"].transpose(1, 2).contiguous().transpose(1, 2),
        "weight": given["weight"].t().contiguous().t(),
        "bias": torch.stack([given["bias"], given["bias"]], 1)[:, 0],
        "initial_state": given["initial_state"].transpose(1, 2).contiguous().transpose(1, 2),
    }
    assert not any(t.is_contiguous() for t in strided.values())
    check(strided, backend, activation="silu", reverse=reverse)
    wide = torch.randn(2, 22, 8, device=device)
    check({**given, "x": wide[:, ::2, 2:6]}, backend, activation="silu", reverse=reverse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradient(device: torch.device, backend: str) -> None:
    """`out.sum().backward()` hands the backward a gradient of strides 0."""
    skip_unserved(backend, device)
    given = make(2, 9, 3, 4, device=device)
    x = given["x"].requires_grad_()
    causal_conv1d(**given, backend=backend).sum().backward()
    # Each input weighs in every output it reaches: all taps, fewer at the end.
    reach = given["weight"].flip(1).cumsum(1)
    want = torch.stack([reach[:, min(3, 8 - t)] for t in range(9)]).expand(2, 9, 3)
    assert x.grad is not None
    assert_close(x.grad, want, GRADIENT[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_output_alone(device: torch.device, backend: str) -> None:
    skip_unserved(backend, device)
    given = make(1, 5, 2, 4, device=device, state_rows=1)
    x, state = given["x"].requires_grad_(), given["initial_state"].requires_grad_()
    _, final = causal_conv1d(**given, return_final_state=True, backend=backend)
    dx, dstate = torch.autograd.grad(final.sum(), (x, state), allow_unused=True)
    want = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0], device=device)[None, :, None].expand(1, 5, 2)
    assert torch.equal(dx, want)
    assert dstate is None or not dstate.any()


# Laws ------------------------------------------------------------------------------------------------------

LENGTHS = (0, 1, 2, 7, 0, 40, 3, 0)


@pytest.mark.parametrize(("backend", "dtype"), [p for p in SERVED if p[1] != torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_values(device: torch.device, backend: str, dtype: torch.dtype, reverse: bool) -> None:
    """Sequences of no step and shorter than the window, beside one longer than a chunk."""
    skip_unserved(backend, device, dtype)
    seqs = Sequences.from_lengths(LENGTHS, device)
    for state in (True, False):
        rows = len(LENGTHS) if state else None
        given = make(1, seqs.total, 3, 4, device=device, dtype=dtype, state_rows=rows)
        check(given, backend, activation="silu", reverse=reverse, cu_seqlens=seqs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_equals_separate(
    device: torch.device, backend: str, reverse: bool, index: torch.dtype
) -> None:
    skip_unserved(backend, device)
    seqs = Sequences.from_lengths(LENGTHS, device)
    given = make(1, seqs.total, 3, 5, device=device, state_rows=len(LENGTHS))
    options: dict[str, Any] = {
        "activation": "silu",
        "reverse": reverse,
        "return_final_state": True,
        "backend": backend,
    }
    out, final = causal_conv1d(**given, **options, cu_seqlens=seqs.cu_seqlens.to(index))
    for i, (start, n) in enumerate(zip(seqs.starts, seqs.lengths)):
        alone = {
            **given,
            "x": given["x"][:, start : start + n],
            "initial_state": given["initial_state"][i : i + 1],
        }
        want, want_final = causal_conv1d(**alone, **options)
        assert_close(out[:, start : start + n], want, 1e-6, f"sequence {i}")
        assert torch.equal(final[i], want_final[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 2, 20, 41])
def test_split_and_carry(device: torch.device, backend: str, reverse: bool, cut: int) -> None:
    skip_unserved(backend, device)
    given = make(2, 41, 3, 4, device=device, state_rows=2)
    options: dict[str, Any] = {
        "activation": "silu",
        "reverse": reverse,
        "return_final_state": True,
        "backend": backend,
    }
    out, final = causal_conv1d(**given, **options)
    head, tail = given["x"][:, :cut], given["x"][:, cut:]
    first, second = (tail, head) if reverse else (head, tail)
    out1, state = causal_conv1d(**{**given, "x": first}, **options)
    out2, state = causal_conv1d(**{**given, "x": second, "initial_state": state}, **options)
    assert_close(torch.cat([out2, out1] if reverse else [out1, out2], 1), out, 1e-6)
    assert torch.equal(state, final)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_steps_equal_whole(device: torch.device, backend: str, activation: str | None) -> None:
    skip_unserved(backend, device)
    given = make(2, 9, 3, 4, device=device, state_rows=2)
    out, final = causal_conv1d(**given, activation=activation, return_final_state=True, backend=backend)
    weight, bias, state = given["weight"], given["bias"], given["initial_state"]
    start, in_place = state.clone(), state.clone()
    for t in range(9):
        x = given["x"][:, t]
        before = state.clone()
        y, new = causal_conv1d_step(x, weight, bias, state, activation=activation)
        assert torch.equal(state, before), "the out-of-place step wrote over its state"
        y_ = causal_conv1d_step_(x, weight, bias, in_place, activation=activation)
        assert torch.equal(y, y_)
        assert torch.equal(new, in_place)
        assert_close(y, out[:, t], 1e-6, f"step {t}")
        state = new
    assert torch.equal(state, final)
    assert torch.equal(given["initial_state"], start)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_step_gradients(device: torch.device, dtype: torch.dtype) -> None:
    given = make(2, 1, 3, 4, device=device, dtype=dtype, state_rows=2)
    leaves = {k: v.requires_grad_() for k, v in given.items()}
    wide = {k: v.detach().double().requires_grad_() for k, v in given.items()}
    out, new = causal_conv1d_step(
        leaves["x"][:, 0], leaves["weight"], leaves["bias"], leaves["initial_state"], activation="silu"
    )
    ref, ref_new = causal_conv1d_ref(**wide, activation="silu", return_final_state=True)
    assert_close(out[:, None], ref, OUTPUT[dtype])
    assert torch.equal(new.double(), ref_new)
    grads = torch.autograd.grad(out.sum() + new.square().sum(), list(leaves.values()))
    wants = torch.autograd.grad(ref.sum() + ref_new.square().sum(), list(wide.values()))
    for name, grad, want in zip(leaves, grads, wants):
        assert_close(grad, want, GRADIENT[dtype], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_causality(device: torch.device, backend: str, reverse: bool) -> None:
    """Changing the input at one step changes the outputs of that step and of d_conv - 1 after it, no
    other."""
    skip_unserved(backend, device)
    given = make(1, 40, 3, 4, device=device)
    changed = given["x"].clone()
    changed[:, 20] += 1
    out = causal_conv1d(**given, reverse=reverse, backend=backend)
    other = causal_conv1d(**{**given, "x": changed}, reverse=reverse, backend=backend)
    moved = (out != other).all(-1)[0].nonzero().flatten().tolist()
    still = (out == other).all(-1)[0].sum().item()
    assert moved == ([17, 18, 19, 20] if reverse else [20, 21, 22, 23])
    assert still == 36


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_equals_flips(device: torch.device, backend: str) -> None:
    skip_unserved(backend, device)
    given = make(2, 40, 3, 4, device=device, state_rows=2)
    options: dict[str, Any] = {"activation": "silu", "return_final_state": True, "backend": backend}
    out, final = causal_conv1d(**given, **options, reverse=True)
    want, want_final = causal_conv1d(**{**given, "x": given["x"].flip(1)}, **options)
    assert_close(out, want.flip(1), 1e-6)
    assert torch.equal(final, want_final)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_untouched_and_repeatable(device: torch.device, backend: str) -> None:
    """No argument is written to, and two runs, gradients of the weights included, agree to the bit."""
    skip_unserved(backend, device)
    given = make(1, 34, 3, 4, device=device, state_rows=1)
    before = {k: v.clone() for k, v in given.items()}
    runs = []
    for _ in range(2):
        leaves = {k: v.detach().requires_grad_() for k, v in given.items()}
        out, final = causal_conv1d(**leaves, activation="silu", return_final_state=True, backend=backend)
        runs.append(
            torch.autograd.grad(out.square().sum() + final.square().sum(), list(leaves.values())) + (out,)
        )
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert all(torch.equal(given[k], before[k]) for k in given)
