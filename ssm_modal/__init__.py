"""Selective state-space models for long sequences of any kind, on one shared backbone."""

__version__ = "0.1.0"
