"""The stack of blocks that most models rest on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssm_modal.backbone.base import BackboneBase
from ssm_modal.backbone.block import Block
from ssm_modal.backbone.config import BackboneConfig
from ssm_modal.errors import StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.mixer import check_input, check_state
from ssm_modal.layers.norm import RMSNorm
from ssm_modal.state import State


@dataclass(frozen=True)
class BackboneState(State):
    """One state a block; iterates and indexes as a tuple of them."""

    layers: tuple[State, ...]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[State]:
        return iter(self.layers)

    def __getitem__(self, layer: int) -> State:
        return self.layers[layer]


class Backbone(BackboneBase):
    """(batch, length, d_model) to the same: n_layers pre-norm blocks and a final RMSNorm."""

    config: BackboneConfig
    state_type = BackboneState

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.d_model = config.d_model
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.has_state = all(block.mixer.has_state for block in self._blocks())
        self.gradient_checkpointing = config.gradient_checkpointing
        self._init_weights()

    def _blocks(self) -> Iterator[Block]:
        for block in self.layers:
            assert isinstance(block, Block)
            yield block

    @torch.no_grad()
    def _init_weights(self) -> None:
        """The one place where initialisation depends on the depth.

        Linear biases start at zero. Every weight that writes into the residual stream is divided by the root
        of the number of such writes, one a mixer and one an MLP, as GPT-2 and the published Mamba do.
        """
        writes = sum(1 if block.mlp is None else 2 for block in self._blocks())
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for block in self._blocks():
            for weight in block.residual_weights():
                weight.div_(math.sqrt(writes))

    def forward(
        self, x: Tensor, state: BackboneState | None = None, *, seqs: Sequences | Tensor | None = None
    ) -> tuple[Tensor, BackboneState | None]:
        check_input(self, x)
        if seqs is not None and not isinstance(seqs, Sequences):
            seqs = Sequences.from_cu_seqlens(seqs, x.shape[1], x.device)
        check_input(self, x, seqs)
        check_state(self, state, x, seqs)
        if state is not None and len(state) != len(self.layers):
            raise StateError(f"Backbone: state has {len(state)} layers, expected {len(self.layers)}")
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.norm.weight.dtype)
        branch = x
        residual: Tensor | None = None
        new: list[State | None] = []
        for i in range(len(self.layers)):
            own = None if state is None else state[i]
            branch, residual, after = self.run_block(i, branch, residual, own, seqs)
            new.append(after)
        assert residual is not None  # there is at least one block
        out = self.finish(branch, residual)
        states = tuple(s for s in new if s is not None)
        return out, BackboneState(states) if self.has_state else None

    def run_block(
        self,
        i: int,
        branch: Tensor,
        residual: Tensor | None,
        state: State | None = None,
        seqs: Sequences | None = None,
    ) -> tuple[Tensor, Tensor, State | None]:
        """Block `i` of the stream branch + residual (see `Block`), with gradient checkpointing where that is
        on."""
        block = self.layers[i]
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, branch, residual, state, seqs, use_reentrant=False)
        return block(branch, residual, state, seqs)

    def finish(self, branch: Tensor, residual: Tensor) -> Tensor:
        """The final norm of branch + residual."""
        return self.norm.add(branch, residual, self.config.residual_in_fp32)[0]

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BackboneState:
        if not self.has_state:
            raise StateError("Backbone: a layer needs the whole sequence, so it has no state")
        return BackboneState(
            tuple(block.mixer.init_state(batch, device=device, dtype=dtype) for block in self._blocks())
        )

    @torch.no_grad()
    def step_(self, x: Tensor, state: BackboneState) -> Tensor:
        check_input(self, x)
        check_state(self, state, x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.norm.weight.dtype)
        branch = x
        residual: Tensor | None = None
        for block, own in zip(self._blocks(), state):
            branch, residual = block.step_(branch, residual, own)
        assert residual is not None
        return self.norm.add(branch, residual, self.config.residual_in_fp32)[0]
