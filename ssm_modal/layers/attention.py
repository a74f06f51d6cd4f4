"""Attention, the Transformer baseline: grouped KV heads, rotary embedding, a KV cache as its state.

Vaswani et al., arXiv 1706.03762; rotary embedding arXiv 2104.09864; grouped KV heads arXiv 2305.13245.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from ssm_modal.errors import ConfigError, StateError
from ssm_modal.kernels.checks import state_dtype
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.mixer import ROW_CHUNK, Mixer, MixerConfig, check_input, check_state, outward
from ssm_modal.state import State

BLOCK = 256  # slots a cache grows by
MASK_ELEMENTS = 1 << 24  # of a mask, where a backend needs one written out


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """n_heads query heads and n_kv_heads key and value heads (None: as many), each head_dim wide (None:
    d_model / n_heads). rope_theta: base of the rotary embedding, None for no positions at all. causal: False
    attends to the whole sequence, for bidirectional models; such a layer has no state."""

    type: ClassVar[str] = "attention"
    n_heads: int = 8
    n_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = 10000.0
    bias: bool = False
    causal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "AttentionConfig"
        check_positive(name, n_heads=self.n_heads, n_kv_heads=self.n_kv_heads, head_dim=self.head_dim)
        check_positive(name, rope_theta=self.rope_theta)
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"{name}: n_kv_heads is {self.n_kv_heads}, expected a divisor of n_heads {self.n_heads}"
            )
        if self.rope_theta is not None and self.head_dim is not None and self.head_dim % 2:
            raise ConfigError(f"{name}: head_dim is {self.head_dim}, expected an even number with rope_theta")

    def build(self, d_model: int) -> Attention:
        return Attention(d_model, self)


@dataclass(frozen=True)
class AttentionState(State):
    """The keys (rotated) and values of the steps so far, in the order of their positions.

    key, value: (batch, n_kv_heads, capacity, head_dim), of which row b holds `lengths[b]`; lengths: (batch,)
    int64. used: a bound on every length, kept on the host, so that growing the cache reads nothing from the
    device. A full cache grows by blocks of 256 slots.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor
    used: int = 0

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.key.shape[2]

    def reserve(self, steps: int) -> AttentionState:
        return replace(
            self, key=_grown(self.key, self.used + steps), value=_grown(self.value, self.used + steps)
        )

    def advance_(self, steps: int) -> None:
        object.__setattr__(self, "used", self.used + steps)


class Attention(Mixer):
    """Softmax attention: (batch, length, d_model) to the same; its `AttentionState` grows with the length.

    Parameters: q_proj, k_proj, v_proj, out_proj.
    """

    state_type = AttentionState

    def __init__(self, d_model: int, config: AttentionConfig) -> None:
        super().__init__()
        if config.head_dim is None and d_model % config.n_heads:
            raise ConfigError(
                f"AttentionConfig: n_heads is {config.n_heads}, expected a divisor of d_model {d_model}"
            )
        self.config = config
        self.d_model = d_model
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = config.head_dim or d_model // config.n_heads
        if config.rope_theta is not None and self.head_dim % 2:
            raise ConfigError(
                f"AttentionConfig: the head width is {self.head_dim}, expected even with rope_theta"
            )
        self.d_inner = self.n_heads * self.head_dim
        self.has_state = config.causal
        kv = self.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, self.d_inner, bias=config.bias)
        self.k_proj = nn.Linear(d_model, kv, bias=config.bias)
        self.v_proj = nn.Linear(d_model, kv, bias=config.bias)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=config.bias)

    def project_in(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q: (batch, length, n_heads, head_dim); k, v: (batch, length, n_kv_heads, head_dim)."""
        split = (-1, self.head_dim)
        return (
            self.q_proj(x).unflatten(-1, split),
            self.k_proj(x).unflatten(-1, split),
            self.v_proj(x).unflatten(-1, split),
        )

    def project_out(self, y: Tensor) -> Tensor:
        return self.out_proj(y)

    def drop_projections(self) -> None:
        del self.q_proj, self.k_proj, self.v_proj, self.out_proj

    def mix(
        self,
        projected: tuple[Tensor, Tensor, Tensor],
        state: AttentionState | None = None,
        *,
        seqs: Sequences | None = None,
        reverse: bool = False,
        return_state: bool = True,
    ) -> tuple[Tensor, AttentionState | None]:
        q, k, v = projected
        if state is not None and self.config.causal and not reverse:
            y, after = self._read_on(q, k, v, state, seqs)
            return y, after if return_state else None
        rows = None
        if seqs is not None:
            # One padded row a sequence, the layout the cache has; padding stands behind every sequence.
            rows = (seqs.seq_index(), seqs.positions())
            shape = (seqs.n, max(seqs.lengths))
            q, k, v = (t.new_zeros(*shape, *t.shape[2:]).index_put(rows, t[0]) for t in (q, k, v))
        length = q.shape[1]
        fresh = None if seqs is None else seqs.cu_seqlens.diff()
        slots = self._order(length, fresh, reverse, q.device)
        if state is not None:
            slots = slots + state.lengths[:, None]
        if self.config.rope_theta is not None:
            q, k = self._rotate(q, slots), self._rotate(k, slots)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        new, mask = None, None
        if state is not None or (return_state and self.has_state):
            new = self._append(state, k, v, slots, fresh, reverse)
        if state is not None and new is not None:
            # The query in slot i sees the slots up to its own.
            k, v = new.key[:, :, : new.used], new.value[:, :, : new.used]
            mask = (torch.arange(new.used, device=q.device) <= slots[:, :, None])[:, None]
        elif self.config.causal and reverse:
            mask = (slots[:, None, :] <= slots[:, :, None])[:, None]
        elif not self.config.causal and fresh is not None:
            mask = _whole_mask(length, fresh)
        y = self._attend(q, k, v, mask).transpose(1, 2).flatten(-2)
        if rows is not None:
            y = y[rows].unsqueeze(0)
        return y, new if return_state else None

    @torch.no_grad()
    def attention_row(
        self,
        x: Tensor,
        position: int,
        *,
        reverse: bool = False,
        chunk_size: int = ROW_CHUNK,
        project_in: Callable[[Tensor], Any] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """The softmax weights of each of the n_heads heads. See `Mixer.attention_row`."""
        check_input(self, x)
        batch, length, _ = x.shape
        slots = self._order(length, None, reverse, x.device)
        project = project_in or self.project_in

        def rotated(at: slice, which: int) -> Tensor:
            part = project(x[:, at])[which]
            part = part if self.config.rope_theta is None else self._rotate(part, slots[:, at])
            return part.to(state_dtype(x.dtype))

        chunks = list(outward(position, length, reverse, chunk_size))
        if not self.config.causal:
            # All steps: those behind the ones a causal layer would see.
            rest = position - 1 if reverse else position + 1
            if 0 <= rest < length:
                chunks += outward(rest, length, not reverse, chunk_size)
        query = rotated(slice(position, position + 1), 0).view(batch, self.n_kv_heads, -1, self.head_dim)
        scores = []
        for start, end in chunks:
            key = rotated(slice(start, end), 1)
            score = torch.einsum("bgrd,bsgd->bsgr", query, key) / math.sqrt(self.head_dim)
            scores.append(score.flatten(-2))
        # One number a step and head: kept for the whole row, since the softmax needs their sum.
        weights = torch.cat(scores, dim=1).softmax(dim=1).split([end - start for start, end in chunks], dim=1)
        for (start, _), row in zip(chunks, weights):
            yield start, row

    @staticmethod
    def _order(length: int, fresh: Tensor | None, reverse: bool, device: torch.device) -> Tensor:
        """(batch or 1, length): the place of each step in scan order, from 0; padding keeps its own."""
        steps = torch.arange(length, device=device).unsqueeze(0)
        if not reverse:
            return steps
        if fresh is None:
            return length - 1 - steps
        return torch.where(steps < fresh[:, None], fresh[:, None] - 1 - steps, steps)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding (arXiv 2104.09864, equation 34), halves paired.

        x: (batch, length, heads, head_dim). positions: (batch or 1, length).
        """
        theta = self.config.rope_theta
        assert theta is not None
        half = self.head_dim // 2
        rate = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = positions[..., None].float() * rate  # (batch or 1, length, half), fp32: positions reach 2^20
        cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
        a, b = x.float().chunk(2, dim=-1) if x.dtype != torch.float64 else x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q: (batch, n_heads, length, head_dim), k and v with n_kv_heads.

        mask: None stands for the causal one, or for none where the layer is not causal.
        """
        if k.shape[1] != self.n_heads:
            k = k.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
            v = v.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        if q.shape[2] == 0:
            return q
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and self.config.causal
        )

    def _read_on(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState, seqs: Sequences | None
    ) -> tuple[Tensor, AttentionState]:
        """Steps behind what `state` holds, each row at its own place, without padding.

        q, k, v as `project_in` gives them. Returns (y (batch, length, d_inner), the new state). Memory grows
        with the length of q and of the cache, not with their product. But for single steps the rows' lengths
        are read from the device, once a call.
        """
        batch, length = q.shape[:2]
        if seqs is None:
            lengths: tuple[int, ...] = (length,) * batch
            rows = torch.arange(batch, device=q.device).repeat_interleave(length)
            steps = torch.arange(length, device=q.device).repeat(batch)
            added = torch.full((batch,), length, device=q.device)
        else:
            lengths, rows, steps = seqs.lengths, seqs.seq_index(), seqs.positions()
            added = seqs.cu_seqlens.diff()
        slots = state.lengths[rows] + steps
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        if self.config.rope_theta is not None:
            q, k = self._rotate(q[None], slots[None])[0], self._rotate(k[None], slots[None])[0]
        used = state.used + max(lengths)
        key, value = (
            _grown(old.to(t.dtype), used).transpose(1, 2).index_put((rows, slots), t).transpose(1, 2)
            for old, t in ((state.key, k), (state.value, v))
        )
        new = AttentionState(key, value, state.lengths + added, used)
        if seqs is None and length == 1:
            seen = torch.arange(new.capacity, device=q.device) <= state.lengths[:, None]
            return self._attend_cache(q, key, value, seen)[:, None], new
        if torch.compiler.is_compiling() and seqs is None:
            # A graph is traced without the rows' lengths: all of the cache then, and a mask.
            seen = torch.arange(new.capacity, device=q.device) <= slots.view(batch, 1, length, 1)
            y = self._attend(q.unflatten(0, (batch, length)).transpose(1, 2), key, value, seen)
            return y.transpose(1, 2).flatten(-2), new
        parts, end = [], 0
        before = state.lengths.tolist()
        if len({*zip(before, lengths)}) == 1:
            last = before[0] + lengths[0]
            y = self._lower_right(
                q.unflatten(0, (len(lengths), lengths[0])), key[:, :, :last], value[:, :, :last]
            )
            return y.reshape(batch, length, -1), new
        for row, (old, n) in enumerate(zip(before, lengths)):
            own = (slice(row, row + 1), slice(None), slice(old + n))
            parts.append(self._lower_right(q[None, end : end + n], key[own], value[own]))
            end += n
        return torch.cat(parts, 1).reshape(batch, length, -1), new

    def _lower_right(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (batch, n, n_heads, head_dim), the last n of the steps that k and v (batch, n_kv_heads, steps,
        head_dim) hold; each sees the steps up to its own. Returns (batch, n, d_inner).

        On CUDA in half precision by flash attention; elsewhere in pieces, each with its part of the mask.
        """
        q = q.transpose(1, 2)
        n, steps = q.shape[2], k.shape[2]
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and n and self.head_dim <= 256:
            mask = causal_lower_right(n, steps)
            grouped = self.n_kv_heads != self.n_heads
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
            return y.transpose(1, 2).flatten(-2)
        if self.n_kv_heads != self.n_heads:
            k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for t in (k, v))
        piece = max(1, MASK_ELEMENTS // max(1, steps))
        parts = []
        for start in range(0, n, piece):
            queries = torch.arange(start, min(start + piece, n), device=q.device) + steps - n
            last = min(start + piece, n) + steps - n
            seen = torch.arange(last, device=q.device) <= queries[:, None]
            parts.append(self._attend(q[:, :, start : start + piece], k[:, :, :last], v[:, :, :last], seen))
        return (torch.cat(parts, 2) if parts else q).transpose(1, 2).flatten(-2)

    def _attend_cache(self, q: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """One query a row over the whole cache: q (batch, n_heads, head_dim) to (batch, d_inner).

        key, value: (batch, n_kv_heads, capacity, head_dim), of which `seen` (batch, capacity) is valid. No
        shape depends on how much that is, so that a CUDA graph serves while the cache fills. The heads of a
        group share one reading of the cache; the sum over values is taken in blocks side by side, since one
        row alone would leave most of a GPU idle.
        """
        batch, kv, capacity, width = key.shape
        rows = q.view(batch * kv, -1, width)
        scores = _product(rows, key.reshape(-1, capacity, width).transpose(1, 2)) * width**-0.5
        scores = scores.view(batch, -1, capacity).masked_fill(~seen[:, None], -torch.inf)
        weights = scores.softmax(-1).to(value.dtype)
        block = BLOCK if capacity % BLOCK == 0 else capacity
        weights = weights.view(batch * kv, -1, capacity // block, block).transpose(1, 2).flatten(0, 1)
        y = _product(weights, value.reshape(-1, block, width))
        y = y.view(batch * kv, capacity // block, -1, width).sum(1)
        return y.to(q.dtype).view(batch, self.d_inner)

    def _append(
        self,
        state: AttentionState | None,
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        fresh: Tensor | None,
        reverse: bool,
    ) -> AttentionState:
        """A new state with k, v: (batch, n_kv_heads, length, head_dim) at their slots."""
        batch, _, length, _ = k.shape
        added = torch.full((batch,), length, device=k.device) if fresh is None else fresh
        if state is None and not reverse:
            return AttentionState(k, v, added, length)  # no copy: nothing writes to it before it has grown
        at = slots.expand(batch, length)[:, None, :, None].expand_as(k)
        if state is None:
            return AttentionState(
                torch.zeros_like(k).scatter(2, at, k), torch.zeros_like(v).scatter(2, at, v), added, length
            )
        used = state.used + length
        key = _grown(state.key.to(k.dtype), used).scatter(2, at, k)
        value = _grown(state.value.to(v.dtype), used).scatter(2, at, v)
        return AttentionState(key, value, state.lengths + added, used)

    def init_state(
        self,
        batch: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int = BLOCK,
    ) -> AttentionState:
        """An empty cache of `capacity` slots a row."""
        if not self.has_state:
            raise StateError("Attention: with causal=False it needs the whole sequence and has no state")
        device, dtype = device or self.out_proj.weight.device, dtype or self.out_proj.weight.dtype
        shape = (batch, self.n_kv_heads, capacity, self.head_dim)
        lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        key, value = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return AttentionState(key, value, lengths)

    @torch.no_grad()
    def step_(self, x: Tensor, state: AttentionState) -> Tensor:
        """One step in place; inside the same state object, a full cache gives way to one a block larger."""
        check_input(self, x)
        check_state(self, state, x)
        q, k, v = self.project_in(x)
        slots = state.lengths[:, None]
        if self.config.rope_theta is not None:
            q, k = self._rotate(q, slots), self._rotate(k, slots)
        if state.used + 1 > state.capacity:
            # The state is frozen against callers; a step in place is the one writer of its fields.
            object.__setattr__(state, "key", _grown(state.key, state.used + 1))
            object.__setattr__(state, "value", _grown(state.value, state.used + 1))
        at = slots[:, None, :, None].expand(-1, self.n_kv_heads, -1, self.head_dim)
        state.key.scatter_(2, at, k.transpose(1, 2).to(state.key.dtype))
        state.value.scatter_(2, at, v.transpose(1, 2).to(state.value.dtype))
        seen = torch.arange(state.capacity, device=q.device) <= slots
        y = self._attend_cache(q[:, 0], state.key.to(q.dtype), state.value.to(q.dtype), seen)
        state.lengths.add_(1)
        state.advance_(1)
        return self.project_out(y[:, None])


def _grown(cache: Tensor, used: int) -> Tensor:
    """`cache` (batch, heads, capacity, head_dim) with `used` slots at least, rounded up to blocks."""
    if used <= cache.shape[2]:
        return cache
    return F.pad(cache, (0, 0, 0, -(-used // BLOCK) * BLOCK - cache.shape[2]))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product, in fp32 at least: (n, i, j) and (n, j, k) to (n, i, k)."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _whole_mask(length: int, fresh: Tensor) -> Tensor:
    """(batch, 1, length, length): each step of a row sees the row's own steps, and padding itself."""
    steps = torch.arange(length, device=fresh.device)
    seen = steps < fresh[:, None]
    return (seen[:, None, :] | torch.eye(length, dtype=torch.bool, device=fresh.device)).unsqueeze(1)
