"""`rms_norm`: values and every gradient against the plain formula in fp64, on every backend that serves."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels import dispatch
from ssm_modal.kernels.norm import launch, rms_norm, rms_norm_ref
from tests.kernels.laws import served, skip_unless_possible
from tests.tolerances import GRADIENT, OUTPUT, assert_close

BACKENDS = ("torch", "triton")
SERVED = served("rms_norm")

skip_unserved = functools.partial(skip_unless_possible, "rms_norm")

pytestmark = pytest.mark.usefixtures("poison")


def make(
    *shape: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weight: torch.dtype | None = None,
    residual: torch.dtype | None = None,
    gate: bool = False,
) -> dict[str, Tensor]:
    """Random arguments, those asked for, `weight` and `residual` in the dtypes given."""
    given = {"x": torch.randn(*shape, dtype=torch.float64).to(device, dtype)}
    if weight is not None:
        given["weight"] = (1 + torch.randn(shape[-1], dtype=torch.float64) / 4).to(device, weight)
    if residual is not None:
        given["residual"] = torch.randn(*shape, dtype=torch.float64).to(device, residual)
    if gate:
        given["gate"] = torch.randn(*shape, dtype=torch.float64).to(device, dtype)
    return given


def formula(
    x: Tensor,
    weight: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, written apart from the package: (out, sum), group by group."""
    total = x if residual is None else x + residual
    h = total if gate is None or norm_before_gate else total * gate * torch.sigmoid(gate)
    parts = h.split(group_size or x.shape[-1], dim=-1)
    out = torch.cat([p / torch.sqrt((p**2).sum(-1, keepdim=True) / p.shape[-1] + eps) for p in parts], -1)
    out = out if weight is None else out * weight
    return (out if gate is None or not norm_before_gate else out * gate * torch.sigmoid(gate)), total


def slack(backend: str, x: Tensor) -> int:
    """Triton's interpreter cuts fp32 to bf16 where hardware rounds: twice the error, on the CPU alone."""
    return 2 if backend == "triton" and x.device.type == "cpu" and x.dtype == torch.bfloat16 else 1


def check(given: dict[str, Tensor], backend: str, residual_in_fp32: bool = False, **options: Any) -> None:
    """Outputs and every gradient, from both outputs, against the formula in fp64 on the same rounded
    inputs."""
    dtype = given["x"].dtype
    times = slack(backend, given["x"])
    leaves = {k: v.detach().requires_grad_() for k, v in given.items()}
    wide = {k: v.detach().double().cpu().requires_grad_() for k, v in given.items()}
    result = rms_norm(**leaves, **options, residual_in_fp32=residual_in_fp32, backend=backend)
    refs = formula(**wide, **options)
    if "residual" in given:
        out, total = result
        kept = given["residual"].dtype
        kept = torch.float32 if residual_in_fp32 and kept != torch.float64 else kept
        assert total.dtype == kept
        assert_close(total, refs[1], times * OUTPUT[kept], "sum")
        outs, refs = (out, total), refs
    else:
        assert isinstance(result, Tensor)
        outs, refs = (result,), refs[:1]
    assert outs[0].dtype == dtype
    assert outs[0].shape == given["x"].shape
    assert_close(outs[0], refs[0], times * OUTPUT[dtype], "out")

    upstream = [torch.randn_like(r).to(o.dtype) for o, r in zip(outs, refs)]
    grads = torch.autograd.grad(outs, list(leaves.values()), [g.to(given["x"].device) for g in upstream])
    wants = torch.autograd.grad(refs, list(wide.values()), [g.double() for g in upstream])
    for name, grad, want in zip(leaves, grads, wants):
        assert grad.dtype == given[name].dtype, name
        assert_close(grad, want, times * GRADIENT[dtype], f"d{name}")


@pytest.mark.parametrize(("backend", "dtype"), SERVED)
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("gate", [None, "first", "last"])
def test_values(
    device: torch.device, backend: str, dtype: torch.dtype, weight: bool, residual: bool, gate: str | None
) -> None:
    skip_unserved(backend, device, dtype)
    given = make(
        2,
        3,
        40,
        device=device,
        dtype=dtype,
        weight=dtype if weight else None,
        residual=dtype if residual else None,
        gate=gate is not None,
    )
    check(given, backend, norm_before_gate=gate == "last")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("residual", "in_fp32"), [("same", True), ("fp32", False), ("fp32", True)])
def test_fp32_residual_and_weight_beside_half_precision(
    device: torch.device, backend: str, dtype: torch.dtype, residual: str, in_fp32: bool
) -> None:
    skip_unserved(backend, device, dtype)
    kept = dtype if residual == "same" else torch.float32
    given = make(3, 24, device=device, dtype=dtype, weight=torch.float32, residual=kept)
    check(given, backend, residual_in_fp32=in_fp32)


def test_fp64_residual_stays_fp64() -> None:
    check(make(3, 8, dtype=torch.float64, residual=torch.float64), "torch", residual_in_fp32=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", [None, "first", "last"])
@pytest.mark.parametrize("group_size", [1, 4, 12])
def test_groups(device: torch.device, backend: str, gate: str | None, group_size: int) -> None:
    skip_unserved(backend, device)
    given = make(2, 12, device=device, weight=torch.float32, residual=torch.float32, gate=gate is not None)
    check(given, backend, norm_before_gate=gate == "last", group_size=group_size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7,), (5, 1), (0, 4), (2, 0, 4), (2, 2, 2, 130), (9, 257)])
def test_shapes(device: torch.device, backend: str, shape: tuple[int, ...]) -> None:
    skip_unserved(backend, device)
    check(make(*shape, device=device, weight=torch.float32, residual=torch.float32), backend)


@pytest.mark.parametrize("gate", [None, "first", "last"])
def test_rows_wider_than_a_block(
    device: torch.device, gate: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton takes wide rows in blocks, its partial sums in memory; no gap and no overlap between blocks."""
    skip_unserved("triton", device)
    monkeypatch.setattr(launch, "WHOLE", 32)
    given = make(5, 40, device=device, weight=torch.float32, residual=torch.float32, gate=gate is not None)
    check(given, "triton", norm_before_gate=gate == "last")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 100, 1024, 2560, 4096, 5000, 8192, 12288])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_every_width_on_gpu(dim: int, dtype: torch.dtype) -> None:
    """Tiles as they are launched for real inputs: several rows in one, one row, blocks of a row."""
    for gate in (False, True):
        given = make(
            3001, dim, device="cuda", dtype=dtype, weight=torch.float32, residual=torch.float32, gate=gate
        )
        for last in (False, True) if gate else (False,):
            check(given, "triton", norm_before_gate=last)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_launch_table(backward: bool, gated: bool) -> None:
    """A row in one tile up to d_model 8192, with 4 to 32 elements a thread."""
    for width in (1, 16, 100, 1024, 2560, 4096, 8192, 12288):
        made = launch.norm_launch(width, backward, gated)
        assert made.one == (width <= (4096 if backward and (gated or width % 16) else 8192))
        assert made.block >= width or not made.one
        assert 4 <= made.rows * made.block / (32 * made.warps) <= 32
        assert made.rows == 1 or made.one


@pytest.mark.gpu
def test_offsets_past_32_bits() -> None:
    rows, dim = (1 << 19) + 5, 4096
    x = torch.zeros(rows, dim, device="cuda", dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, dim, device="cuda")
    x.requires_grad_()
    torch.use_deterministic_algorithms(False)
    out = rms_norm(x, backend="triton")
    assert isinstance(out, Tensor)
    tail = x.detach()[-3:].double().requires_grad_()
    (want,) = formula(tail)[:1]
    assert_close(out[-3:], want, OUTPUT[torch.bfloat16])
    dout = torch.randn(3, dim, device="cuda", dtype=torch.bfloat16)
    (dx,) = torch.autograd.grad(out[-3:], x, dout)
    (dwant,) = torch.autograd.grad(want, tail, dout.double())
    assert_close(dx[-3:], dwant, GRADIENT[torch.bfloat16])


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(device: torch.device, backend: str) -> None:
    skip_unserved(backend, device)
    both = torch.randn(2, 3, 20, device=device)
    x, gate = both.chunk(2, dim=-1)
    given = {
        "x": x,
        "gate": gate,
        "residual": torch.randn(2, 10, 3, device=device).transpose(1, 2),
        "weight": torch.randn(10, 2, device=device)[:, 0],
    }
    assert not any(t.is_contiguous() for t in given.values())
    check(given, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradient(device: torch.device, backend: str) -> None:
    """`out.sum().backward()` hands the backward a gradient of strides 0."""
    skip_unserved(backend, device)
    given = make(3, 8, device=device, weight=torch.float32)
    weight = given["weight"].requires_grad_()
    result = rms_norm(**given, backend=backend)
    assert isinstance(result, Tensor)
    result.sum().backward()
    assert weight.grad is not None
    assert_close(weight.grad, formula(given["x"])[0].sum(0), GRADIENT[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output_alone(device: torch.device, backend: str, which: int) -> None:
    skip_unserved(backend, device)
    given = {k: v.requires_grad_() for k, v in make(3, 8, device=device, residual=torch.float32).items()}
    wide = {k: v.detach().double().cpu().requires_grad_() for k, v in given.items()}
    loss = rms_norm(**given, backend=backend)[which].square().mul(torch.arange(8.0, device=device)).sum()
    ref = formula(**wide)[which].square().mul(torch.arange(8.0)).sum()
    for grad, want in zip(
        torch.autograd.grad(loss, list(given.values())), torch.autograd.grad(ref, list(wide.values()))
    ):
        assert_close(grad, want, GRADIENT[torch.float32])


# Laws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("in_fp32", [False, True])
def test_fused_equals_unfused(device: torch.device, backend: str, dtype: torch.dtype, in_fp32: bool) -> None:
    """With the residual: to the bit the norm of the sum that is returned."""
    skip_unserved(backend, device, dtype)
    given = make(4, 40, device=device, dtype=dtype, weight=torch.float32, residual=dtype)
    out, total = rms_norm(**given, residual_in_fp32=in_fp32, backend=backend)
    keep = torch.float32 if in_fp32 else dtype
    assert torch.equal(total, (given["x"].float() + given["residual"].float()).to(keep))
    alone = rms_norm(total, given["weight"], backend=backend)
    assert isinstance(alone, Tensor)
    assert torch.equal(out, alone.to(dtype))


def test_plain_form_is_torchs_own() -> None:
    given = make(4, 40, dtype=torch.float64, weight=torch.float64)
    want = F.rms_norm(given["x"], (40,), given["weight"], eps=1e-3)
    assert_close(rms_norm_ref(**given, eps=1e-3), want, OUTPUT[torch.float64])  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_counts(device: torch.device, backend: str) -> None:
    """Rows of zeros give zeros, not NaN, and eps stands inside the root beside the mean of squares."""
    skip_unserved(backend, device)
    assert torch.equal(
        rms_norm(torch.zeros(2, 8, device=device), backend=backend), torch.zeros(2, 8, device=device)
    )
    x = torch.full((1, 8), 3e-3, device=device)
    out = rms_norm(x, eps=1.6e-5, backend=backend)
    assert isinstance(out, Tensor)
    assert_close(out, torch.full((1, 8), 0.6), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_half_precision_values_do_not_overflow(device: torch.device, backend: str) -> None:
    skip_unserved(backend, device, torch.float16)
    x = torch.full((1, 8), 6e4, device=device, dtype=torch.float16)
    out = rms_norm(x, backend=backend)
    assert isinstance(out, Tensor)
    assert_close(out, torch.ones(1, 8), OUTPUT[torch.float16])


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_untouched_and_repeatable(device: torch.device, backend: str) -> None:
    skip_unserved(backend, device)
    given = make(9, 40, device=device, weight=torch.float32, residual=torch.float32, gate=True)
    before = {k: v.clone() for k, v in given.items()}
    runs = []
    for _ in range(2):
        leaves = {k: v.detach().requires_grad_() for k, v in given.items()}
        out, total = rms_norm(**leaves, backend=backend)
        runs.append(
            (out, total, *torch.autograd.grad(out.square().sum() + total.sum(), list(leaves.values())))
        )
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert all(torch.equal(given[k], before[k]) for k in given)


# Autograd and compile --------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [False, True])
def test_opcheck(device: torch.device, every: bool) -> None:
    skip_unserved("triton", device)
    torch.use_deterministic_algorithms(False)
    weight = torch.float32 if every else None
    given = make(3, 8, device=device, weight=weight, residual=weight, gate=every)
    ops = torch.ops.ssm_modal
    x, w, gate = given["x"], given.get("weight"), given.get("gate")
    rstd = torch.rand(3, 2 if every else 1, device=device)
    kept = (torch.bfloat16, torch.float32) if every else (torch.float32, None)
    dtotal = torch.randn(3, 8, device=device) if every else None
    dout = torch.randn(3, 8, device=device)
    torch.library.opcheck(ops.rms_norm_bwd.default, (dout, dtotal, x, w, gate, rstd, False, *kept))
    for t in given.values():
        t.requires_grad_()
    options = (1e-5, False, every, 4 if every else None)
    torch.library.opcheck(ops.rms_norm_fwd.default, (x, w, given.get("residual"), gate, *options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("every", [False, True])
def test_compiles_whole(device: torch.device, backend: str, every: bool) -> None:
    skip_unserved(backend, device)
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    kept = torch.float32 if every else None
    given = make(3, 8, device=device, weight=torch.float32, residual=kept, gate=every)
    leaves = [t.requires_grad_() for t in given.values()]

    def run(*tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(**dict(zip(given, tensors)), backend=backend)  # type: ignore[arg-type]

    results = []
    for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        result = f(*leaves)
        outs = (result,) if isinstance(result, Tensor) else result
        results.append((*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), leaves)))
    for eager, compiled in zip(*results):
        assert_close(compiled, eager, 1e-6)


def test_double_backward(device: torch.device) -> None:
    skip_unserved("triton", device)
    x = torch.randn(2, 4, device=device, requires_grad=True)
    result = rms_norm(x, backend="triton")
    assert isinstance(result, Tensor)
    (grad,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"rms_norm has first derivatives only.*backend='torch'"):
        grad.sum().backward()


def test_double_backward_on_torch() -> None:
    given = make(2, 4, dtype=torch.float64, weight=torch.float64, residual=torch.float64, gate=True)
    leaves = tuple(t.requires_grad_() for t in given.values())

    def run(x: Tensor, weight: Tensor, residual: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, residual=residual, gate=gate, backend="torch")

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


# Errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": 1.0}, TypeError, "x must be a tensor, got float"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\), expected \(..., dim\)"),
        (
            {"x": torch.zeros(2, 0)},
            ValueError,
            r"x has shape \(2, 0\), expected \(..., dim\) with dim at least 1",
        ),
        ({"x": torch.zeros(2, 8, dtype=torch.int32)}, TypeError, "x has dtype int32, expected float32"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight has shape \(7,\), expected \(8,\)"),
        ({"weight": torch.zeros(8).double()}, TypeError, "weight has dtype float64, expected float32"),
        ({"residual": torch.zeros(8)}, ValueError, r"residual has shape \(8,\), expected \(2, 8\)"),
        ({"residual": torch.zeros(2, 8).half()}, TypeError, "residual has dtype float16, expected float32"),
        ({"residual": torch.zeros(2, 8, device="meta")}, ValueError, "residual is on meta, but x is on cpu"),
        ({"gate": torch.zeros(2, 4)}, ValueError, r"gate has shape \(2, 4\), expected \(2, 8\)"),
        ({"gate": torch.zeros(2, 8).bfloat16()}, TypeError, "gate has dtype bfloat16, expected float32"),
        ({"eps": 0.0}, ValueError, "eps is 0.0, expected a number above 0"),
        ({"eps": float("nan")}, ValueError, "eps is nan, expected a number above 0"),
        ({"group_size": 3}, ValueError, "group_size is 3, expected a divisor of dim 8"),
        ({"group_size": 0}, ValueError, "group_size is 0, expected a divisor of dim 8"),
        ({"group_size": 2.0}, TypeError, "group_size must be a whole number or None, got float"),
        ({"eps": "small"}, TypeError, "eps must be a number, got str"),
        ({"backend": "cpu"}, dispatch.BackendError, "rms_norm has no cpu form"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rms_norm(**{"x": torch.zeros(2, 8), **changes})
