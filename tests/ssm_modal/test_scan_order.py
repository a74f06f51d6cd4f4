"""Scan orders as index maps: by hand, as permutations, and with a class token that keeps its place."""

from __future__ import annotations

import pytest
import torch

from ssm_modal.models.vision.scan_order import patch_order, reordering, token_order


def test_orders_by_hand() -> None:
    # 0 1 2
    # 3 4 5
    assert patch_order("row", (2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
    assert patch_order("column", (2, 3)).tolist() == [0, 3, 1, 4, 2, 5]
    assert patch_order("snake", (2, 3)).tolist() == [0, 1, 2, 5, 4, 3]
    assert patch_order("snake", (3, 2)).tolist() == [0, 1, 3, 2, 4, 5]
    with pytest.raises(ValueError, match="order is 'cross', expected row, column or snake"):
        patch_order("cross", (2, 2))


def test_a_class_token_keeps_its_place() -> None:
    # Tokens in rows with the class token (3) in the middle: 0 1 2 [3] 4 5 6.
    assert token_order("column", (2, 3), 3).tolist() == [0, 4, 1, 3, 5, 2, 6]
    assert token_order("column", (2, 3), 0).tolist() == [0, 1, 4, 2, 5, 3, 6]
    assert token_order("column", (2, 3), None).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 4), (5, 2)])
@pytest.mark.parametrize("class_token", [None, 0, "middle"])
def test_reorderings_lead_from_one_order_to_another_and_back(
    grid: tuple[int, int], class_token: object
) -> None:
    n = grid[0] * grid[1]
    slot = n // 2 if class_token == "middle" else class_token
    assert slot is None or isinstance(slot, int)
    for a in ("row", "column", "snake"):
        assert reordering(a, a, grid, slot) is None
        for b in ("row", "column", "snake"):
            if a == b:
                continue
            there, back = reordering(a, b, grid, slot), reordering(b, a, grid, slot)
            assert there is not None
            assert back is not None
            in_a = token_order(a, grid, slot)
            assert torch.equal(in_a[there], token_order(b, grid, slot))
            assert torch.equal(in_a[there][back], in_a)
