"""The peers: imported where they are installed, brought to our arguments, `Unavailable` elsewhere.

Their layouts differ from ours; what they are handed is laid out as they want it beforehand, so that no
turning is timed. None of their figures stands anywhere but behind a run of theirs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Unavailable
from benchmarks.inputs import ScanInputs

MAMBA_SSM = "mamba_ssm"
MAMBAPY = "mambapy"
TRANSFORMERS = "transformers"
CAUSAL_CONV1D = "causal_conv1d"
SDPA = "torch SDPA alone, 16 heads"

_MEND = {
    "mamba_ssm": "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm --no-build-isolation builds its kernels",
    "causal_conv1d": "pip install causal-conv1d --no-build-isolation",
    "mambapy": "pip install mambapy",
    "transformers": "pip install transformers",
}


def peer(module: str, name: str) -> Any:
    """`name` of a peer's `module`; Unavailable, saying why, where it cannot be had."""
    package = module.split(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a package built for another torch may raise anything
        mend = _MEND.get(package)
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise Unavailable(f"{package} is not installed ({mend})") from error
        if isinstance(error, AttributeError) and error.name == name:
            raise Unavailable(f"{package}'s {module} has no {name}; another version of it had") from error
        raise Unavailable(f"{package} does not import: {type(error).__name__}: {error}") from error


def offer(notes: list[str], name: str, make: Callable[[], Any]) -> list[Any]:
    """What `make` makes, as a list of one; where the peer is missing none, and a note that says why."""
    try:
        return [make()]
    except Unavailable as why:
        notes.append(f"{name} left out: {why}")
    except torch.OutOfMemoryError:
        notes.append(f"{name} left out: its inputs do not fit in memory beside ours")
    return []


def mambapy_scan(given: Sequence[Tensor]) -> Tensor:
    """MambaBlock.selective_scan of mambapy on our names, with the step size and the gate around it."""
    pscan = peer("mambapy.pscan", "pscan")
    u, delta, A, B, C, D, z, bias = given
    dt = F.softplus(delta + bias)
    decay = torch.exp(dt.unsqueeze(-1) * A)
    added = (dt.unsqueeze(-1) * B.unsqueeze(2)) * u.unsqueeze(-1)
    h = pscan(decay, added)
    y = (h @ C.to(h.dtype).unsqueeze(-1)).squeeze(3)
    return ((y + D * u) * F.silu(z)).to(u.dtype)


class MambaSsmScan:
    """mamba_ssm's selective_scan_fn on `x`, turned to its layout: (batch, d_inner, length)."""

    def __init__(self, x: ScanInputs) -> None:
        self.function = peer("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
        if x.u.device.type != "cuda":
            raise Unavailable("mamba_ssm's scan runs on NVIDIA GPUs only")
        self.given = tuple(
            t.detach().transpose(1, 2).contiguous().requires_grad_()
            if t.ndim == 3
            else t.detach().requires_grad_()
            for t in x.given
        )
        self.dout = x.dout.transpose(1, 2).contiguous()

    def forward(self) -> Tensor:
        u, delta, A, B, C, D, z, bias = self.given
        return self.function(u, delta, A, B, C, D, z, bias, True)

    def train(self) -> tuple[Tensor, ...]:
        out = self.forward()
        return (out.detach(), *torch.autograd.grad(out, self.given, self.dout))

    def holds(self) -> tuple[Tensor, ...]:
        return (*self.given, self.dout)


def turned(result: object) -> object:
    """Results of (batch, channels, length) as (batch, length, channels)."""
    if isinstance(result, Tensor):
        return result.transpose(1, 2) if result.ndim == 3 else result
    return tuple(turned(t) for t in result)  # type: ignore[attr-defined]


def load_block(block: nn.Module, ours: nn.Module) -> nn.Module:
    """Copy the weights of our Mamba layer into a peer's, parameter by parameter."""
    _copy(block, dict(ours.named_parameters()), _block_name)
    return block


def load_model(model: nn.Module, ours: nn.Module) -> nn.Module:
    """Copy the weights of our causal language model into a peer's."""
    _copy(model, dict(ours.named_parameters()), _model_name)
    return model


def _block_name(name: str) -> str:
    return name.replace("dt_proj.bias", "dt_bias")


def _model_name(name: str) -> str:
    if name.endswith(("embedding.weight", "embeddings.weight", "lm_head.weight")):
        return "embedding.weight"
    name = _block_name(name).removeprefix("mamba.")
    name = name.replace("norm_f.", "norm.")
    return name if name.startswith("backbone.") else f"backbone.{name}"


@torch.no_grad()
def _copy(into: nn.Module, source: dict[str, nn.Parameter], rename: Callable[[str], str]) -> None:
    for name, parameter in into.named_parameters():
        ours = source.get(rename(name))
        if ours is None or ours.shape != parameter.shape:
            raise Unavailable(
                f"its parameter {name} {tuple(parameter.shape)} has no counterpart of ours"
                + ("" if ours is None else f": {rename(name)} is {tuple(ours.shape)}")
            )
        # A, D and the bias of dt stay wide: they are not what a narrow model rounds.
        parameter.data = ours.detach().to(parameter.device, copy=True)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (batch, heads, length, head width), by flash attention on CUDA."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
