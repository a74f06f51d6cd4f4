"""`causal_conv1d` as an op: autograd's rules, torch.compile, far offsets, launches, and every error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_modal.kernels import dispatch
from ssm_modal.kernels.conv import (
    causal_conv1d,
    causal_conv1d_step,
    causal_conv1d_step_,
)
from ssm_modal.kernels.conv.launch import (
    BACKWARD_PROGRAMS,
    FORWARD_PROGRAMS,
    LONGEST,
    SHORTEST,
    conv_launch,
)
from ssm_modal.kernels.sequences import Sequences
from tests.kernels.test_causal_conv1d import BACKENDS, make, skip_unserved
from tests.tolerances import GRADIENT, OUTPUT, assert_close

pytestmark = pytest.mark.usefixtures("poison")


# Autograd, compile, offsets --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("every", [False, True])
def test_opcheck(device: torch.device, backend: str, every: bool) -> None:
    skip_unserved(backend, device)
    torch.use_deterministic_algorithms(False)
    seqs = Sequences.from_lengths([2, 3], device) if every else None
    given = make(1, 5, 2, 4, device=device, bias=every, state_rows=2 if every else None)
    tail = (None, []) if seqs is None else (seqs.cu_seqlens, [2, 3])
    args = (given["x"], given["weight"], given.get("bias"), True, given.get("initial_state"), *tail, every)
    ops = torch.ops.ssm_modal
    dfinal = torch.randn(2, 2, 3, device=device) if every else None
    torch.library.opcheck(
        ops.causal_conv1d_bwd.default, (torch.randn(1, 5, 2, device=device), dfinal, *args, backend)
    )
    for t in given.values():
        t.requires_grad_()
    torch.library.opcheck(ops.causal_conv1d_fwd.default, (*args, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_whole(device: torch.device, backend: str, packed: bool) -> None:
    skip_unserved(backend, device)
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    seqs = Sequences.from_lengths([2, 0, 6], device) if packed else None
    given = make(1, 8, 3, 4, device=device, state_rows=3 if packed else 1)

    def run(x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(
            x,
            weight,
            bias,
            activation="silu",
            initial_state=initial_state,
            cu_seqlens=seqs,
            return_final_state=True,
            backend=backend,
        )

    leaves = [t.requires_grad_() for t in given.values()]
    results = []
    for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out, final = f(*leaves)
        results.append((out, final, *torch.autograd.grad(out.square().sum() + final.sum(), leaves)))
    for eager, compiled in zip(*results):
        assert_close(compiled, eager, 1e-6)


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_double_backward_raises(device: torch.device, backend: str) -> None:
    skip_unserved(backend, device)
    given = make(1, 3, 2, 4, device=device)
    x = given["x"].requires_grad_()
    (grad,) = torch.autograd.grad(
        causal_conv1d(**given, backend=backend).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"causal_conv1d has first derivatives only.*backend='torch'"):
        grad.sum().backward()


def test_double_backward_on_torch() -> None:
    given = make(1, 6, 2, 3, dtype=torch.float64, state_rows=1)
    leaves = tuple(t.requires_grad_() for t in given.values())

    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, activation="silu", initial_state=state, backend="torch")

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.gpu
def test_offsets_past_32_bits() -> None:
    """2^32 elements: what stands past 2^31 is read and written where it belongs."""
    length, d_inner = 1 << 20, 4096
    x = torch.zeros(1, length, d_inner, device="cuda", dtype=torch.bfloat16)
    x[:, -64:] = torch.randn(1, 64, d_inner, device="cuda")
    x.requires_grad_()
    weight = torch.randn(d_inner, 4, device="cuda")
    torch.use_deterministic_algorithms(False)
    out = causal_conv1d(x, weight, activation="silu", backend="triton")
    tail = x.detach()[:, -67:].double().requires_grad_()
    want = causal_conv1d(tail, weight.double(), activation="silu", backend="torch")
    assert_close(out[:, -64:], want[:, -64:], OUTPUT[torch.bfloat16])
    dout = torch.randn(1, 64, d_inner, device="cuda", dtype=torch.bfloat16)
    (dx,) = torch.autograd.grad(out[:, -64:], x, dout)
    (dwant,) = torch.autograd.grad(want[:, -64:], tail, dout.double())
    assert_close(dx[:, -67:], dwant, GRADIENT[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("taps", "d_inner"), [(4, 1536), (3, 1000), (7, 257), (16, 96)])
@pytest.mark.parametrize("reverse", [False, True])
def test_many_chunks_on_gpu(dtype: torch.dtype, taps: int, d_inner: int, reverse: bool) -> None:
    """Blocks of channels and chunks as they are launched for real inputs, beside the torch form in fp64."""
    seqs = Sequences.from_lengths([2048, 1, 0, 700, 2, 1999], "cuda")
    given = make(1, seqs.total, d_inner, taps, device="cuda", dtype=dtype, state_rows=seqs.n)
    outs, grads = [], []
    upstream = [
        torch.randn(1, seqs.total, d_inner, device="cuda").to(dtype),
        torch.randn(seqs.n, d_inner, taps - 1, device="cuda").to(dtype),
    ]
    for wide, backend in ((dtype, "triton"), (torch.float64, "torch")):
        leaves = {k: v.to(wide).requires_grad_() for k, v in given.items()}
        both = causal_conv1d(
            **leaves,
            activation="silu",
            cu_seqlens=seqs,
            reverse=reverse,
            return_final_state=True,
            backend=backend,
        )
        outs.append(both)
        grads.append(torch.autograd.grad(both, list(leaves.values()), [g.to(wide) for g in upstream]))
    assert_close(outs[0][0], outs[1][0], OUTPUT[dtype], "out")
    assert torch.equal(outs[0][1].double(), outs[1][1])
    for name, grad, want in zip(given, *grads):
        assert_close(grad, want, GRADIENT[dtype], f"d{name}")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("taps", [1, 4, 5, 8, 9, 16])
def test_launch_table(backward: bool, taps: int) -> None:
    """Walks are a whole number of rounds, longer where there is more work, and leave programs enough."""
    steps = 0
    for rows in (1, 2048, 65536, 131072, 1 << 20, 1 << 24):
        launch = conv_launch(rows, 2048, taps, backward)
        assert launch.steps % launch.unroll == 0
        assert launch.steps >= max(steps, 2 * taps)
        assert launch.block_d % (32 * launch.warps) == 0
        steps = launch.steps
        programs = -(-rows // steps) * (2048 // launch.block_d)
        assert programs >= (BACKWARD_PROGRAMS if backward else FORWARD_PROGRAMS) or steps == SHORTEST
    assert steps == LONGEST
    assert conv_launch(64, 3, taps, backward).block_d == 16


@pytest.mark.gpu
def test_default_backend_on_cuda() -> None:
    assert dispatch.explain("causal_conv1d", device="cuda").backend == "triton"


# Errors ----------------------------------------------------------------------------------------------------


def arguments(**changes: Any) -> dict[str, Any]:
    return {**make(2, 5, 3, 4, state_rows=2), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(5, 3)}, ValueError, r"x has shape \(5, 3\), expected \(batch, length, d_inner\)"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(2, 5, 3, dtype=torch.int64)}, TypeError, "x has dtype int64, expected float32"),
        ({"weight": torch.zeros(4, 4)}, ValueError, r"weight has shape \(4, 4\), expected \(3, d_conv\)"),
        ({"weight": torch.zeros(3, 0)}, ValueError, "weight has d_conv 0, expected at least one tap"),
        ({"weight": torch.zeros(3, 4).double()}, TypeError, "weight has dtype float64, expected float32"),
        ({"weight": torch.zeros(3, 4).bfloat16()}, TypeError, "weight has dtype bfloat16, expected float32"),
        ({"weight": torch.zeros(3, 4, device="meta")}, ValueError, "weight is on meta, but x is on cpu"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \(4,\), expected \(3,\)"),
        ({"bias": torch.zeros(3).half()}, TypeError, "bias has dtype float16, expected float32"),
        (
            {"initial_state": torch.zeros(2, 3, 4)},
            ValueError,
            r"initial_state has shape \(2, 3, 4\), expected \(2, 3, 3\), that is \(batch, d_inner,",
        ),
        (
            {"initial_state": torch.zeros(2, 3, 3).double()},
            TypeError,
            "initial_state has dtype float64, expected float32",
        ),
        ({"reverse": "no"}, TypeError, "reverse is 'no', expected True or False"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu', expected None or 'silu'"),
        ({"backend": "numpy"}, ValueError, "backend is 'numpy'"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "x has batch 2, expected 1 with cu_seqlens"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        causal_conv1d(**arguments(**changes))


@pytest.mark.parametrize(
    ("borders", "error", "message"),
    [
        ([1, 5], ValueError, r"cu_seqlens\[0\] is 1, expected 0"),
        ([0, 4, 3, 5], ValueError, "cu_seqlens falls from 4 to 3"),
        ([0, 4], ValueError, "cu_seqlens ends at 4, expected 5"),
        ([0.0, 5.0], TypeError, "cu_seqlens has dtype torch.float32"),
    ],
)
def test_border_errors(borders: list[float], error: type[Exception], message: str) -> None:
    given = make(1, 5, 3, 4)
    with pytest.raises(error, match=message):
        causal_conv1d(**given, cu_seqlens=torch.tensor(borders))


def test_packed_state_has_a_row_a_sequence() -> None:
    given = make(1, 5, 3, 4, state_rows=1)
    with pytest.raises(ValueError, match=r"expected \(2, 3, 3\), that is \(sequences, d_inner, d_conv - 1\)"):
        causal_conv1d(**given, cu_seqlens=torch.tensor([0, 2, 5]))


def test_step_errors() -> None:
    given = arguments()
    x, weight, state = given["x"][:, 0], given["weight"], given["initial_state"]
    with pytest.raises(ValueError, match=r"causal_conv1d_step: x has shape \(2, 5, 3\)"):
        causal_conv1d_step(given["x"], weight, None, state)
    with pytest.raises(ValueError, match=r"causal_conv1d_step_: state has shape \(1, 3, 3\), expected"):
        causal_conv1d_step_(x, weight, None, state[:1])
    with pytest.raises(RuntimeError, match=r"causal_conv1d_step_ works in place .* or causal_conv1d_step$"):
        causal_conv1d_step_(x, weight.clone().requires_grad_(), None, state)
    with pytest.raises(ValueError, match="activation is 'relu'"):
        causal_conv1d_step(x, weight, None, state, activation="relu")


def test_backends_that_cannot_serve_say_why(device: torch.device) -> None:
    given = make(1, 5, 3, 4, device=device, dtype=torch.float64)
    with pytest.raises(dispatch.BackendError, match=r"causal_conv1d: backend 'triton'.*fp64 runs on backend"):
        causal_conv1d(**given, backend="triton")
    with pytest.raises(dispatch.BackendError, match="causal_conv1d: backend 'cpu'"):
        causal_conv1d(**given, backend="cpu")


def test_window_too_wide_for_triton(device: torch.device) -> None:
    skip_unserved("triton", device)
    with pytest.raises(ValueError, match="d_conv 17, expected at most 16 on backend 'triton'"):
        causal_conv1d(**make(1, 5, 3, 17, device=device), backend="triton")
