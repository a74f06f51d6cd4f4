"""What a model takes in memory: its weights, its constant state and the KV cache that grows with the length.

Counted on the model itself, built without memory (on torch's meta device), so that it is what a run allocates
for these; activations come on top.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssm_modal.backbone import BackboneBase
from ssm_modal.errors import StateError
from ssm_modal.layers import Attention
from ssm_modal.models.base import Model, ModelConfig
from ssm_modal.models.registry import model_config

GIB = 1 << 30


@dataclass(frozen=True)
class ModelMemory:
    """parameters: how many. weights, state, cache: bytes; state is what does not grow with the length."""

    parameters: int
    weights: int
    state: int
    cache: int

    @property
    def total(self) -> int:
        """Bytes of weights, state and cache."""
        return self.weights + self.state + self.cache


def model_memory(
    config: ModelConfig, length: int, *, batch: int = 1, dtype: torch.dtype = torch.bfloat16
) -> ModelMemory:
    """What a model of `config` in `dtype` takes once `batch` rows of `length` tokens have been read.

    The cache is that of attention layers, a slot a token. Raises ValueError for a negative length or batch,
    StateError for a model without a state.
    """
    if length < 0 or batch < 0:
        raise ValueError(f"model_memory: length is {length} and batch {batch}, expected 0 or more")
    model = _model(config, dtype)
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, BackboneBase) or not backbone.has_state:
        raise StateError(f"model_memory: {type(config).__name__} describes a model that carries no state")
    parameters = list(model.parameters())
    state, cache = _bytes(backbone.init_state(batch, dtype=dtype).tensors()), 0
    for mixer in backbone.modules():
        if isinstance(mixer, Attention):
            state -= _bytes(mixer.init_state(batch, dtype=dtype).tensors())
            slots = mixer.init_state(batch, dtype=dtype, capacity=length)
            cache += _bytes([slots.key, slots.value])
            state += _bytes([slots.lengths])
    return ModelMemory(sum(p.numel() for p in parameters), _bytes(parameters), state, cache)


@functools.lru_cache(maxsize=32)
def _model(config: ModelConfig, dtype: torch.dtype) -> Model:
    with torch.device("meta"):
        return config.build().to(dtype)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def memory_table(
    names: Sequence[str],
    lengths: Sequence[int],
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """A Markdown table for registered models: parameters, weights, state, and KV cache at each length.

    GiB, but for the state, in MiB. Raises ConfigError for an unknown name.
    """
    head = ["model", "parameters", "weights", "state", *(f"cache at {n:,}" for n in lengths)]
    rows = []
    for name in names:
        config = model_config(name)
        by_length = [model_memory(config, n, batch=batch, dtype=dtype) for n in lengths or (0,)]
        first = by_length[0]
        caches = [m.cache for m in by_length] if lengths else []
        rows.append(
            [
                name,
                _count(first.parameters),
                f"{first.weights / GIB:.2f} GiB",
                f"{first.state / (1 << 20):.2f} MiB",
                *(f"{c / GIB:.2f} GiB" if c else "none" for c in caches),
            ]
        )
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 10**9 else f"{n / 1e6:.1f} M"
