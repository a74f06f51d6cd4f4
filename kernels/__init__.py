"""Sequence ops: references, chunked torch forms, Triton and compiled CPU kernels, and the dispatcher.

Names load when they are first used, so that importing the package costs nothing and needs no triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssm_modal.kernels.conv import (
        causal_conv1d,
        causal_conv1d_beside,
        causal_conv1d_ref,
        causal_conv1d_step,
        causal_conv1d_step_,
    )
    from ssm_modal.kernels.dispatch import BackendError, Choice, explain, use_backend
    from ssm_modal.kernels.loss import cross_entropy, cross_entropy_ref
    from ssm_modal.kernels.lti import lti_scan, lti_scan_ref, lti_scan_step, lti_scan_step_
    from ssm_modal.kernels.norm import rms_norm, rms_norm_ref
    from ssm_modal.kernels.scan import (
        RowCarry,
        ScanDirection,
        bidirectional_scan,
        selective_scan,
        selective_scan_ref,
        selective_scan_row,
        selective_scan_step,
        selective_scan_step_,
    )
    from ssm_modal.kernels.sequences import ChunkTable, Sequences

_HOMES = {
    "BackendError": "dispatch",
    "Choice": "dispatch",
    "ChunkTable": "sequences",
    "RowCarry": "scan",
    "ScanDirection": "scan",
    "Sequences": "sequences",
    "bidirectional_scan": "scan",
    "causal_conv1d": "conv",
    "causal_conv1d_beside": "conv",
    "causal_conv1d_ref": "conv",
    "causal_conv1d_step": "conv",
    "causal_conv1d_step_": "conv",
    "cross_entropy": "loss",
    "cross_entropy_ref": "loss",
    "explain": "dispatch",
    "lti_scan": "lti",
    "lti_scan_ref": "lti",
    "lti_scan_step": "lti",
    "lti_scan_step_": "lti",
    "rms_norm": "norm",
    "rms_norm_ref": "norm",
    "selective_scan": "scan",
    "selective_scan_ref": "scan",
    "selective_scan_row": "scan",
    "selective_scan_step": "scan",
    "selective_scan_step_": "scan",
    "use_backend": "dispatch",
}

__all__ = [
    "BackendError",
    "Choice",
    "ChunkTable",
    "RowCarry",
    "ScanDirection",
    "Sequences",
    "bidirectional_scan",
    "causal_conv1d",
    "causal_conv1d_beside",
    "causal_conv1d_ref",
    "causal_conv1d_step",
    "causal_conv1d_step_",
    "cross_entropy",
    "cross_entropy_ref",
    "explain",
    "lti_scan",
    "lti_scan_ref",
    "lti_scan_step",
    "lti_scan_step_",
    "rms_norm",
    "rms_norm_ref",
    "selective_scan",
    "selective_scan_ref",
    "selective_scan_row",
    "selective_scan_step",
    "selective_scan_step_",
    "use_backend",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
