"""What a backbone is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ssm_modal.backbone.base import BackboneBase, BackboneBaseConfig
from ssm_modal.errors import ConfigError
from ssm_modal.layers.bidirectional import BidirectionalConfig
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.feed_forward import FeedForwardConfig
from ssm_modal.layers.mamba import MambaConfig
from ssm_modal.layers.mixer import MixerConfig
from ssm_modal.layers.moe import MoEConfig


@dataclass(frozen=True)
class BackboneConfig(BackboneBaseConfig):
    """n_layers blocks of width d_model.

    mixer: one config for every block, or a tuple repeated over them: layer i takes mixer[i % len(mixer)], so
    a hybrid is `mixer=(mamba,) * 7 + (attention,)`. mlp: None for blocks of a mixer alone, or what follows
    the mixer, an MLP or a mixture of experts: one for every block, or a tuple repeated over them (None among
    its entries for none). bidirectional: wraps every mixer that runs in one direction (attention with
    causal=False is left as it is). norm_eps: of every RMSNorm. residual_in_fp32: keep the residual stream in
    fp32 beside half-precision layers. dropout: on each branch, before it is added. gradient_checkpointing: in
    training, keep only the blocks' inputs and compute the rest again.
    """

    type: ClassVar[str] = "backbone"
    n_layers: int
    mixer: MixerConfig | tuple[MixerConfig, ...] = field(default_factory=MambaConfig)
    mlp: FeedForwardConfig | tuple[FeedForwardConfig | None, ...] | None = None
    bidirectional: BidirectionalConfig | None = None
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    dropout: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "BackboneConfig"
        check_positive(name, d_model=self.d_model, n_layers=self.n_layers, norm_eps=self.norm_eps)
        if self.mixer == ():
            raise ConfigError(f"{name}: mixer is an empty list, expected at least one mixer")
        if self.mlp == ():
            raise ConfigError(f"{name}: mlp is an empty list, expected at least one entry, or null")
        if len({(m.n_experts, m.top_k, m.aux_loss_coef) for m in self._experts()}) > 1:
            raise ConfigError(
                f"{name}: the mixtures of experts in mlp differ in n_experts, top_k or aux_loss_coef; their "
                "load is balanced over all layers together, expected the same of each"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{name}: dropout is {self.dropout}, expected 0 or more and below 1")

    def build(self) -> BackboneBase:
        from ssm_modal.backbone.backbone import Backbone  # its blocks are made of this config

        return Backbone(self)

    def sees_the_future(self) -> str | None:
        if self.bidirectional is not None:
            return "backbone.bidirectional is set"
        for i in range(self.n_layers):
            if getattr(self.mixer_of(i), "causal", True) is False:
                return f"the mixer of layer {i} has causal=False"
        return None

    def mixer_of(self, layer: int) -> MixerConfig:
        """The mixer of block `layer`, counted from 0."""
        return self.mixer[layer % len(self.mixer)] if isinstance(self.mixer, tuple) else self.mixer

    def mlp_of(self, layer: int) -> FeedForwardConfig | None:
        """What follows the mixer of block `layer`, counted from 0."""
        return self.mlp[layer % len(self.mlp)] if isinstance(self.mlp, tuple) else self.mlp

    def _experts(self) -> list[MoEConfig]:
        entries = self.mlp if isinstance(self.mlp, tuple) else (self.mlp,)
        return [entry for entry in entries if isinstance(entry, MoEConfig)]

    @property
    def aux_loss_coef(self) -> float:
        experts = self._experts()
        return experts[0].aux_loss_coef if experts else 0.0
