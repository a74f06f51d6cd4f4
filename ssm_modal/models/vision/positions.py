"""Absolute positions: a table of a vector a token, resampled for images of other sizes.

A class token's vector stands at its token's slot of the table: 0 at the head, and N // 2 of N patches in the
middle, as in the published checkpoints. It belongs to no place of the image, so it is taken out before the
patches' vectors are resampled, and put back at the slot of the new size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ssm_modal.models.vision.scan_order import Grid

ClassToken = Literal["head", "middle", "none"]


def class_slot(class_token: ClassToken, patches: int) -> int | None:
    """Where the class token stands in a sequence of `patches` patches and itself; None: there is none."""
    return {"head": 0, "middle": patches // 2, "none": None}[class_token]


def insert_token(patches: Tensor, token: Tensor, slot: int) -> Tensor:
    """(batch, patches, d) and (batch, 1, d) to (batch, patches + 1, d)."""
    return torch.cat([patches[:, :slot], token, patches[:, slot:]], dim=1)


def take_token(tokens: Tensor, slot: int) -> tuple[Tensor, Tensor]:
    """The inverse of `insert_token`: (patches, token)."""
    return torch.cat([tokens[:, :slot], tokens[:, slot + 1 :]], dim=1), tokens[:, slot : slot + 1]


def resample_positions(table: Tensor, old: Grid, new: Grid, class_token: ClassToken) -> Tensor:
    """A table (1, tokens, d) for the grid `old` as one for `new`: bicubic, by timm; the class token's vector
    is moved to its new slot unchanged.

    Raises ValueError for a table that has not as many vectors as `old` has patches, and the class token.
    """
    patches = old[0] * old[1]
    slot = class_slot(class_token, patches)
    expected = patches + (slot is not None)
    if table.shape[1] != expected:
        raise ValueError(
            f"the table of positions holds {table.shape[1]} vectors, expected {expected} for a grid of "
            f"{old[0]} x {old[1]} patches with class_token {class_token!r}"
        )
    if old == new:
        return table
    from timm.layers import resample_abs_pos_embed

    if slot is None:
        return resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=0)
    table, token = take_token(table, slot)
    table = resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=0)
    new_slot = class_slot(class_token, new[0] * new[1])
    assert new_slot is not None
    return insert_token(table, token, new_slot)
