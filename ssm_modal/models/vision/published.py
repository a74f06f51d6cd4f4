"""The published Vision Mamba checkpoints (hustvl/Vim): their keys as this package's.

A block of theirs holds both directions side by side, the second one's names ending in `_b`:

    layers.I.mixer.in_proj, out_proj            backbone.layers.I.mixer.forwards.in_proj, out_proj
    layers.I.mixer.conv1d, x_proj, ...          backbone.layers.I.mixer.forwards.conv1d, x_proj, ...
    layers.I.mixer.conv1d_b, A_b_log, D_b, ...  backbone.layers.I.mixer.backwards.conv1d, A_log, D, ...
    layers.I.mixer.dt_proj.bias                 backbone.layers.I.mixer.forwards.dt_bias
    layers.I.norm, norm_f                       backbone.layers.I.norm, backbone.norm
    patch_embed, cls_token, pos_embed, head     the same
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssm_modal.errors import CheckpointError
from ssm_modal.models.vision.model import VisionMamba
from ssm_modal.models.vision.positions import resample_positions

_SAME = frozenset(
    {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "head.weight", "head.bias"}
)
_SHARED = frozenset({"in_proj.weight", "out_proj.weight"})
# Of each direction: the published name, and this package's.
_OWN = {
    "A_log": "A_log",
    "D": "D",
    "conv1d.weight": "conv1d.weight",
    "conv1d.bias": "conv1d.bias",
    "x_proj.weight": "x_proj.weight",
    "dt_proj.weight": "dt_proj.weight",
    "dt_proj.bias": "dt_bias",
}
_BACKWARD = {"A_log": "A_b_log", "D": "D_b"}  # the others end their first part in _b
_BLOCK = re.compile(r"layers\.(\d+)\.(mixer|norm)\.(.+)")


def _mixer_names() -> dict[str, str]:
    names = {name: f"forwards.{name}" for name in _SHARED}
    for theirs, ours in _OWN.items():
        first, dot, rest = theirs.partition(".")
        names[theirs] = f"forwards.{ours}"
        names[_BACKWARD.get(theirs, f"{first}_b{dot}{rest}")] = f"backwards.{ours}"
    return names


_MIXER = _mixer_names()


def published_key(key: str) -> str | None:
    """This package's name of a key of a published checkpoint; None: it is not one of theirs."""
    if key in _SAME:
        return key
    if key == "norm_f.weight":
        return "backbone.norm.weight"
    match = _BLOCK.fullmatch(key)
    if match is None:
        return None
    layer, part, rest = match.groups()
    if part == "norm":
        return f"backbone.layers.{layer}.norm.weight" if rest == "weight" else None
    return f"backbone.layers.{layer}.mixer.{_MIXER[rest]}" if rest in _MIXER else None


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: VisionMamba) -> dict[str, Tensor]:
    """The weights of a checkpoint, published or this package's own, under `model`'s names.

    Takes the state dict, or the published files' dict with it under "model". Positions of another image size
    are resampled to the model's, for a square table that is not of its size. Raises CheckpointError for a key
    that belongs to neither.
    """
    tensors = state_dict.get("model", state_dict)
    if not isinstance(tensors, Mapping):
        raise CheckpointError(
            f"the checkpoint's key 'model' holds a {type(tensors).__name__}, expected weights"
        )
    if any(key.startswith("backbone.") for key in tensors):
        found = dict(tensors)
    else:
        found, unknown = {}, []
        for key, value in tensors.items():
            name = published_key(key)
            if name is None:
                unknown.append(key)
            else:
                found[name] = value
        if unknown:
            raise CheckpointError(
                f"{len(unknown)} keys are none of a published Vision Mamba's: "
                + ", ".join(sorted(unknown)[:8])
            )
    table = found.get("pos_embed")
    if table is not None and table.shape[1] != model.pos_embed.shape[1]:
        config = model.config
        side = round((table.shape[1] - model.num_prefix_tokens) ** 0.5)
        if side * side + model.num_prefix_tokens != table.shape[1]:
            raise CheckpointError(
                f"pos_embed holds {table.shape[1]} vectors, expected {model.pos_embed.shape[1]}, or those of "
                f"a square image with class_token {config.class_token!r}"
            )
        found["pos_embed"] = resample_positions(table, (side, side), config.grid, config.class_token)
    return found
