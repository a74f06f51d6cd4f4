"""Weights in 8 or 4 bits, by bitsandbytes: linear layers and stacked experts that multiply with them.

4 bits are NF4 (QLoRA, arXiv 2305.14314, section 3), 8 bits evenly spaced, both scaled by the largest absolute
value of a block along each row. Only weights are quantised: activations keep their dtype.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_modal.layers.moe import Experts
from ssm_modal.layers.wide import WideParameters

Quantisation = Literal["int8", "int4"]
QUANTISATIONS: tuple[Quantisation, ...] = get_args(Quantisation)
BLOCKSIZES = {"int8": (256, 128, 64), "int4": (64,)}
# What makes dt, B and C decides what the state keeps, and is 4 % of a Mamba layer: it stays as it is.
KEPT = ("x_proj", "dt_proj")


class PackedWeight(WideParameters):
    """A weight (..., d_out, d_in), d_in a multiple of 64, in few bits.

    packed: (..., d_out, d_in) uint8, or d_in / 2 with two numbers a byte; absmax: (..., d_out, d_in / block)
    fp32. dtype: what the dense weight was in.
    """

    wide_parameters = ("absmax",)

    def __init__(
        self, kind: Quantisation, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.kind, self.shape, self.dtype = kind, tuple(shape), dtype
        self.block = next(size for size in BLOCKSIZES[kind] if shape[-1] % size == 0)
        width = shape[-1] // 2 if kind == "int4" else shape[-1]
        packed = torch.empty(*shape[:-1], width, dtype=torch.uint8, device=device)
        absmax = torch.empty(*shape[:-1], shape[-1] // self.block, dtype=torch.float32, device=device)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @torch.no_grad()
    def put(self, weight: Tensor, region: tuple[int | slice, ...] = ()) -> None:
        """Quantise `weight`, the part of the whole that `region` indexes: whole rows."""
        functional = _bitsandbytes()
        weight = weight.to(device=self.packed.device, dtype=self.dtype).contiguous()
        if self.kind == "int4":
            packed, state = functional.quantize_4bit(weight, blocksize=self.block, quant_type="nf4")
        else:
            code = _code(self.kind, weight.device)
            packed, state = functional.quantize_blockwise(weight, code=code, blocksize=self.block)
        for whole, part in ((self.packed, packed), (self.absmax, state.absmax)):
            whole[region] = part.view(whole[region].shape)

    def dense(self, index: Tensor | int | None = None) -> Tensor:
        """The weight, or that at `index` of the first axis, in `dtype`."""
        packed, absmax = (t if index is None else t[index] for t in (self.packed, self.absmax))
        shape = (*packed.shape[:-1], self.shape[-1])
        functional = _bitsandbytes()
        state = self._state(absmax.reshape(-1), shape)
        if self.kind == "int4":
            return functional.dequantize_4bit(packed.reshape(-1, 1), state)
        return functional.dequantize_blockwise(packed.reshape(shape), state)

    def _state(self, absmax: Tensor, shape: tuple[int, ...]) -> Any:
        return _bitsandbytes().QuantState(
            absmax=absmax,
            shape=torch.Size(shape),
            code=_code(self.kind, absmax.device),
            blocksize=self.block,
            quant_type="nf4" if self.kind == "int4" else None,
            dtype=self.dtype,
        )

    def linear(self, x: Tensor) -> Tensor:
        """x (..., d_in) to (..., d_out), the weight having two axes."""
        if self.kind == "int4" and x.is_cuda and x.numel() == x.shape[-1] and x.dtype == self.dtype:
            # One row: a kernel that reads the packed weight once.
            state = self._state(self.absmax.view(-1), self.shape)
            return _bitsandbytes().gemv_4bit(x.contiguous(), self.packed.view(-1, 1), state=state)
        return F.linear(x, self.dense().to(x.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)
        # A cast of the model is one of its activations, which the dense weight follows.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        return out

    def extra_repr(self) -> str:
        return f"{self.kind}, shape={self.shape}, block={self.block}, dtype={self.dtype}"


class QuantizedLinear(nn.Module):
    """An `nn.Linear` with its weight packed; the bias stays dense."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features)."""
        y = self.weight.linear(x)
        return y if self.bias is None else y + self.bias


class QuantizedExperts(nn.Module):
    """`Experts` with both stacks packed. With few rows the experts that serve them are unpacked, a copy a
    row; with more, one expert after the other, which reads `ends` on the host."""

    def __init__(self, gate_up_proj: PackedWeight, out_proj: PackedWeight) -> None:
        super().__init__()
        self.gate_up_proj, self.out_proj = gate_up_proj, out_proj

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """As `Experts.forward`."""
        if x.shape[0] <= ends.shape[0]:
            own = torch.searchsorted(
                ends, torch.arange(x.shape[0], device=x.device, dtype=ends.dtype), right=True
            )
            hidden = _gated(torch.bmm(self.gate_up_proj.dense(own).to(x.dtype), x[..., None]).squeeze(-1))
            return torch.bmm(self.out_proj.dense(own).to(x.dtype), hidden[..., None]).squeeze(-1)
        parts, start = [], 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                hidden = _gated(F.linear(x[start:end], self.gate_up_proj.dense(expert).to(x.dtype)))
                parts.append(F.linear(hidden, self.out_proj.dense(expert).to(x.dtype)))
            start = end
        return torch.cat(parts)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def quantizable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of `model`'s backbone that quantisation replaces, with their names.

    These are linear layers and experts whose inputs are a multiple of 64 wide. Embedding, head, norms,
    routers and what makes dt, B and C stay."""
    for name, module in model.named_modules():
        if "backbone" not in name.split(".") and hasattr(model, "backbone"):
            continue
        if type(module) is nn.Linear and name.rpartition(".")[2] not in KEPT:
            if module.in_features % 64 == 0:
                yield name, module
        elif type(module) is Experts and all(w.shape[-1] % 64 == 0 for w in module.parameters()):
            yield name, module


def replace_by_packed(
    model: nn.Module, kind: Quantisation, dtypes: dict[str, torch.dtype], device: torch.device | str
) -> dict[str, PackedWeight]:
    """Put empty packed layers in the place of those that `quantizable` names; biases stay.

    dtypes: of the dense weights, by name. Returns the packed weights under the names of the dense ones.
    """
    _bitsandbytes()
    places: dict[str, PackedWeight] = {}
    for name, module in list(quantizable(model)):
        weights = dict(module.named_parameters(recurse=False))
        bias = weights.pop("bias", None)
        packed = {
            own: PackedWeight(kind, tuple(weight.shape), dtypes[f"{name}.{own}"], device)
            for own, weight in weights.items()
        }
        new: nn.Module
        if isinstance(module, Experts):
            new = QuantizedExperts(packed["gate_up_proj"], packed["out_proj"])
        else:
            new = QuantizedLinear(packed["weight"], bias)
        model.set_submodule(name, new)
        places |= {f"{name}.{own}": weight for own, weight in packed.items()}
    return places


def packed_bytes(shape: tuple[int, ...], kind: Quantisation) -> int:
    """What a weight of `shape` takes when it is packed."""
    weight = PackedWeight(kind, shape, torch.float32, "meta")
    return sum(p.numel() * p.element_size() for p in weight.parameters())


def is_quantized(model: nn.Module) -> bool:
    """Whether a weight of `model` is packed."""
    return any(isinstance(module, PackedWeight) for module in model.modules())


@functools.lru_cache(maxsize=16)
def _code(kind: Quantisation, device: torch.device) -> Tensor:
    """The numbers that the codes of `kind` stand for; kept, since a CUDA graph may not copy from the host."""
    functional = _bitsandbytes()
    if kind == "int4":
        return functional.get_4bit_type("nf4", device=device)
    return functional.create_linear_map(signed=True, total_bits=8).to(device)


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ImportError(
            "weights in 8 or 4 bits need bitsandbytes, which is not installed; install it with: "
            "pip install 'ssm-modal[quant]'"
        ) from error
