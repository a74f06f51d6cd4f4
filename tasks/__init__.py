"""LightningModules, one a file; loaded when first asked for, since they need the extra `train`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssm_modal.tasks.adapters import AdapterTuning
    from ssm_modal.tasks.base import StepOutput, TrainingTask
    from ssm_modal.tasks.classification import Classification
    from ssm_modal.tasks.dna_language import DNALanguageModelling
    from ssm_modal.tasks.language import LanguageModelling
    from ssm_modal.tasks.masked_language import MaskedLanguageModelling
    from ssm_modal.tasks.optimizers import OptimizerConfig
    from ssm_modal.tasks.schedules import ScheduleConfig
    from ssm_modal.tasks.species import SpeciesClassification
    from ssm_modal.tasks.synthetic import SyntheticTask

_HOMES = {
    "AdapterTuning": "adapters",
    "Classification": "classification",
    "DNALanguageModelling": "dna_language",
    "LanguageModelling": "language",
    "MaskedLanguageModelling": "masked_language",
    "OptimizerConfig": "optimizers",
    "ScheduleConfig": "schedules",
    "SpeciesClassification": "species",
    "StepOutput": "base",
    "SyntheticTask": "synthetic",
    "TrainingTask": "base",
}

__all__ = [
    "AdapterTuning",
    "Classification",
    "DNALanguageModelling",
    "LanguageModelling",
    "MaskedLanguageModelling",
    "OptimizerConfig",
    "ScheduleConfig",
    "SpeciesClassification",
    "StepOutput",
    "SyntheticTask",
    "TrainingTask",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
