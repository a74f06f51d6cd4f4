"""Heads: what reads a backbone's output."""

from ssm_modal.heads.language import LanguageHead

__all__ = ["LanguageHead"]
