"""The synthetic tasks' sequences: formats, distributions, determinism, splits, and the data module."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from ssm_modal.datamodules.synthetic import Setting, SyntheticDataModule, protocol_sequences
from ssm_modal.datamodules.synthetic_formats import (
    IGNORE,
    MQAR,
    Copying,
    Format,
    InductionHeads,
    SelectiveCopying,
    choose,
    fractions,
    integers,
    make_format,
    raw_words,
    shuffled,
    stream_key,
)

FORMATS: list[Format] = [
    InductionHeads(3),
    InductionHeads(64),
    InductionHeads(257),
    Copying(33),
    Copying(100),
    Copying(21, tokens=5),
    SelectiveCopying(33),
    SelectiveCopying(128),
    SelectiveCopying(22, tokens=7),
    MQAR(64, pairs=4),
    MQAR(16, pairs=4, vocab_size=32),
    MQAR(256, pairs=64),
]

FROZEN_INDUCTION = [[11, 0, 0, 8, 13, 12, 15, 14, 0, 12, 10, 15]]
FROZEN_MQAR = [[7, 30, 13, 16, 9, 25, 13, 30, 7, 3, 14, 14]]


def chi_square(counts: np.ndarray, expected: np.ndarray | float) -> float:
    """Chi-square statistic in standard deviations above its mean."""
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


# ---------------------------------------------------------------------- formats


@pytest.mark.parametrize("length", [3, 4, 64, 257])
def test_induction_heads_holds_the_special_token_twice_and_asks_for_what_followed_it(length: int) -> None:
    made = InductionHeads(length).generate(0, "train", 0, 2000)
    ids, labels = made["ids"], made["labels"]
    assert ids.dtype == labels.dtype == np.int64
    assert ids.shape == labels.shape == (2000, length)
    special = ids == 15
    assert (special.sum(1) == 2).all()
    assert special[:, -1].all()
    first = special.argmax(1)
    assert first.min() == 0
    assert first.max() == length - 3
    answer = ids[np.arange(2000), first + 1]
    assert (answer < 15).all()
    assert (labels[:, :-1] == IGNORE).all()
    assert (labels[:, -1] == answer).all()
    assert ids.min() >= 0


def test_induction_heads_draws_positions_and_tokens_uniformly() -> None:
    ids = InductionHeads(34).generate(1, "train", 0, 32_000)["ids"]
    positions = np.bincount((ids == 15).argmax(1), minlength=32)
    assert positions.size == 32
    assert abs(chi_square(positions, 1000)) < 4
    ordinary = ids[ids != 15]
    assert abs(chi_square(np.bincount(ordinary, minlength=15), ordinary.size / 15)) < 4


@pytest.mark.parametrize("length", [33, 64, 100])
def test_copying_is_tokens_gap_marker_fillers(length: int) -> None:
    made = Copying(length).generate(0, "train", 0, 500)
    ids, labels = made["ids"], made["labels"]
    copied = ids[:, :16]
    assert (copied < 14).all()
    assert (ids[:, 16 : length - 17] == 14).all()
    assert (ids[:, length - 17] == 15).all()
    assert (ids[:, length - 16 :] == 14).all()
    assert (labels[:, : length - 16] == IGNORE).all()
    assert (labels[:, length - 16 :] == copied).all()
    assert ids[:, 16 : length - 17].shape[1] == length - 33, "the gap is L - 33 fillers"


@pytest.mark.parametrize("length", [33, 64, 4096])
def test_selective_copying_scatters_the_tokens_over_the_first_positions(length: int) -> None:
    made = SelectiveCopying(length).generate(0, "train", 0, 200)
    ids, labels = made["ids"], made["labels"]
    tokens = ids < 14
    assert (tokens.sum(1) == 16).all()
    assert not tokens[:, length - 17 :].any()
    assert (ids[:, length - 17] == 15).all()
    assert ((ids == 15).sum(1) == 1).all()
    assert (ids[:, length - 16 :] == 14).all()
    for row in range(200):
        assert (labels[row, length - 16 :] == ids[row][tokens[row]]).all()
    assert (labels[:, : length - 16] == IGNORE).all()


def test_selective_copying_takes_every_position_alike() -> None:
    ids = SelectiveCopying(45, tokens=4).generate(0, "train", 0, 20_000)["ids"]
    places = (ids[:, :40] < 14).sum(0)
    # Without replacement the counts vary a little less than independent draws would.
    assert abs(chi_square(places, 2000.0)) < 4


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (256, 64), (1024, 256)])
def test_mqar_holds_pairs_then_one_query_a_key(length: int, pairs: int) -> None:
    made = MQAR(length, pairs=pairs).generate(0, "train", 0, 50)
    ids, labels = made["ids"], made["labels"]
    keys, values = ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2]
    assert keys.min() >= 1
    assert keys.max() <= 4095
    assert values.min() >= 4096
    assert values.max() <= 8191
    asked = labels != IGNORE
    assert (asked.sum(1) == pairs).all()
    assert not asked[:, : 2 * pairs].any()
    assert not asked[:, 1::2].any(), "queries stand on the first position of a slot of two"
    for row in range(50):
        assert len(set(keys[row])) == pairs
        assert len(set(values[row])) == pairs
        value_of = dict(zip(keys[row], values[row], strict=True))
        at = np.flatnonzero(asked[row])
        assert sorted(ids[row, at]) == sorted(keys[row]), "each key is queried once"
        assert [value_of[k] for k in ids[row, at]] == list(labels[row, at])


def test_mqar_fills_with_zeros_when_asked_and_with_the_whole_vocabulary_otherwise() -> None:
    plain = MQAR(64, pairs=4, random_non_queries=False).generate(0, "train", 0, 300)
    rest = plain["labels"] == IGNORE
    rest[:, :8] = False
    assert (plain["ids"][rest] == 0).all()
    noisy = MQAR(64, pairs=4, vocab_size=32).generate(0, "train", 0, 3000)
    rest = noisy["labels"] == IGNORE
    rest[:, :8] = False
    counts = np.bincount(noisy["ids"][rest], minlength=32)
    assert abs(chi_square(counts, counts.sum() / 32)) < 4


def test_mqar_slots_have_the_distribution_of_weighted_choice_without_replacement() -> None:
    """The first pair's slot has the power law itself; the second's is what numpy's `choice` gives."""
    n = 40_000
    made = MQAR(32, pairs=3, vocab_size=64).generate(0, "train", 0, n)
    slots = 13
    power = np.arange(1, slots + 1) ** (0.01 - 1)
    power /= power.sum()
    at = np.stack(
        [
            ((made["ids"] == made["ids"][:, 2 * i, None]) & (made["labels"] != IGNORE)).argmax(1)
            for i in range(3)
        ],
        axis=1,
    )
    slot = (at - 6) // 2
    first = np.bincount(slot[:, 0], minlength=slots)
    assert abs(chi_square(first, n * power)) < 4
    second = np.array([(power * power[j] / (1 - power))[np.arange(slots) != j].sum() for j in range(slots)])
    assert abs(chi_square(np.bincount(slot[:, 1], minlength=slots), n * second)) < 4


def test_mqar_keys_and_values_do_not_depend_on_their_place() -> None:
    ids = MQAR(16, pairs=4, vocab_size=16).generate(0, "train", 0, 20_000)["ids"]
    for place in range(4):
        keys = np.bincount(ids[:, 2 * place] - 1, minlength=7)
        values = np.bincount(ids[:, 2 * place + 1] - 8, minlength=8)
        assert abs(chi_square(keys, 20_000 / 7)) < 4
        assert abs(chi_square(values, 20_000 / 8)) < 4


def test_choose_and_shuffled_give_every_arrangement_alike() -> None:
    words = raw_words(stream_key("t"), 0, 60_000, 6)
    chosen = choose(words[:, :3], 5)
    assert all(len(set(row)) == 3 for row in chosen[:200])
    code = (shuffled(chosen, words[:, 3:]) * [25, 5, 1]).sum(1)
    _, counts = np.unique(code, return_counts=True)
    assert counts.size == 5 * 4 * 3
    assert abs(chi_square(counts, 1000)) < 4
    assert (choose(words[:100, :5], 5).sum(1) == 10).all(), "all of five is 0 ... 4"


def test_integers_cover_their_range_and_nothing_else() -> None:
    edges = np.array([[0, 2**64 - 1]], np.uint64)
    assert integers(edges, 15).tolist() == [[0, 0, 14, 14]]
    assert fractions(edges).max() < 1
    assert integers(np.array([[1 << 63]], np.uint64), 8).tolist() == [[0, 4]], "the low half comes first"


# ---------------------------------------------------------------------- determinism


@pytest.mark.parametrize("made", FORMATS, ids=lambda f: f"{f.task}-{f.length}")
def test_a_range_holds_the_same_sequences_however_it_is_asked_for(made: Format) -> None:
    whole = made.generate(3, "train", 5, 25)
    pieces = [made.generate(3, "train", a, b) for a, b in ((5, 6), (6, 19), (19, 19), (19, 25))]
    for name in ("ids", "labels"):
        joined = np.concatenate([p[name] for p in pieces])  # type: ignore[literal-required]
        assert (whole[name] == joined).all()  # type: ignore[literal-required]
    assert ((whole["labels"] != IGNORE).sum(1) == made.answers).all()
    assert whole["ids"].max() < made.vocab_size


def test_the_stream_is_the_same_everywhere() -> None:
    """Written down once: a change here would change every published run."""
    ids = InductionHeads(12).generate(0, "test", 7, 8)["ids"]
    assert ids.tolist() == FROZEN_INDUCTION
    assert MQAR(12, pairs=2, vocab_size=32).generate(0, "train", 0, 1)["ids"].tolist() == FROZEN_MQAR


def test_splits_seeds_lengths_and_tasks_have_streams_of_their_own() -> None:
    base = InductionHeads(64).generate(0, "train", 0, 200)["ids"]
    others = [
        InductionHeads(64).generate(0, "test", 0, 200)["ids"],
        InductionHeads(64).generate(0, "validation", 0, 200)["ids"],
        InductionHeads(64).generate(1, "train", 0, 200)["ids"],
        InductionHeads(65).generate(0, "train", 0, 200)["ids"][:, :64],
    ]
    for other in others:
        # Of 15 ordinary tokens two unrelated sequences share one position in fifteen.
        assert (base == other).mean() < 0.1
        assert not {tuple(r) for r in base} & {tuple(r) for r in other}
    assert len({tuple(r) for r in base}) == 200


def test_neighbouring_seeds_share_nothing() -> None:
    keys = {stream_key("induction_heads", split, seed) for split in ("train", "test") for seed in range(500)}
    assert len(keys) == 1000
    assert stream_key(1, 23) != stream_key(12, 3)


def test_generation_keeps_up_with_training() -> None:
    made = MQAR(256, pairs=64)
    made.generate(0, "train", 0, 256)
    began = time.process_time()
    for i in range(4):
        made.generate(0, "train", 256 * i, 256 * (i + 1))
    assert 1024 / (time.process_time() - began) > 5000, "sequences a second on one core"


def test_a_sequence_of_a_million_tokens() -> None:
    ids = InductionHeads(1 << 20).generate(0, "test", 63, 64)["ids"]
    assert ids.shape == (1, 1 << 20)
    assert (ids == 15).sum() == 2


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("task", "length", "options", "words"),
    [
        ("induction_heads", 2, {}, "length is 2, expected at least 3"),
        ("copying", 32, {}, "length is 32, expected at least 33"),
        ("selective_copying", 40, {"tokens": 20}, "expected at least 41"),
        ("mqar", 30, {"pairs": 8}, "expected at least 32"),
        ("mqar", 33, {"pairs": 8}, "even length"),
        ("mqar", 64, {"vocab_size": 16}, "vocab_size is 16, expected an even number of at least 18"),
        ("mqar", 64, {"pairs": 0}, "pairs is 0"),
        ("mqar", 64, {"power_a": 0.0}, "power_a is 0.0"),
        ("induction_heads", 64, {"vocab_size": 2}, "vocab_size is 2, expected at least 3"),
        ("copying", 64, {"tokens": 0}, "tokens is 0"),
        ("recall", 64, {}, "task is 'recall', expected one of induction_heads, copying"),
    ],
)
def test_what_does_not_fit_is_refused(task: str, length: int, options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_format(task, length, **options)


def test_unknown_options_lengths_and_splits_are_refused() -> None:
    with pytest.raises(TypeError, match="pairs is no option of copying, expected one of vocab_size, tokens"):
        make_format("copying", 64, pairs=3)
    with pytest.raises(TypeError, match=r"length is 64\.0, expected a whole number"):
        make_format("copying", 64.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split is 'dev', expected one of train"):
        InductionHeads(8).generate(0, "dev", 0, 1)
    with pytest.raises(ValueError, match="start is 3 and stop is 1"):
        InductionHeads(8).generate(0, "train", 3, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sequences": 0}, "sequences is 0"),
        ({"train_lengths": [64, 128]}, "expected the longest to be length = 256"),
        ({"repeat": True}, "repeat is True, expected train_settings"),
        ({"repeat": True, "train_settings": [Setting(256)]}, "repeat is True, expected train_settings"),
        ({"lengths": []}, "lengths is empty"),
        ({"lengths": [2]}, "length is 2, expected at least 3"),
        ({"train_lengths": [256], "train_settings": [Setting(256)]}, "expected one of them"),
        ({"lengths": [256], "test_settings": [Setting(256)]}, "expected one of them"),
        ({"test_settings": [Setting(256, pairs=4)]}, "pairs is 4 for task induction_heads"),
        ({"task": "recall"}, "task is 'recall'"),
    ],
)
def test_the_data_module_refuses_bad_arguments_at_once(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SyntheticDataModule(**options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- data module


def test_two_processes_see_what_one_sees_with_twice_the_batch() -> None:
    settings = [Setting(64, pairs=4, sequences=64), Setting(128, pairs=8, sequences=32)]
    one = SyntheticDataModule("mqar", length=128, batch_size=8, train_settings=settings, seed=5)
    two = SyntheticDataModule("mqar", length=128, batch_size=4, train_settings=settings, seed=5)
    for index in (0, 1, 17):
        whole = one.train_batch(index)
        halves = [two.train_batch(index, rank, 2) for rank in (0, 1)]
        for name in ("ids", "labels"):
            assert torch.equal(whole[name], torch.cat([h[name] for h in halves]))


def test_an_epoch_of_settings_has_their_numbers_of_sequences_and_fresh_ones_every_time() -> None:
    settings = [Setting(64, pairs=4, sequences=40), Setting(128, pairs=8, sequences=19)]
    data = SyntheticDataModule("mqar", length=128, batch_size=8, train_settings=settings, seed=0)
    orders = []
    seen: set[tuple[int, ...]] = set()
    for epoch in range(3):
        batches = [data.train_batch(7 * epoch + i) for i in range(7)]
        lengths = [b["ids"].shape[1] for b in batches]
        assert sorted(lengths) == [64] * 5 + [128] * 2, "40 // 8 and 19 // 8 batches"
        orders.append(lengths)
        seen |= {tuple(row[:8].tolist()) for b in batches for row in b["ids"]}
    assert len({tuple(o) for o in orders}) > 1, "the order is drawn anew each epoch"
    assert len(seen) == 3 * 7 * 8


def test_repeat_gives_the_same_sequences_in_every_epoch() -> None:
    settings = [Setting(64, pairs=4, sequences=40), Setting(128, pairs=8, sequences=16)]
    data = SyntheticDataModule("mqar", length=128, batch_size=8, train_settings=settings, seed=0, repeat=True)

    def epoch(number: int) -> set[tuple[int, ...]]:
        return {tuple(row.tolist()) for i in range(7) for row in data.train_batch(7 * number + i)["ids"]}

    assert len(epoch(0)) == 56
    assert epoch(0) == epoch(1) == epoch(2)


def test_train_lengths_take_turns_and_may_hold_the_number_of_tokens() -> None:
    data = SyntheticDataModule(
        length=256, batch_size=4, train_lengths=[16, 64, 256], constant_tokens=True, seed=1
    )
    for around in range(4):
        shapes = [tuple(data.train_batch(3 * around + i)["ids"].shape) for i in range(3)]
        assert sorted(shapes) == [(4, 256), (16, 64), (64, 16)]


def test_validation_has_the_trained_length_first_and_every_sequence_once() -> None:
    data = SyntheticDataModule(length=64, val_lengths=[256], val_sequences=10, val_tokens=512, seed=0)
    batches = list(data.val_dataloader())
    assert [tuple(b["ids"].shape) for b in batches] == [(8, 64), (2, 64)] + [(2, 256)] * 5
    rows = {tuple(r.tolist()) for b in batches[:2] for r in b["ids"]}
    assert rows == {tuple(r) for r in InductionHeads(64).generate(0, "validation", 0, 10)["ids"]}


def test_the_protocol_numbers_of_test_sequences() -> None:
    assert [protocol_sequences(1 << k) for k in (6, 14, 15, 16, 17, 18, 20)] == [
        1024,
        1024,
        512,
        256,
        128,
        64,
        64,
    ]
    data = SyntheticDataModule(lengths=[64, 1 << 16], seed=0)
    assert [s.sequences for s in data.test_settings] == [1024, 256]
    assert [s.sequences for s in SyntheticDataModule(lengths=[64], sequences=3).test_settings] == [3]
    assert [int(b["setting"]) for b in data.test_dataloader()] == [0, 1]
    batch = data.test_batch(0, 2, 5)
    assert (batch["ids"].numpy() == InductionHeads(64).generate(0, "test", 2, 5)["ids"]).all()


def test_without_a_seed_the_run_s_seed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    data = SyntheticDataModule()
    assert data.seed == 7
    assert torch.equal(data.train_batch(3)["ids"], SyntheticDataModule(seed=7).train_batch(3)["ids"])
    assert not torch.equal(data.train_batch(3)["ids"], SyntheticDataModule(seed=8).train_batch(3)["ids"])


def test_workers_make_the_same_batches() -> None:
    alone = iter(SyntheticDataModule(length=32, seed=0).train_dataloader())
    helped = iter(SyntheticDataModule(length=32, seed=0, num_workers=1).train_dataloader())
    for _ in range(3):
        assert torch.equal(next(alone)["ids"], next(helped)["ids"])


@pytest.mark.parametrize(
    ("task", "length", "chance"),
    [
        ("induction_heads", 64, 1 / 15),
        ("copying", 64, 1 / 14),
        ("selective_copying", 64, 1 / 14),
        ("mqar", 64, 2 / 8192),
    ],
)
def test_vocabulary_and_chance(task: str, length: int, chance: float) -> None:
    data = SyntheticDataModule(task, length=length)  # type: ignore[arg-type]
    assert data.vocab_size == (8192 if task == "mqar" else 16)
    assert data.chance == pytest.approx(chance)
