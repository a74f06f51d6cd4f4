"""Packed sequences: validation in words, and tables that agree with a plain count."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssm_modal.kernels.sequences import Sequences

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_cu_seqlens(dtype: torch.dtype) -> None:
    seqs = Sequences.from_cu_seqlens(torch.tensor([0, 3, 3, 7], dtype=dtype), 7, CPU)
    assert seqs.lengths == (3, 0, 4)
    assert seqs.starts == (0, 3, 3)
    assert (seqs.n, seqs.total) == (3, 7)
    assert seqs.cu_seqlens.dtype == torch.int64
    assert Sequences.from_cu_seqlens(seqs, 7, CPU) is seqs


def test_from_lengths_equals_from_cu_seqlens() -> None:
    seqs = Sequences.from_lengths([3, 0, 4])
    assert seqs.cu_seqlens.tolist() == [0, 3, 3, 7]
    assert seqs.seq_index().tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert seqs.positions().tolist() == [0, 1, 2, 0, 1, 2, 3]


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 64])
def test_chunks_cover_every_step_once_and_cross_no_border(chunk_size: int) -> None:
    lengths = [0, 5, 1, 0, 6, 0]
    seqs = Sequences.from_lengths(lengths)
    table = seqs.chunks(chunk_size)
    assert seqs.chunks(chunk_size) is table
    owner = seqs.seq_index().tolist()
    covered = []
    for start, end, seq in zip(table.start.tolist(), table.end.tolist(), table.seq.tolist()):
        assert 0 < end - start <= chunk_size
        assert {owner[t] for t in range(start, end)} == {seq}
        covered += range(start, end)
    assert covered == list(range(12))
    counts = [-(-n // chunk_size) for n in lengths]
    assert table.first.diff().tolist() == counts
    assert table.n_chunks == sum(counts)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (torch.tensor([1, 7]), ValueError, r"cu_seqlens\[0\] is 1, expected 0"),
        (torch.tensor([0, 5, 3, 7]), ValueError, "falls from 5 to 3 at index 2"),
        (torch.tensor([0, 6]), ValueError, "ends at 6, expected 7"),
        (torch.tensor([0]), ValueError, "2 or more"),
        (torch.tensor([[0, 7]]), ValueError, r"shape \(1, 2\)"),
        (torch.tensor([0.0, 7.0]), TypeError, "float32, expected int32 or int64"),
        ([0, 7], TypeError, "must be a tensor or Sequences, got list"),
        (Sequences.from_lengths([6]), ValueError, "covers 6 steps, expected 7"),
    ],
)
def test_errors(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Sequences.from_cu_seqlens(given, 7, CPU)


def test_errors_of_lengths() -> None:
    with pytest.raises(ValueError, match="lengths is empty"):
        Sequences.from_lengths([])
    with pytest.raises(ValueError, match=r"lengths\[1\] is -2"):
        Sequences.from_lengths([1, -2])
