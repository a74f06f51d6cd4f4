"""Which backend serves a call: decided here and nowhere else, askable (`explain`) and overridable.

A backend is one of "triton", "cpu" (compiled C) and "torch" (chunked, pure torch, runs everywhere). An op
asks `resolve(op, device, dtype, backend)` once a call. An argument `backend=` wins over `use_backend(...)`,
which wins over the environment variable `SSM_MODAL_BACKEND`, which wins over the default order: triton on
CUDA, then cpu on the CPU, then torch.
"""

from __future__ import annotations

import contextvars
import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

BACKENDS = ("triton", "cpu", "torch")

# The backends each op has. "torch" serves every op.
SUPPORT: dict[str, tuple[str, ...]] = {
    "selective_scan": ("triton", "cpu", "torch"),
    "lti_scan": ("torch",),
    "causal_conv1d": ("triton", "cpu", "torch"),
    "rms_norm": ("triton", "torch"),
    "cross_entropy": ("triton", "torch"),
    "selective_scan_step": ("triton", "torch"),
    "causal_conv1d_step": ("triton", "torch"),
}

# Backends that record no gradients, and so serve only where none are recorded.
WITHOUT_GRADIENTS = {("selective_scan_step", "triton"), ("causal_conv1d_step", "triton")}


class BackendError(RuntimeError):
    """A backend was asked for that cannot serve the call."""


@dataclass(frozen=True)
class Choice:
    """The backend that serves a call, and why it is that one."""

    backend: str
    reason: str


_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("ssm_modal_backend", default=None)


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Ask for `backend` in every op called inside the block; None restores the default choice."""
    if backend is not None:
        _check_name(backend)
    token = _override.set(backend)
    try:
        yield
    finally:
        _override.reset(token)


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}, or None to choose")


@functools.cache
def triton_installed() -> bool:
    """Whether the triton package is importable."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve `op` on `device` with `dtype`, or None where it can."""
    if backend not in SUPPORT[op]:
        return f"{op} has no {backend} form (it has {', '.join(SUPPORT[op])})"
    if backend == "torch":
        return None
    if backend == "triton":
        if not triton_installed():
            return "triton is not installed (pip install triton; Linux only)"
        if dtype == torch.float64:
            return "the Triton kernels take fp32, bf16 and fp16; fp64 runs on backend 'torch'"
        if device.type == "cpu" and not interpreting():
            return "CPU tensors run on Triton only under TRITON_INTERPRET=1"
        if device.type not in ("cpu", "cuda"):
            return f"the Triton kernels serve CUDA tensors, these are on {device.type}"
        if device.type == "cuda" and interpreting():
            return "TRITON_INTERPRET=1 is set, so CUDA tensors cannot run compiled kernels; unset it"
        if device.type == "cuda" and torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(device)
            if (major, minor) >= (8, 0):
                return None
            return f"the Triton kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}"
        return None
    if device.type != "cpu":
        return f"the compiled CPU kernels serve CPU tensors, these are on {device.type}"
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        return f"the compiled CPU kernels take fp32, got {name}; {name} runs on backend 'torch' on the CPU"
    from ssm_modal.kernels.cpu.loader import why_unavailable

    return why_unavailable()


def explain(
    op: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    gradients: bool = False,
) -> Choice:
    """Which backend would serve `op` on `device` with `dtype`, and why; `gradients`: if they are recorded.

    Raises ValueError for an unknown op or backend name and BackendError for a backend that cannot serve.
    """
    if op not in SUPPORT:
        raise ValueError(f"op is {op!r}, expected one of {', '.join(SUPPORT)}")
    return _explain(op, torch.device(device), dtype, *_asked(backend), gradients)


def _explain(
    op: str, device: torch.device, dtype: torch.dtype, asked: str | None, source: str, gradients: bool
) -> Choice:
    if asked is not None:
        _check_name(asked)
        reason = _no_gradients(op, asked, gradients) or why_not(op, asked, device, dtype)
        if reason is not None:
            raise BackendError(f"{op}: backend {asked!r} ({source}) cannot serve: {reason}")
        return Choice(asked, f"asked for by {source}")
    refused: list[str] = []
    for candidate in SUPPORT[op]:
        # Interpreted Triton is for tests; it never serves a call that did not ask for it.
        reason = (
            "interpreted Triton serves only when asked for"
            if candidate == "triton" and device.type == "cpu" and interpreting()
            else _no_gradients(op, candidate, gradients) or why_not(op, candidate, device, dtype)
        )
        if reason is None:
            return Choice(candidate, "; ".join(refused) or f"first choice on {device.type}")
        refused.append(f"not {candidate}: {reason}")
    raise AssertionError("unreachable: backend 'torch' serves every op")


def _no_gradients(op: str, backend: str, gradients: bool) -> str | None:
    if gradients and (op, backend) in WITHOUT_GRADIENTS:
        return f"gradients are recorded, which the {backend} form of {op} does not do; backend 'torch' does"
    return None


def resolve(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None = None,
    gradients: bool = False,
) -> str:
    """The name of the backend alone. Under torch.compile it is settled while the graph is traced."""
    if device.type != "cuda":
        return explain(op, device=device, dtype=dtype, backend=backend, gradients=gradients).backend
    # On a GPU the answer hangs on nothing but these, and a call has no microseconds to lose.
    asked, source = _asked(backend)
    return _on_cuda(op, device, dtype, asked, source, gradients, interpreting())


@functools.lru_cache(maxsize=1024)
def _on_cuda(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    asked: str | None,
    source: str,
    gradients: bool,
    interpreted: bool,
) -> str:
    return _explain(op, device, dtype, asked, source, gradients).backend


# What `torch.compiler.assume_constant_result` does, without its import of torch._dynamo: dynamo calls the
# function instead of tracing it, for it reads the environment and may compile the CPU kernels.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _asked(backend: str | None) -> tuple[str | None, str]:
    if backend is not None:
        return backend, "the argument backend"
    override = _override.get()
    if override is not None:
        return override, "use_backend"
    env = os.environ.get("SSM_MODAL_BACKEND")
    return (env or None), "the environment variable SSM_MODAL_BACKEND"
