"""Launches that are repeated past Triton are those that Triton would have made."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.launch_calls import calls, from_scratch, tensors
from tests.kernels.test_aot import run_without_interpreter

pytest.importorskip("triton")

import triton
from triton import knobs

from ssm_modal.kernels import launching
from ssm_modal.kernels.launching import MOST, Launcher

STREAM = 77


class Kernel:
    """Stands for what `triton.jit` returns: notes the ordinary launches, each served by a new binary."""

    arg_names = ("x_ptr", "y_ptr", "n", "step", "LAST", "FIRST")

    def __init__(self) -> None:
        self.ordinary: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []
        self.pre_run_hooks: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            self.ordinary.append((grid, args, constants))
            number = len(self.ordinary)
            return SimpleNamespace(
                run=lambda *given: self.direct.append(given),
                function=number,
                packed_metadata=("packed", number),
            )

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launching, "repeatable", lambda kernel, compiled: True)
    monkeypatch.setattr(launching, "DIRECT", True)
    driver = SimpleNamespace(get_current_stream=lambda device: STREAM)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return Kernel()


CONSTANTS = {"FIRST": 1, "LAST": "two", "num_warps": 4}


def test_repeated_as_it_was(kernel: Kernel) -> None:
    launch = Launcher(kernel, CONSTANTS)
    x, y = torch.zeros(8), torch.zeros(8, dtype=torch.float16)
    launch((3,), (x, None), (5, 0.5))
    assert kernel.ordinary == [((3,), (x, None, 5, 0.5), CONSTANTS)]
    again = torch.zeros(8)
    launch((9, 2), (again, None), (5, 0.5))
    # Constants in the kernel's order; no hooks; launch options are in the binary.
    packed = ("packed", 1)
    programs, rest = (9, 2, 1), (5, 0.5, "two", 1)
    assert kernel.direct == [(*programs, STREAM, 1, packed, None, None, None, again.data_ptr(), None, *rest)]
    launch((3,), (x, y), (5, 0.5))
    assert len(kernel.ordinary) == 2
    launch((1, 1, 4), (x, y), (5, 0.5))
    assert kernel.direct[1][:6] == (1, 1, 4, STREAM, 2, ("packed", 2))
    assert len(kernel.ordinary) == 2


def test_whatever_may_change_the_binary_is_found_out_again(kernel: Kernel) -> None:
    launch = Launcher(kernel, CONSTANTS)
    room = torch.zeros(40)
    assert room.data_ptr() % 16 == 0
    x, shifted = room[:8], room[1:9]
    variants: list[tuple[tuple[Tensor | None, ...], tuple[float, ...]]] = [
        ((x, x), (16, 0.5)),
        ((x, x), (17, 0.5)),
        ((x, x), (1, 0.5)),
        ((x, x), (2**31, 0.5)),
        ((shifted, x), (16, 0.5)),
        ((x, shifted), (16, 0.5)),
        ((shifted, shifted), (16, 0.5)),
        ((x.half(), x), (16, 0.5)),
        ((x, None), (16, 0.5)),
    ]
    for number, (pointers, numbers) in enumerate(variants, 1):
        launch((1,), pointers, numbers)
        assert len(kernel.ordinary) == number, numbers
    for number, (pointers, numbers) in enumerate(variants, 1):
        launch((1,), pointers, numbers)
        assert kernel.direct[-1][4] == number
    assert len(kernel.ordinary) == len(variants)
    # Another kernel, or the same with other constants, is another launcher.
    Launcher(kernel, CONSTANTS | {"FIRST": 2})((1,), (x, x), (16, 0.5))
    assert len(kernel.ordinary) == len(variants) + 1


def test_hooks_see_every_launch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launcher(kernel, CONSTANTS)
    x = torch.zeros(8)

    def both() -> tuple[int, int]:
        launch((1,), (x, None), (5, 0.5))
        return len(kernel.ordinary), len(kernel.direct)

    assert both() == (1, 0)
    assert both() == (1, 1)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        before = len(kernel.ordinary)
        with monkeypatch.context() as patch:
            chain = type(getattr(knobs.runtime, name))()
            patch.setattr(knobs.runtime, name, chain)
            assert both()[0] == before
            chain.add(print)
            assert both()[0] == before + 1
            patch.setattr(knobs.runtime, name, print)
            assert both()[0] == before + 2
            patch.setattr(knobs.runtime, name, None)
            assert both()[0] == before + 2
    before = len(kernel.ordinary)
    kernel.pre_run_hooks.append(print)
    assert both()[0] == before + 1
    kernel.pre_run_hooks.clear()
    monkeypatch.setattr(launching, "DIRECT", False)
    assert both()[0] == before + 2


def test_what_is_kept_is_bounded(kernel: Kernel) -> None:
    launch = Launcher(kernel, CONSTANTS)
    x = torch.zeros(8)
    for n in range(MOST):
        launch((1,), (x, None), (n, 0.5))
    launch((1,), (x, None), (0, 0.5))
    assert len(kernel.ordinary) == MOST
    launch((1,), (x, None), (MOST, 0.5))
    launch((1,), (x, None), (0, 0.5))
    assert len(kernel.ordinary) == MOST + 2


def test_nothing_is_repeated_where_launches_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels, compiled ones that are no such, and other versions of Triton."""
    kernel = Kernel()
    assert not launching.repeatable(kernel, None)
    monkeypatch.setattr(triton, "__version__", "99.0.1")
    launch = Launcher(kernel, CONSTANTS)
    for _ in range(3):
        launch((1,), (torch.zeros(8), None), (5, 0.5))
    assert (len(kernel.ordinary), len(kernel.direct)) == (3, 0)


TRITON_ITSELF = """
import json
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from types import SimpleNamespace
from ssm_modal.kernels import launching
from tests.kernels.launch_calls import calls, from_scratch

# Triton as far as the choice of a binary, which is none: only its key.
triton.runtime.driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda device: 77,
    get_current_target=lambda: GPUTarget("cuda", 90, 32)))

launched = []
names = {}

def compiled(self, key, signature, device, constexprs, options, attrs, warmup):
    # A number for each choice of Triton's: the kernel and its whole key.
    number = names.setdefault((self.fn.__name__, key), len(names))
    def run(x, y, z, stream, function, packed, metadata, enter, leave, *args):
        given = []
        for a, t in zip(args, signature.values()):
            if isinstance(t, str) and t.startswith("*"):
                address = a.data_ptr() if isinstance(a, torch.Tensor) else a
                # What a call makes lies elsewhere each time.
                given.append(known.get(address, ("made", address % 16)))
            else:
                given.append(a)
        assert len(args) == len(signature)
        launched.append((number, x, y, z, stream, function, packed, given))
    kernel = SimpleNamespace(
        run=run, function=number, packed_metadata=number, launch_metadata=lambda *a: None)
    self.device_caches[device][0][key] = kernel
    return kernel

JITFunction._do_compile = compiled

# Which pointers of a scan kernel are copied in pieces, and which brought in 16 bytes at a time.
COPIED = {"chunk_state_kernel": (0, 1), "output_kernel": (0, 1, 6), "chunk_grad_kernel": (0, 1, 2),
    "grad_kernel": (0, 1, 2, 7)}
BROUGHT = {"chunk_state_kernel": (3,), "output_kernel": (3, 4), "chunk_grad_kernel": (4,),
    "grad_kernel": (4, 5)}
ways = set()

def check_alignment(launcher, pointers):
    name, constants = launcher.kernel.fn.__name__, launcher.constants
    if name in COPIED:
        piece = constants["ROW_PIECE"] * constants["ROW_BYTES"]
        for which, size, on in ((COPIED, piece, "ROW_READ"), (BROUGHT, 16, "BRING")):
            ways.add((name, on, constants[on] is None))
            rows = [pointers[i] for i in which[name] if pointers[i] is not None]
            if constants[on] is not None:
                assert not any(x.data_ptr() % size for x in rows), (name, on)

launch = launching.Launcher.__call__
def checked(self, grid, pointers, numbers):
    check_alignment(self, pointers)
    launch(self, grid, pointers, numbers)
launching.Launcher.__call__ = checked
launching.repeatable = lambda kernel, compiled: True
ordinary = []
whole = launching.Launcher._ordinary
launching.Launcher._ordinary = lambda *a: ordinary.append(1) or whole(*a)

different, direct = [], 0
every = list(calls(torch.device("cpu")))
# The second round finds everything kept, whatever came between.
for turn in range(2):
    for name, inputs, call in every:
        known = {t.data_ptr(): i for i, t in enumerate(inputs) if t is not None}
        launched.clear()
        with from_scratch():
            call()
        expected = list(launched)
        launched.clear()
        ordinary.clear()
        call()
        if launched != expected:
            different.append(name)
        if turn:
            assert not ordinary, name
            direct += len(launched)
assert len(ways) == 16, ways
print(json.dumps([len(names), direct, len(every), different]))
"""


def test_triton_would_choose_the_same() -> None:
    """Triton's own choice of a binary and what it hands over, for every kernel over all that matters."""
    done = run_without_interpreter(TRITON_ITSELF, 200)
    assert done.returncode == 0, done.stderr
    binaries, direct, count, different = json.loads(done.stdout.splitlines()[-1])
    assert different == []
    assert binaries > 100
    assert direct > count


@pytest.mark.gpu
def test_gpu_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary launches and repeated ones, to the bit: sizes of 1, odd ones, aligned and not."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        every = list(calls(torch.device("cuda"), few=True))
        for turn in range(2):
            for name, _, call in every:
                with from_scratch():
                    expected = tensors(call())
                with monkeypatch.context() as patch:
                    if turn:
                        patch.setattr(Launcher, "_ordinary", None)
                    found = tensors(call())
                for a, b in zip(found, expected, strict=True):
                    assert torch.equal(a.nan_to_num(), b.nan_to_num()), (name, turn)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_gpu_launches_are_known() -> None:
    """This Triton's launches are repeated on this GPU, in the current stream."""
    from ssm_modal.kernels.norm.triton_fwd import _launcher, rms_norm_fwd

    _launcher.cache_clear()
    x = torch.randn(4, 64, device="cuda")
    expected = rms_norm_fwd(x, None, None, None, 1e-5, False, False, None)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launcher, "_ordinary", None)
        with torch.cuda.stream(side):
            # Long work in this stream alone, so that a launch in another would read too early.
            y = torch.zeros_like(x)
            torch.cuda._sleep(20_000_000)
            y.copy_(x)
            found = rms_norm_fwd(y, None, None, None, 1e-5, False, False, None)[0]
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
