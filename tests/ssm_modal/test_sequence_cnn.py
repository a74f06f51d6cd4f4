"""The convolutional baseline: against a plain stack of layers, packed equals separate, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssm_modal
from ssm_modal.attribution import attribute
from ssm_modal.errors import ConfigError, StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.models import SequenceCNN
from tests.tolerances import OUTPUT, assert_close

FP64 = torch.float64


def small(**more: Any) -> SequenceCNN:
    model = ssm_modal.create_model("dna_cnn", **{"d_model": 6, "kernel": 5, "n_classes": 3, **more})
    assert isinstance(model, SequenceCNN)
    for norm in model.norms:
        assert isinstance(norm, nn.BatchNorm1d)
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
        nn.init.normal_(norm.bias)
    return model.to(FP64)


def plain(model: SequenceCNN, ids: Tensor) -> Tensor:
    hidden = nn.functional.one_hot(ids, model.config.vocab_size).to(FP64).transpose(1, 2)
    for i, (conv, norm) in enumerate(zip(model.convs, model.norms)):
        hidden = norm(conv(hidden)).relu()
        if i < 2:
            hidden = nn.functional.max_pool1d(hidden, 2, ceil_mode=True)
    return model.head(hidden.amax(-1))


def test_equals_a_plain_stack_and_packed_equals_separate() -> None:
    model = small().eval()
    lengths = (9, 4, 13, 1, 2)
    ids = torch.randint(0, 9, (1, sum(lengths)))
    seqs = Sequences.from_lengths(lengths)
    logits, state = model(ids, seqs=seqs)
    assert state is None
    assert logits.shape == (5, 3)
    for row, (start, n) in enumerate(zip(seqs.starts, lengths)):
        own = ids[:, start : start + n]
        assert_close(model(own)[0][0], logits[row], OUTPUT[FP64], f"sequence {row}")
        if n > 2:
            assert_close(plain(model, own)[0], logits[row], OUTPUT[FP64], f"sequence {row}")


def test_statistics_of_training_are_over_the_steps_there_are() -> None:
    model = small(dropout=0.0).train()
    ids = torch.randint(0, 9, (1, 12))
    before = model.norms[0].running_mean.clone()  # type: ignore[union-attr, operator]
    model(ids, seqs=Sequences.from_lengths((9, 3)))
    vectors = nn.functional.one_hot(ids, 9).to(FP64).transpose(1, 2)
    steps = torch.cat([model.convs[0](part) for part in vectors.split((9, 3), dim=2)], dim=2)
    expected = 0.9 * before + 0.1 * steps.mean((0, 2))
    assert_close(model.norms[0].running_mean, expected, 1e-10)  # type: ignore[arg-type]


def test_a_decision_is_attributed_to_bases() -> None:
    model = small().eval()
    assert not model.one_hot.weight.requires_grad
    ids = torch.randint(0, 4, (2, 12))
    found = attribute(model, ids, target=1)
    # Of one-hot vectors: the gradient by the entry of the base that is there.
    vectors = nn.functional.one_hot(ids, 9).to(FP64).requires_grad_()
    hidden = vectors.transpose(1, 2)
    for i, (conv, norm) in enumerate(zip(model.convs, model.norms)):
        hidden = norm(conv(hidden)).relu()
        hidden = nn.functional.max_pool1d(hidden, 2, ceil_mode=True) if i < 2 else hidden
    (grad,) = torch.autograd.grad(model.head(hidden.amax(-1))[:, 1].sum(), vectors)
    assert_close(found.relevance, (grad * vectors).sum(-1), 1e-10)


def test_errors() -> None:
    model = small().eval()
    with pytest.raises(ConfigError, match="kernel is 4, expected an odd number"):
        small(kernel=4)
    with pytest.raises(ConfigError, match=r"dropout is 1\.0"):
        small(dropout=1.0)
    with pytest.raises(ValueError, match="a sequence has no step"):
        model(torch.zeros(1, 3, dtype=torch.int64), seqs=Sequences.from_lengths((3, 0)))
    with pytest.raises(ValueError, match="the largest id is 9, expected 0 to 8"):
        model(torch.tensor([[9]]))
    state = ssm_modal.create_model("dna_lm", d_model=8, n_layers=1).init_state(1)
    with pytest.raises(StateError, match="SequenceCNN: was given a state"):
        model(torch.zeros(1, 3, dtype=torch.int64), state)
