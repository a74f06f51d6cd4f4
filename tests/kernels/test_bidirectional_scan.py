"""`bidirectional_scan` on every backend beside two scans of the fp64 reference, values and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_modal.kernels import ScanDirection, Sequences, bidirectional_scan
from ssm_modal.kernels.scan.ref import selective_scan_ref
from tests.kernels.laws import Place, places, skip_unless_served
from tests.tolerances import GRADIENT, OUTPUT, assert_close

PLACES = places("selective_scan")
OWN = ("delta", "A", "B", "C", "D", "delta_bias")


def make(
    length: int,
    d_inner: int,
    d_state: int,
    *,
    batch: int = 1,
    groups: int = 1,
    without: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Arguments by name, those of `backwards` with a prime; A, D and the bias in fp32."""
    args = {
        "u": torch.randn(batch, length, d_inner),
        "u'": torch.randn(batch, length, d_inner),
        "z": torch.randn(batch, length, d_inner),
    }
    for prime in ("", "'"):
        own = (
            torch.randn(batch, length, d_inner),
            -2.0 * torch.rand(d_inner, d_state) - 0.1,
            torch.randn(batch, length, groups, d_state),
            torch.randn(batch, length, groups, d_state),
            torch.randn(d_inner),
            torch.randn(d_inner) - 1.0,
        )
        args |= {name + prime: x for name, x in zip(OWN, own)}
    half = {"u", "u'", "z", *(f"{name}{prime}" for name in ("delta", "B", "C") for prime in ("", "'"))}
    return {k: x.to(dtype) if k in half else x for k, x in args.items() if k not in without}


def direction(args: dict[str, Tensor], prime: str) -> ScanDirection:
    return ScanDirection(*(args.get(name + prime) for name in OWN))  # type: ignore[arg-type]


def reference(args: dict[str, Tensor], seqs: Sequences | None) -> Tensor:
    def one(u: Tensor, prime: str) -> Tensor:
        own: dict[str, Any] = {name: args.get(name + prime) for name in OWN}
        lead = [own.pop(name) for name in OWN[:4]]
        out = selective_scan_ref(
            u, *lead, **own, z=args.get("z"), delta_softplus=True, cu_seqlens=seqs, reverse=prime != ""
        )
        assert isinstance(out, Tensor)
        return out

    return one(args["u"], "") + one(args.get("u'", args["u"]), "'")


def check(args: dict[str, Tensor], place: Place, lengths: tuple[int, ...] | None = None) -> None:
    """Output and every gradient; the output without gradients, too."""
    skip_unless_served("selective_scan", place, args["u"].dtype)
    given = {k: x.to(place.device).requires_grad_() for k, x in args.items()}
    wide = {k: x.detach().double().requires_grad_() for k, x in given.items()}
    seqs = None if lengths is None else Sequences.from_lengths(lengths, place.device)
    wanted = reference(wide, seqs)
    dout = torch.randn_like(wanted).to(args["u"].dtype)
    right = torch.autograd.grad(wanted, list(wide.values()), dout.double())

    def run() -> Tensor:
        return bidirectional_scan(
            given["u"],
            direction(given, ""),
            direction(given, "'"),
            u_backwards=given.get("u'"),
            z=given.get("z"),
            delta_softplus=True,
            cu_seqlens=seqs,
            backend=place.backend,
        )

    out = run()
    assert out.dtype == args["u"].dtype
    # Two rounded numbers are added and rounded.
    assert_close(out, wanted, 2 * OUTPUT[out.dtype], "out")
    for name, grad, value in zip(given, torch.autograd.grad(out, list(given.values()), dout), right):
        assert grad.dtype == given[name].dtype
        assert_close(grad, value, 2 * GRADIENT[out.dtype], f"gradient of {name}")
    with torch.no_grad():
        assert_close(run(), wanted, 2 * OUTPUT[out.dtype], "out without gradients")


CASES = {
    "one u": {"without": ("u'",)},
    "two u": {},
    "no gate": {"without": ("z", "u'")},
    "no gate, two u": {"without": ("z",)},
    "no D": {"without": ("D", "D'", "u'")},
    "one D": {"without": ("D", "u'")},
    "no bias": {"without": ("delta_bias", "delta_bias'", "u'")},
    "groups": {"groups": 2, "without": ("u'",)},
    "bf16": {"dtype": torch.bfloat16, "without": ("u'",)},
}
OF_BOTH = ("no gate, two u", "no D", "no bias", "groups")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_equals_two_scans(case: str, place: Place) -> None:
    if place.interpreted and case in OF_BOTH:
        pytest.skip("what one scan does, the interpreter need not show again")
    length, d_inner, batch = (4, 4, 1) if place.interpreted else (300, 6, 2)
    check(make(length, d_inner, 2, batch=batch, **CASES[case]), place)  # type: ignore[arg-type]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("place", PLACES)
def test_packed(place: Place) -> None:
    check(make(5, 4, 2, without=("u'",)), place, (2, 0, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_state", [16, 64])
def test_rows_copied_ahead(d_state: int, dtype: torch.dtype) -> None:
    """Whole blocks of channels and many chunks, as kernels on a GPU like them."""
    place = Place(torch.device("cuda", 0), "triton")
    for without in ((), ("u'",)):
        check(make(700, 64, d_state, batch=2, dtype=dtype, without=without), place)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("without", "serial"), [(("u'",), False), (("u'", "z"), False), ((), False), (("u'",), True)]
)
def test_many_chunks(without: tuple[str, ...], serial: bool) -> None:
    """The Triton form in chunks of 4 steps and blocks of 4 channels."""
    pytest.importorskip("triton")
    from ssm_modal.kernels.scan.triton_bidirectional import bidirectional_scan_bwd, bidirectional_scan_fwd
    from tests.kernels.test_scan_triton import TINY

    skip_unless_served("selective_scan", Place(torch.device("cpu"), "triton"))
    launch = replace(TINY, serial=serial)
    args = make(6, 3, 2, without=without)
    wide = {k: x.double().requires_grad_() for k, x in args.items()}
    wanted = reference(wide, None)
    dout = torch.randn_like(wanted).float()
    right = dict(zip(wide, torch.autograd.grad(wanted, list(wide.values()), dout.double())))
    lead = (args["u"], args.get("u'"), direction(args, ""), direction(args, "'"), args.get("z"), True, None)
    out, *kept = bidirectional_scan_fwd(*lead, True, launch=launch)
    assert_close(out, wanted, OUTPUT[torch.float32], "out")
    before = [None if x is None else x.clone() for x in kept]
    du, du_back, ahead, back, dz = bidirectional_scan_bwd(dout, *lead, *kept, launch=launch)
    found = {"u": du, "u'": du_back, "z": dz}
    found |= dict(zip(OWN, ahead)) | {f"{name}'": grad for name, grad in zip(OWN, back)}
    assert {k for k, grad in found.items() if grad is not None} == set(args)
    for name, value in right.items():
        assert_close(found[name], value, GRADIENT[torch.float32], f"gradient of {name}")
    # What the forward kept serves a second backward.
    assert all(x is None or torch.equal(x, y) for x, y in zip(kept, before))


@pytest.mark.parametrize("place", [p for p in PLACES if "triton" in p.id])
def test_custom_op(place: Place) -> None:
    """The contract of torch.library, and whole graphs."""
    skip_unless_served("selective_scan", place)
    args = {k: x.to(place.device).requires_grad_() for k, x in make(2, 3, 1, without=("u'", "D")).items()}
    ahead, back = direction(args, ""), direction(args, "'")
    raw = (args["u"], args.get("u'"), *ahead.parts(), *back.parts(), args.get("z"), True, None, [])
    tests: tuple[str, ...] = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not place.interpreted:
        tests += ("test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.ssm_modal.bidirectional_scan_fwd.default, raw, test_utils=tests)

    def layer(args: dict[str, Tensor]) -> Tensor:
        return bidirectional_scan(
            args["u"],
            direction(args, ""),
            direction(args, "'"),
            u_backwards=args.get("u'"),
            z=args.get("z"),
            delta_softplus=True,
            backend=place.backend,
        )

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out, wanted = compiled(args), layer(args)
    assert_close(out, wanted, 1e-6, "out")
    found, right = (
        torch.autograd.grad(x.square().sum(), list(args.values()), retain_graph=True) for x in (out, wanted)
    )
    for name, grad, value in zip(args, found, right):
        assert_close(grad, value, 1e-5, f"gradient of {name}")
    (once,) = torch.autograd.grad(wanted.square().sum(), args["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="bidirectional_scan has first derivatives only"):
        once.sum().backward()


def test_wrong_arguments_are_named() -> None:
    args = make(5, 4, 3)
    ahead, back = direction(args, ""), direction(args, "'")
    with pytest.raises(TypeError, match="forwards must be a ScanDirection, got tuple"):
        bidirectional_scan(args["u"], (args["delta"],), back)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"backwards: selective_scan: delta has shape \(1, 4, 4\)"):
        bidirectional_scan(args["u"], ahead, replace(back, delta=back.delta[:, 1:]))
    with pytest.raises(ValueError, match=r"u_backwards has shape \(1, 4, 4\)"):
        bidirectional_scan(args["u"], ahead, back, u_backwards=args["u'"][:, 1:])
    other = replace(back, A=back.A[:, :2], B=back.B[..., :2], C=back.C[..., :2])
    with pytest.raises(ValueError, match="expected d_state and groups to be the same"):
        bidirectional_scan(args["u"], ahead, other)
