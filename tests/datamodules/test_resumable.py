"""Batches as pure functions of their index: order, places, workers, seeds."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssm_modal.datamodules.resumable import (
    ResumableLoader,
    batches_done,
    derived_generator,
    derived_seed,
    global_rows,
    run_seed,
)


def make(index: int, rank: int, world: int) -> dict[str, torch.Tensor]:
    return {"at": torch.tensor([index, rank, world])}


def take(loader: ResumableLoader, n: int) -> list[list[int]]:
    return [batch["at"].tolist() for batch in itertools.islice(iter(loader), n)]


def fake_trainer(done: int = 0, rank: int = 0, world: int = 1, fn: str = "fit", task: Any = None) -> Any:
    progress = SimpleNamespace(total=SimpleNamespace(processed=done))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    state = SimpleNamespace(fn=fn)
    return SimpleNamespace(
        fit_loop=loop, global_rank=rank, world_size=world, state=state, lightning_module=task
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_where_the_run_stands(workers: int) -> None:
    trainer = fake_trainer(done=3, rank=1, world=2)
    loader = ResumableLoader.training(make, trainer, num_workers=workers)
    assert take(loader, 3) == [[3, 1, 2], [4, 1, 2], [5, 1, 2]]
    trainer.fit_loop.epoch_loop.batch_progress.total.processed = 7
    assert take(loader, 1) == [[7, 1, 2]]
    assert not hasattr(loader, "__len__")


def test_workers_draw_nothing_from_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    take(ResumableLoader.training(make, None, num_workers=1), 2)
    assert torch.equal(torch.rand(2), expected)


def test_evaluation_is_shared_out_once() -> None:
    loaders = [ResumableLoader.evaluation(make, 5, fake_trainer(9, rank, 2)) for rank in (0, 1)]
    assert [len(loader) for loader in loaders] == [3, 2]  # type: ignore[arg-type]
    seen = [batch[0] for loader in loaders for batch in take(loader, 10)]
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert seen[:3] == [0, 2, 4]


def test_a_prediction_leaves_out_what_its_task_has_kept() -> None:
    task = SimpleNamespace(kept_batches=lambda n_batches: frozenset({0, n_batches - 1}))
    found = []
    for fn in ("predict", "test"):
        loader = ResumableLoader.evaluation(make, 5, fake_trainer(fn=fn, task=task))
        assert len(loader) == len(list(loader))  # type: ignore[arg-type]
        found.append([at[0] for at in take(loader, 10)])
    assert found == [[1, 2, 3], [0, 1, 2, 3, 4]]


def test_two_processes_take_what_one_takes_in_twice_the_batch() -> None:
    for index in range(3):
        two = [*global_rows(index, 4, 0, 2), *global_rows(index, 4, 1, 2)]
        assert two == list(global_rows(index, 8, 0, 1))


def test_seeds_are_fixed_and_unrelated(monkeypatch: pytest.MonkeyPatch) -> None:
    # The value itself is part of the contract: a run resumed by a later version must see the same data.
    assert derived_seed(0, "train", 1) == 5503060842635148382
    parts = [
        (0, "train", 1),
        (0, "train", 2),
        (1, "train", 1),
        (0, "val", 1),
        (0, "train", 11),
        ("0", "train", 1),
    ]
    assert len({derived_seed(*p) for p in parts}) == len(parts)
    assert all(0 <= derived_seed(*p) < 2**63 for p in parts)
    a, b = derived_generator(1, "x"), derived_generator(1, "x")
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")
    assert (run_seed(None), run_seed(0), run_seed(4)) == (12, 0, 4)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert run_seed(None) == 0


def test_errors() -> None:
    assert batches_done(None) == 0
    with pytest.raises(ValueError, match="n_batches is -1"):
        ResumableLoader(make, n_batches=-1)
    with pytest.raises(ValueError, match="position is for endless loaders"):
        ResumableLoader(make, n_batches=1, position=lambda: 0)
    with pytest.raises(ValueError, match="rank is 2, expected 0 to world - 1 = 1"):
        ResumableLoader(make, rank=2, world=2)
    with pytest.raises(ValueError, match="num_workers is -1"):
        ResumableLoader(make, num_workers=-1)
