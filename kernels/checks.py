"""Argument checks shared by every op: each error names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_STATE = 256
"""The largest d_state of a scan."""


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype states and parameters are kept in: fp64 beside fp64 inputs, fp32 beside every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def complex_dtype(dtype: torch.dtype) -> torch.dtype:
    """As `state_dtype`, for complex states."""
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def dtype_name(dtype: torch.dtype) -> str:
    """As users write it, without "torch."."""
    return str(dtype).removeprefix("torch.")


PLAIN = (Tensor, torch.nn.Parameter)


def signature(tensors: Sequence[object]) -> tuple[object, ...] | None:
    """All that the checks of an op look at in `tensors`: shapes, dtypes and devices, None for None.

    None where the checks must look themselves: something that is no plain tensor is among them, or a call is
    being traced.
    """
    if torch.compiler.is_compiling():
        return None
    seen: list[object] = []
    for t in tensors:
        if t is None:
            seen.append(None)
        elif type(t) in PLAIN:
            assert isinstance(t, Tensor)
            seen += (t.shape, t.dtype, t.device)
        else:
            return None
    return tuple(seen)


class Passed:
    """Signatures of calls whose arguments passed every check: they pass again, unchecked.

    Checking takes longer than a short scan. A new signature is checked and not kept once there are `MOST`.
    """

    MOST = 4096

    def __init__(self) -> None:
        self._seen: set[tuple[object, ...]] = set()

    def __contains__(self, seen: tuple[object, ...] | None) -> bool:
        return seen is not None and seen in self._seen

    def add(self, seen: tuple[object, ...] | None) -> None:
        """Note that a call with signature `seen` passed; None stands for a call that is always checked."""
        if seen is not None and len(self._seen) < self.MOST:
            self._seen.add(seen)


def check_tensor(op: str, name: str, value: object) -> Tensor:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    return value


def check_classes(where: str, labels: Tensor, n_classes: int, also: str = "") -> None:
    """Raise ValueError where int64 `labels` on the CPU hold what is no class; elsewhere the device asserts.

    where: how the message names them. also: what else may stand there, for the message.
    """
    if labels.device.type != "cpu" or not labels.numel():
        return
    low, high = (int(n) for n in torch.aminmax(labels))
    if low < 0 or high >= n_classes:
        wrong = high if high >= n_classes else low
        raise ValueError(f"{where} holds {wrong}, expected 0 to {n_classes - 1}{also}")


def check_shape(op: str, name: str, value: object, expected: Sequence[int | str], meaning: str) -> Tensor:
    """Raise unless `value` is a tensor of shape `expected`; a string in `expected` names a free axis.

    `meaning` says the axes in words, e.g. "(batch, length, d_inner)".
    """
    tensor = check_tensor(op, name, value)
    shape = tensor.shape
    if len(shape) == len(expected):
        # A plain loop: this runs for every argument of every call.
        for got, want in zip(shape, expected):
            if not isinstance(want, str) and got != want:
                break
        else:
            return tensor
    want = "(" + ", ".join(str(e) for e in expected) + ("," if len(expected) == 1 else "") + ")"
    that = "" if meaning == want else f", that is {meaning}"
    raise ValueError(f"{op}: {name} has shape {tuple(shape)}, expected {want}{that}")


def check_dtype(op: str, name: str, value: Tensor, allowed: Sequence[torch.dtype], why: str = "") -> None:
    """Raise TypeError unless `value.dtype` is one of `allowed`."""
    if value.dtype not in allowed:
        names, got = ", ".join(map(dtype_name, allowed)), dtype_name(value.dtype)
        raise TypeError(f"{op}: {name} has dtype {got}, expected {names}{' (' + why + ')' if why else ''}")


def check_device(op: str, name: str, value: Tensor, device: torch.device, beside: str) -> None:
    """Raise ValueError unless `value` is on `device`."""
    if value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, but {beside} is on {device}; move one of them")


def check_same(op: str, tensors: dict[str, Tensor | None], reference: str, lead: Tensor) -> None:
    """Raise unless every given tensor shares dtype and device with `lead`, named `reference`."""
    device, dtype = lead.device, lead.dtype
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(op, name, tensor)
        if tensor.device != device:
            check_device(op, name, tensor, device, reference)
        if tensor.dtype != dtype:
            check_dtype(op, name, tensor, (dtype,), f"the dtype of {reference}")


def check_wide(op: str, tensors: dict[str, Tensor | None], reference: str, lead: Tensor) -> None:
    """Raise unless every given tensor is on the device of `lead`, named `reference`, in its `state_dtype`."""
    device, wide = lead.device, state_dtype(lead.dtype)
    for name, tensor in tensors.items():
        if tensor is not None:
            check_device(op, name, tensor, device, reference)
            if tensor.dtype != wide:
                check_dtype(op, name, tensor, (wide,), f"with {reference} in {dtype_name(lead.dtype)}")


def check_flags(op: str, **flags: object) -> None:
    """Raise TypeError unless every flag is True or False: a string such as "no" would count as true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} is {value!r}, expected True or False")


def check_d_state(op: str, A: Tensor) -> int:
    """The d_state of A (d_inner, d_state); raises ValueError unless it is 1 to 256."""
    d_state = A.shape[1]
    if not 1 <= d_state <= MAX_STATE:
        raise ValueError(f"{op}: A has d_state {d_state}, expected 1 to {MAX_STATE}")
    return d_state


def recording(tensors: Iterable[Tensor | None]) -> bool:
    """Whether gradients are recorded and any of `tensors` requires one."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def check_no_gradient(op: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise RuntimeError where gradients are recorded and any of `tensors` requires one; `op` ends in "_"."""
    if recording(tensors):
        raise RuntimeError(
            f"{op} works in place and records no gradients; call it under torch.no_grad(), or "
            f"{op.removesuffix('_')}"
        )
