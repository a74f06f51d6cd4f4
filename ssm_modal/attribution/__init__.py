"""Which input positions drove a decision: gradient x input, and the layers' own hidden-attention rows."""

from ssm_modal.attribution.calls import attribute
from ssm_modal.attribution.gradient import Gradients, input_gradients
from ssm_modal.attribution.hidden_attention import AttentionRow, hidden_attention_row, mixing_layers
from ssm_modal.attribution.result import Attribution

__all__ = [
    "AttentionRow",
    "Attribution",
    "Gradients",
    "attribute",
    "hidden_attention_row",
    "input_gradients",
    "mixing_layers",
]
