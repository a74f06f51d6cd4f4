"""Whether a checkpoint's model is the one that a task has built."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ssm_modal.errors import ConfigError
from ssm_modal.models.base import ModelConfig


def architecture_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Where a checkpoint's plain config differs from that of the model built, each as `key is a there and b
    here`.

    Fields that `there` lacks, since the checkpoint is older than they are, have their defaults, as
    `load_pretrained` reads them; what is no config of this version is compared as it stands.
    """
    with suppress(ConfigError):  # the comparison names what does not fit
        there = ModelConfig.from_dict(there).to_dict()
    return config_differences(there, here)


def config_differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two plain configs differ, each as `key is a there and b here`."""
    out = []
    for key in [*there, *(k for k in here if k not in there)]:
        a, b, name = there.get(key), here.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += config_differences(a, b, f"{name}.")
        elif (list(a) if isinstance(a, tuple) else a) != (list(b) if isinstance(b, tuple) else b):
            out.append(f"{name} is {a!r} there and {b!r} here")
    return out
