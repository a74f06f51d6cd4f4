"""The Markov baselines against counts made the slow way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.markov import Contexts, both_strands, contexts_of, counts, faded_sums, mixture, order_k, words


def drawn(n: int, seed: int) -> np.ndarray:
    digits = np.random.default_rng(seed).integers(0, 4, n)
    digits[n // 2] = 4
    return digits


def count(sequences: list[np.ndarray], context: tuple[int, ...], letter: int) -> int:
    """How often `letter` follows `context` on both strands."""
    whole = [*context, letter]
    return sum(
        strand[i : i + len(whole)].tolist() == whole
        for sequence in sequences
        for strand in both_strands(sequence)
        for i in range(len(strand) - len(whole) + 1)
    )


def test_words_and_strands() -> None:
    digits = np.array([0, 1, 2, 4, 3, 3, 1])
    assert words(digits, 2).tolist() == [-1, 1, 6, -1, -1, 15, 13]
    assert words(digits[:1], 2).tolist() == [-1]
    assert both_strands(digits)[1].tolist() == [2, 0, 0, 4, 1, 2, 3]
    # The letter before first: of base 3 (unknown) 2, then 1; in front of the beginning stands A.
    assert contexts_of(digits, 2).tolist() == [0, 0, 4, 9, 2, 12, 15]


def test_order_k_is_the_smoothed_share() -> None:
    train, test = [drawn(60, 0), drawn(40, 1)], drawn(30, 2)
    found = order_k(train, test, 2)
    assert np.isnan(found[:2]).all()
    assert np.isnan(found[15:18]).all()
    for t in (2, 9, 18, 29):
        context = tuple(test[t - 2 : t].tolist())
        own, total = count(train, context, int(test[t])), sum(count(train, context, b) for b in range(4))
        assert found[t] == pytest.approx(math.log((own + 1) / (total + 4)))
    assert counts(train, 2).sum() == sum((words(s, 3) >= 0).sum() for x in train for s in both_strands(x))


def test_counts_of_all_orders_from_one_table() -> None:
    train = [drawn(80, 3)]
    table = Contexts(train, 4)
    for order in (1, 2, 4):
        for context in ((0, 1, 2, 3), (2, 2, 1, 0)):
            code = np.array([sum(d << (2 * (3 - i)) for i, d in enumerate(context))])
            near_first = context[:order]
            # Words with an unknown letter among the longest order's context are in none.
            found = table.counts(code, order)[0]
            slow = [0] * 4
            for strand in both_strands(train[0]):
                for i in range(4, len(strand)):
                    before = strand[i - 4 : i][::-1]
                    if (strand[i - 4 : i + 1] < 4).all() and tuple(before[:order].tolist()) == near_first:
                        slow[strand[i]] += 1
            assert found.tolist() == slow


def test_the_mixture_weighs_by_what_came_before() -> None:
    train, test = [drawn(200, 4)], drawn(50, 5)
    forget = 0.9
    logs = np.empty((50, 2))
    for column, order in enumerate((1, 3)):
        table = Contexts(train, 3)
        for t in range(50):
            known = t >= order and (test[max(0, t - order) : t] < 4).all()
            n = table.counts(contexts_of(test, 3)[t : t + 1], order)[0] if known else np.zeros(4, dtype=int)
            logs[t, column] = math.log((n[min(3, test[t])] + 1) / (n.sum() + 4))
    logs[25] = 0
    found = mixture(train, test, (1, 3), forget)
    assert np.isnan(found[25])
    for t in (0, 1, 10, 26, 49):
        weights = np.exp(sum((forget ** (t - s) * logs[s] for s in range(t)), np.zeros(2)))
        assert found[t] == pytest.approx(
            math.log((weights * np.exp(logs[t])).sum() / weights.sum()), abs=1e-5
        )


@pytest.mark.parametrize("n", [1, 7, 8, 30])
def test_faded_sums(n: int) -> None:
    values = np.random.default_rng(0).standard_normal((n, 2)).astype(np.float32)
    found = faded_sums(values, 0.8, block=8)
    slow = [sum((0.8 ** (t - s) * values[s] for s in range(t)), np.zeros(2)) for t in range(n)]
    np.testing.assert_allclose(found, slow, atol=1e-6)
