"""Checkpoints: models from and into the package's own folders, those of transformers and state-spaces, and
from training runs."""

from ssm_modal.checkpoints.loading import load_pretrained
from ssm_modal.checkpoints.saving import save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
