"""Checkpoints: reading models back, from the package's own folders and from training runs."""

from ssm_modal.checkpoints.native import load_pretrained

__all__ = ["load_pretrained"]
