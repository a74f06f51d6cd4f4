"""Heads: what reads a backbone's output, and losses over long sequences."""

from ssm_modal.heads.chunked_loss import chunked_cross_entropy
from ssm_modal.heads.classification import ClassificationHead, PoolingState
from ssm_modal.heads.language import LanguageHead
from ssm_modal.heads.long_loss import long_token_loss, long_token_nats

__all__ = [
    "ClassificationHead",
    "LanguageHead",
    "PoolingState",
    "chunked_cross_entropy",
    "long_token_loss",
    "long_token_nats",
]
