"""One pre-norm residual block: a mixer and, where the config has one, an MLP or a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ssm_modal.backbone.config import BackboneConfig
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.bidirectional import Bidirectional
from ssm_modal.layers.mixer import Mixer, build_mixer
from ssm_modal.layers.norm import RMSNorm
from ssm_modal.state import State


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    The last branch is not added here but in the next block's norm, which fuses the two: a block takes and
    returns the pair (branch, residual), whose sum is the stream.
    """

    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        mixer: Mixer | Bidirectional = build_mixer(config.mixer_of(layer), config.d_model)
        if config.bidirectional is not None and mixer.has_state:
            mixer = Bidirectional(config.d_model, config.mixer_of(layer), config.bidirectional)
        self.mixer = mixer
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        mlp = config.mlp_of(layer)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps) if mlp is not None else None
        self.mlp = mlp.build(config.d_model) if mlp is not None else None
        self.dropout: nn.Module | None = nn.Dropout(config.dropout) if config.dropout else None

    def residual_weights(self) -> Iterator[Tensor]:
        """The weights whose product is added to the stream."""
        yield from self.mixer.residual_weights()
        if self.mlp is not None:
            yield from self.mlp.residual_weights()

    def _norm(self, norm: RMSNorm, branch: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return norm(branch), branch
        return norm.add(branch, residual, self.residual_in_fp32)

    def _drop(self, branch: Tensor) -> Tensor:
        return branch if self.dropout is None else self.dropout(branch)

    def forward(
        self,
        branch: Tensor,
        residual: Tensor | None,
        state: State | None = None,
        seqs: Sequences | None = None,
    ) -> tuple[Tensor, Tensor, State | None]:
        """branch: (batch, length, d_model); residual: the same or None before the first block."""
        x, residual = self._norm(self.norm, branch, residual)
        x, new = self.mixer(x, state, seqs=seqs)
        branch = self._drop(x)
        if self.mlp is not None and self.mlp_norm is not None:
            x, residual = self._norm(self.mlp_norm, branch, residual)
            branch = self._drop(self.mlp(x))
        return branch, residual, new

    def step_(self, branch: Tensor, residual: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        """One step of (batch, 1, d_model); `state` is changed in place."""
        x, residual = self._norm(self.norm, branch, residual)
        branch = self.mixer.step_(x, state)
        if self.mlp is not None and self.mlp_norm is not None:
            x, residual = self._norm(self.mlp_norm, branch, residual)
            branch = self.mlp(x)
        return branch, residual
