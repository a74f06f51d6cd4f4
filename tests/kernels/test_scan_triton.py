"""The Triton selective scan, called directly, against the loop of `ref.py` in fp64.

On the CPU the kernels run in Triton's interpreter, so shapes are tiny and launches force chunks of 4 steps
and blocks of 4 channels: many chunks, a partial last one and several blocks all the same. The GPU runs the
shipped launches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_modal.kernels.scan.launch import ScanLaunch, boundaries_shape, scan_launch
from ssm_modal.kernels.scan.ref import selective_scan_ref
from ssm_modal.kernels.sequences import Sequences
from tests.tolerances import GRADIENT, OUTPUT, assert_close

pytest.importorskip("triton")

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
TINY = ScanLaunch(
    chunk_size=4,
    serial=False,
    run_length=128,
    block=4,
    fwd_block=4,
    fwd_steps=2,
    fwd_registers=None,
    serial_registers=None,
    bwd_steps=2,
    bwd_registers=None,
    bwd_programs=3,
    bwd_splits=1,
    polynomials=0,
    output_polynomials=0,
)


pytestmark = pytest.mark.usefixtures("poison")


def make(
    batch: int,
    length: int,
    d_inner: int,
    groups: int,
    d_state: int,
    *,
    lengths: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    without: tuple[str, ...] = (),
    strided: bool = False,
    shifted: bool = False,
) -> dict[str, Tensor | None]:
    """Arguments of the scan. `strided`: u and z halves of one tensor, delta transposed, B and C slices.

    `shifted`: u, delta, z, B and C start one number into their storage, so that no row is aligned.
    """
    rows = batch if lengths is None else len(lengths)
    args: dict[str, Tensor | None] = {
        "u": torch.randn(batch, length, d_inner),
        "delta": torch.randn(batch, length, d_inner),
        "A": -2.0 * torch.rand(d_inner, d_state) - 0.1,
        "B": torch.randn(batch, length, groups, d_state),
        "C": torch.randn(batch, length, groups, d_state),
        "D": torch.randn(d_inner),
        "z": torch.randn(batch, length, d_inner),
        "delta_bias": torch.randn(d_inner) - 1.0,
        "initial_state": torch.randn(rows, d_inner, d_state),
    }
    for name in ("u", "delta", "B", "C", "z"):
        args[name] = args[name].to(dtype)
    if strided:
        args["u"], args["z"] = torch.cat([args["u"], args["z"]], 2).chunk(2, 2)
        args["delta"] = args["delta"].transpose(1, 2).contiguous().transpose(1, 2)
        joined = torch.cat([args["B"].flatten(2), args["C"].flatten(2)], 2)
        args["B"], args["C"] = (m.unflatten(2, (groups, d_state)) for m in joined.chunk(2, 2))
    args = {k: None if k in without or v is None else v.to(device) for k, v in args.items()}
    if shifted:
        for name in ("u", "delta", "z", "B", "C"):
            x = args[name]
            args[name] = x.new_zeros(*x.shape[:-1], x.shape[-1] + 2)[..., 1:-1].copy_(x)
    return args


def check(
    args: dict[str, Tensor | None],
    *,
    launch: ScanLaunch | None,
    lengths: tuple[int, ...] | None = None,
    reverse: bool = False,
    softplus: bool = True,
    final_grad: bool = True,
) -> None:
    """Outputs, final state and every gradient against the reference in fp64 on the same rounded inputs."""
    from ssm_modal.kernels.scan.triton_bwd import selective_scan_bwd
    from ssm_modal.kernels.scan.triton_fwd import selective_scan_fwd

    u = args["u"]
    seqs = None if lengths is None else Sequences.from_lengths(lengths, u.device)
    wide = {k: None if v is None else v.detach().double().requires_grad_() for k, v in args.items()}
    lead = [wide[k] for k in NAMES[:5]]
    rest: dict[str, Any] = {k: wide[k] for k in NAMES[5:]}
    ref_out, ref_final = selective_scan_ref(
        *lead, **rest, delta_softplus=softplus, cu_seqlens=seqs, reverse=reverse, return_final_state=True
    )
    dout = torch.randn_like(ref_out).to(u.dtype)
    dfinal = torch.randn_like(ref_final).float() if final_grad else None
    upstream = [dout.double(), torch.zeros_like(ref_final) if dfinal is None else dfinal.double()]
    given = [k for k in NAMES if wide[k] is not None]
    ref_grads = dict(
        zip(given, torch.autograd.grad([ref_out, ref_final], [wide[k] for k in given], upstream))
    )

    plain = [args[k] for k in NAMES]
    plain.insert(8, softplus)
    before = {k: None if v is None else v.clone() for k, v in args.items()}
    out, final, states = selective_scan_fwd(*plain, seqs, reverse, launch=launch)
    grads = selective_scan_bwd(dout, dfinal, *plain, seqs, reverse, states, launch=launch)

    assert out.dtype == u.dtype
    assert final.dtype == states.dtype == torch.float32
    assert_close(out, ref_out, OUTPUT[u.dtype], "out")
    # The state is kept in fp32 whatever the inputs.
    assert_close(final, ref_final, OUTPUT[torch.float32], "final_state")
    for name, grad in zip(NAMES, grads):
        if args[name] is None:
            assert grad is None, name
            continue
        assert grad.dtype == args[name].dtype, name
        assert grad.is_contiguous(), name
        assert_close(grad, ref_grads[name], GRADIENT[grad.dtype], f"gradient of {name}")
        assert torch.equal(args[name], before[name]), f"{name} was overwritten"


SERIAL = replace(TINY, serial=True)
DIRECT = {
    "chunks, two groups, batch": (
        make,
        (2, 6, 6, 2, 3),
        {},
        {"launch": replace(TINY, block=2, fwd_block=2)},
    ),
    "one pass": (make, (1, 9, 5, 1, 3), {}, {"launch": SERIAL}),
    "one pass, reverse": (make, (1, 9, 5, 1, 2), {}, {"launch": SERIAL, "reverse": True}),
    "reverse, splits": (
        make,
        (1, 7, 9, 1, 5),
        {},
        {"launch": replace(TINY, bwd_splits=2), "reverse": True},
    ),
    "carry in runs": (
        make,
        (1, 21, 3, 1, 2),
        {},
        {"launch": replace(TINY, run_length=2, bwd_steps=4)},
    ),
    "packed, empty sequences": (
        make,
        (1, 11, 5, 1, 3),
        {"lengths": (0, 5, 0, 5, 1, 0)},
        {"launch": TINY, "lengths": (0, 5, 0, 5, 1, 0)},
    ),
    "packed, one pass": (
        make,
        (1, 9, 4, 1, 2),
        {"lengths": (3, 0, 6)},
        {"launch": SERIAL, "lengths": (3, 0, 6)},
    ),
    "packed, reverse, runs": (
        make,
        (1, 15, 3, 1, 2),
        {"lengths": (13, 0, 2)},
        {"launch": replace(TINY, run_length=1), "lengths": (13, 0, 2), "reverse": True},
    ),
    "no optional argument": (
        make,
        (1, 7, 3, 1, 1),
        {"without": ("D", "z", "delta_bias", "initial_state")},
        {"launch": replace(TINY, bwd_steps=4), "final_grad": False, "softplus": False},
    ),
    "bfloat16, strided": (
        make,
        (1, 9, 6, 1, 4),
        {"dtype": torch.bfloat16, "strided": True},
        {"launch": TINY},
    ),
    "shifted": (make, (1, 9, 6, 1, 4), {"shifted": True}, {"launch": TINY}),
    "float16, wide offsets": (
        make,
        (1, 6, 4, 1, 16),
        {"dtype": torch.float16, "without": ("D",)},
        {"launch": TINY},
    ),
}


@pytest.mark.parametrize("name", DIRECT)
def test_matches_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny shapes with forced launches; all branches of the kernels."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter's shapes; the GPU runs its own below")
    if "wide" in name:
        from ssm_modal.kernels.scan import gradient_launch, triton_bwd, triton_fwd

        for module in (triton_fwd, gradient_launch):
            monkeypatch.setattr(module, "wide_offsets", lambda *a: True)
        for module, plan in ((triton_fwd, "_plan"), (triton_bwd, "gradient_plan")):
            monkeypatch.setattr(module, plan, getattr(module, plan).__wrapped__)
    build, shape, options, call = DIRECT[name]
    # A step size is positive; without softplus delta has to be.
    args = build(*shape, **options)
    if not call.get("softplus", True):
        args["delta"] = args["delta"].abs()
    check(args, **call)


@pytest.mark.parametrize("lengths", [None, (0, 0)])
def test_length_zero(lengths: tuple[int, ...] | None) -> None:
    from ssm_modal.kernels.scan.triton_bwd import selective_scan_bwd
    from ssm_modal.kernels.scan.triton_fwd import selective_scan_fwd

    args = make(1 if lengths else 2, 0, 3, 1, 2, lengths=lengths)
    seqs = None if lengths is None else Sequences.from_lengths(lengths)
    plain = [args[k] for k in NAMES]
    plain.insert(8, True)
    out, final, states = selective_scan_fwd(*plain, seqs, False)
    assert out.shape == (1 if lengths else 2, 0, 3)
    assert torch.equal(final, args["initial_state"])
    assert final.data_ptr() != args["initial_state"].data_ptr()
    dfinal = torch.randn_like(final)
    grads = dict(zip(NAMES, selective_scan_bwd(out, dfinal, *plain, seqs, False, states)))
    assert torch.equal(grads["initial_state"], dfinal)
    for name in ("A", "D", "delta_bias"):
        assert torch.equal(grads[name], torch.zeros_like(args[name])), name
    plain[-1] = None
    assert torch.equal(selective_scan_fwd(*plain, seqs, False)[1], torch.zeros(2, 3, 2))


def test_no_channels() -> None:
    from ssm_modal.kernels.scan.triton_fwd import selective_scan_fwd

    args = make(2, 5, 0, 1, 2, without=("initial_state",))
    plain = [args[k] for k in NAMES]
    plain.insert(8, True)
    out, final, _ = selective_scan_fwd(*plain, None, False)
    assert out.shape == (2, 5, 0)
    assert final.shape == (2, 0, 2)


def test_step_sizes_over_the_whole_range(device: torch.device) -> None:
    """dt from 1e-26 to 40 with a relative error below 5e-6: with B = C = u = 1 a step's output is dt."""
    from ssm_modal.kernels.scan.triton_fwd import selective_scan_fwd

    x = torch.linspace(-60.0, 40.0, 64, device=device).reshape(1, 1, 64)
    one = torch.ones(1, 1, 1, 1, device=device)
    ones = torch.ones_like(x)
    A = -torch.ones(64, 1, device=device)
    out, final, _ = selective_scan_fwd(ones, x, A, one, one, None, None, None, True, None, None, False)
    expected = torch.nn.functional.softplus(x.double()).cpu()
    assert expected.min() < 1e-25
    torch.testing.assert_close(out.double().cpu(), expected, rtol=5e-6, atol=0.0)
    torch.testing.assert_close(final.double().cpu().reshape(1, 1, 64), expected, rtol=5e-6, atol=0.0)


def test_boundaries_shape_is_what_the_forward_saves() -> None:
    from ssm_modal.kernels.scan.triton_fwd import selective_scan_fwd

    for lengths in (None, (3, 0, 2)):
        args = make(1, 5, 4, 1, 2, lengths=lengths, without=("z", "D"))
        plain = [args[k] for k in NAMES]
        plain.insert(8, True)
        seqs = None if lengths is None else Sequences.from_lengths(lengths)
        states = selective_scan_fwd(*plain, seqs, False)[2]
        assert states.shape == boundaries_shape(1, 5, 4, 2, 1, lengths)


def test_launch_table() -> None:
    """Every d_state has a row, and the chunk size rests on d_state alone."""
    cpu = torch.device("cpu")
    for d_state in range(1, 257):
        launches = {
            scan_launch(batch, length, 48, groups, d_state, cpu).chunk_size
            for batch, length, groups in ((1, 1, 1), (64, 1024, 3), (1, 1 << 20, 1))
        }
        assert len(launches) == 1
    assert scan_launch(64, 1024, 1024, 1, 16, cpu).serial is False
    assert scan_launch(256, 1024, 1024, 1, 16, cpu).serial is True
    assert scan_launch(1, 64, 8, 1, 16, cpu).serial is True
    lopsided = Sequences.from_lengths((100_000, *([1] * 200)))
    assert scan_launch(1, lopsided.total, 8192, 1, 16, cpu, lopsided).serial is False


GPU = {
    "odd": ((2, 4097, 192, 1, 16), {}, {}),
    "reverse": ((2, 500, 257, 1, 16), {}, {"reverse": True}),
    "bfloat16 groups": ((2, 777, 96, 3, 16), {"dtype": torch.bfloat16}, {}),
    "float16 strided": ((2, 300, 64, 1, 16), {"dtype": torch.float16, "strided": True}, {}),
    "bfloat16 shifted": ((2, 300, 64, 1, 16), {"dtype": torch.bfloat16, "shifted": True}, {}),
    "shifted reverse": ((1, 300, 96, 2, 16), {"shifted": True}, {"reverse": True}),
    "N1": ((2, 333, 70, 1, 1), {}, {}),
    "N8": ((2, 333, 64, 1, 8), {"dtype": torch.bfloat16}, {}),
    "N32": ((1, 300, 64, 1, 32), {"dtype": torch.float16}, {}),
    "N3": ((1, 333, 70, 2, 3), {}, {"reverse": True}),
    "N64": ((1, 600, 64, 1, 64), {}, {}),
    "N100": ((1, 300, 40, 1, 100), {}, {}),
    "N256": ((1, 600, 40, 1, 256), {}, {"reverse": True}),
    "packed": ((1, 1000, 96, 1, 16), {"lengths": (0, 63, 500, 0, 436, 1, 0)}, {}),
    "packed reverse": ((1, 1000, 96, 1, 16), {"lengths": (0, 63, 500, 0, 436, 1, 0)}, {"reverse": True}),
    "group a channel": ((1, 200, 24, 24, 4), {}, {}),
    "one channel": ((3, 200, 1, 1, 16), {}, {}),
    "nothing optional": ((1, 400, 64, 1, 16), {"without": ("D", "z", "delta_bias", "initial_state")}, {}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU)
@pytest.mark.parametrize("serial", [None, True, False])
def test_gpu_matches_reference(name: str, serial: bool | None) -> None:
    """The shipped launches; `serial` forces either way through time."""
    shape, options, call = GPU[name]
    args = make(*shape, **options, device="cuda")
    lengths = options.get("lengths")
    launch = None
    if serial is not None:
        batch, length, d_inner, groups, d_state = shape
        seqs = None if lengths is None else Sequences.from_lengths(lengths)
        device = torch.device("cuda")
        launch = replace(scan_launch(batch, length, d_inner, groups, d_state, device, seqs), serial=serial)
    check(args, launch=launch, lengths=lengths, **call)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["odd", "bfloat16 groups", "N3", "N64", "N256", "packed reverse"])
def test_gpu_sums_in_any_order(name: str) -> None:
    """dB and dC where all programs add to one buffer, which torch's deterministic algorithms rule out."""
    shape, options, call = GPU[name]
    torch.use_deterministic_algorithms(False)
    check(make(*shape, **options, device="cuda"), launch=None, lengths=options.get("lengths"), **call)


@pytest.mark.gpu
def test_gpu_carry_in_runs() -> None:
    args = make(2, 3001, 32, 1, 4, device="cuda")
    launch = scan_launch(2, 3001, 32, 1, 4, torch.device("cuda"))
    check(args, launch=replace(launch, serial=False, run_length=4))


@pytest.mark.gpu
def test_gpu_is_deterministic() -> None:
    from ssm_modal.kernels.scan.triton_bwd import selective_scan_bwd
    from ssm_modal.kernels.scan.triton_fwd import selective_scan_fwd

    args = make(2, 1500, 512, 1, 16, dtype=torch.bfloat16, device="cuda")
    plain = [args[k] for k in NAMES]
    plain.insert(8, True)
    runs = []
    for _ in range(3):
        out, final, states = selective_scan_fwd(*plain, None, False)
        runs.append((out, final, *selective_scan_bwd(out, final, *plain, None, False, states)))
    for other in runs[1:]:
        for a, b in zip(runs[0], other):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_offsets_beyond_32_bits() -> None:
    """1 x 1,048,576 x 4,096 = 2^32 elements: the last channels, against the same channels alone."""
    from ssm_modal.kernels.scan.triton_bwd import selective_scan_bwd
    from ssm_modal.kernels.scan.triton_fwd import selective_scan_fwd

    if torch.cuda.get_device_properties(0).total_memory < 100 * 2**30:
        pytest.skip("needs 100 GiB of GPU memory")
    torch.use_deterministic_algorithms(False)
    length, d_inner, n, tail = 1 << 20, 4096, 2, 32
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    u, delta, dout = (torch.randn(1, length, d_inner, **kind) for _ in range(3))
    B, C = (torch.randn(1, length, 1, n, **kind) for _ in range(2))
    A = -torch.rand(d_inner, n, device="cuda")
    full = (u, delta, A, B, C, None, None, None, True, None, None, False)
    out, final, states = selective_scan_fwd(*full)
    grads = selective_scan_bwd(dout, None, *full, states)
    part = (
        u[..., -tail:].contiguous(), delta[..., -tail:].contiguous(), A[-tail:].contiguous(), *full[3:]
    )  # fmt: skip
    part_out, part_final, part_states = selective_scan_fwd(*part)
    part_grads = selective_scan_bwd(dout[..., -tail:].contiguous(), None, *part, part_states)
    assert_close(out[:, -5000:, -tail:], part_out[:, -5000:], 1e-3, "out")
    assert_close(final[:, -tail:], part_final, 1e-5, "final_state")
    for i, name in ((0, "u"), (1, "delta")):
        assert_close(grads[i][:, -5000:, -tail:], part_grads[i][:, -5000:], 1e-3, f"gradient of {name}")
        assert_close(grads[i][:, :5000, -tail:], part_grads[i][:, :5000], 1e-3, f"gradient of {name}")
    assert_close(grads[2][-tail:], part_grads[2], 1e-3, "gradient of A")
    # The narrow run against the reference: the last steps, from the state that a shorter run leaves.
    cut = length - 64
    head = tuple(x[:, :cut] if i in (0, 1, 3, 4) else x for i, x in enumerate(part))
    entering = selective_scan_fwd(*head)[1]
    lead = [x[:, cut:].double() if i in (0, 1, 3, 4) else x.double() for i, x in enumerate(part[:5])]
    ref = selective_scan_ref(*lead, delta_softplus=True, initial_state=entering.double())
    assert_close(part_out[:, cut:], ref, OUTPUT[torch.bfloat16], "last steps")
