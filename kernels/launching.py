"""Triton launches at the price of the launch: what Triton found out once about a call is kept for the next.

`kernel[grid](*args, **constants)` finds out at every call which binary serves it: it binds and classifies
each argument, makes a key of them all, compares the globals that the kernel reads, and asks the driver about
each pointer. That is 40 to 100 microseconds of Python, more than many a kernel takes. A `Launcher` does the
same by the ordinary way once, and keeps the compiled kernel that Triton chose under all that the choice can
depend on: the device, the numbers themselves, of each pointer its dtype and whether it is a multiple of 16,
and the constants, which are the launcher's own. No rule of Triton's is repeated here: the key is finer than
Triton's, so a call that finds its key would have been served by that very kernel.

The ordinary way serves every call where something wants to see it (Triton's launch hooks, a kernel's hooks),
in the interpreter, on other makes of GPU, with versions of Triton not named in `KNOWN`, and everywhere under
`SSM_MODAL_NO_DIRECT_LAUNCH=1`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

# Versions whose `CompiledKernel.run` takes (grid 0, grid 1, grid 2, stream, function, packed metadata, launch
# metadata, enter hook, exit hook, *every argument in the kernel's order), pointers as tensors or integers.
KNOWN = ("3.5", "3.6")

# Whether launches are repeated.
DIRECT = os.environ.get("SSM_MODAL_NO_DIRECT_LAUNCH", "0").lower() not in ("1", "true", "on", "yes")

# Launches kept by one launcher; then it forgets them all. Sizes that change with every call fill it.
MOST = 1024


class Made(NamedTuple):
    """A launch that was made: what its repetition hands over."""

    compiled: Any
    """What Triton chose; kept, for `function` is a handle of its own."""
    run: Callable[..., None]
    function: Any
    packed_metadata: Any
    stream: Callable[[int], int]
    """The current stream of a device."""
    rest: tuple[object, ...]
    """The arguments behind the pointers."""


class Launcher:
    """A Triton kernel with its constants; called, it launches.

    kernel: as `triton.jit` returned it; its parameters are pointers, then numbers, then constants.
    constants: every `tl.constexpr` by name, and launch options such as num_warps.
    """

    def __init__(self, kernel: Any, constants: Mapping[str, object]) -> None:
        self.kernel = kernel
        self.constants = dict(constants)
        self._made: dict[tuple[object, ...], Made] = {}

    def __call__(
        self, grid: tuple[int, ...], pointers: Sequence[Tensor | None], numbers: tuple[int | float, ...]
    ) -> None:
        """Launch on the device of the first pointer, in its current stream.

        grid: one to three numbers of programs. pointers: tensors on one device, None for none; the first is
        one. numbers: the kernel's other arguments.
        """
        first = pointers[0]
        assert first is not None
        device = first.get_device()
        if device >= 0 and device != torch.cuda.current_device():
            # Triton launches on the current device, not on the one that holds the arguments.
            with torch.cuda.device(device):
                self(grid, pointers, numbers)
            return
        low = 0
        addresses: list[int | None] = []
        key: list[object] = [device, knobs.runtime.debug, numbers]
        for t in pointers:
            if t is None:
                addresses.append(None)
                key.append(None)
            else:
                address = t.data_ptr()
                low |= address
                addresses.append(address)
                key.append(t.dtype)
        if low & 15:
            key.append(tuple(a is None or a % 16 == 0 for a in addresses))
        whole = tuple(key)
        made = self._made.get(whole)
        if made is None or not DIRECT or _watched() or self.kernel.pre_run_hooks:
            self._ordinary(grid, pointers, numbers, whole)
            return
        _, run, function, packed, stream, rest = made
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, stream(device), function, packed, None, None, None, *addresses, *rest)

    def _ordinary(
        self,
        grid: tuple[int, ...],
        pointers: Sequence[Tensor | None],
        numbers: tuple[int | float, ...],
        key: tuple[object, ...],
    ) -> None:
        compiled = self.kernel[grid](*pointers, *numbers, **self.constants)
        if not (DIRECT and repeatable(self.kernel, compiled)):
            return
        if len(self._made) >= MOST:
            self._made.clear()
        names = self.kernel.arg_names[len(pointers) + len(numbers) :]
        rest = (*numbers, *(self.constants[name] for name in names))
        stream = triton.runtime.driver.active.get_current_stream
        self._made[key] = Made(
            compiled, compiled.run, compiled.function, compiled.packed_metadata, stream, rest
        )


def repeatable(kernel: Any, compiled: Any) -> bool:
    """Whether a launch that gave `compiled` may be repeated without asking Triton again."""
    if torch.version.hip is not None or triton.__version__.rpartition(".")[0] not in KNOWN:
        return False
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    return (
        type(kernel) is JITFunction
        and type(compiled) is CompiledKernel
        and type(compiled.run) is CudaLauncher
    )


def _watched() -> bool:
    """Whether a profiler wants to be told of launches."""
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        # A chain of hooks stands there from the start, without any.
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False
