"""Batches that are a pure function of their index, so that a killed run goes on with the right one.

A data module that derives every batch from (seed, split, batch index, rank, world) needs no saved state: the
number of batches the trainer has finished, which is in every checkpoint, says which batch comes next.
Prefetching and workers change nothing, since what they read ahead is simply read again.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = Mapping[str, Tensor]
MakeBatch = Callable[[int, int, int], Any]


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of `parts`, e.g. `derived_seed(seed, "train", index)`.

    The same on every machine and in every process (unlike `hash`), and unrelated for neighbouring parts
    (unlike `seed + index`, where run 1 would repeat run 0 shifted by one batch).
    """
    digest = hashlib.blake2b("\x1f".join(f"{type(p).__name__}:{p}" for p in parts).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1


def derived_generator(*parts: int | str) -> torch.Generator:
    """A fresh CPU generator seeded with `derived_seed(*parts)`."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def run_seed(seed: int | None) -> int:
    """`seed`, or where it is None the seed of the run (`--seed_everything`), or 0 outside a run."""
    if seed is not None:
        return seed
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def global_rows(index: int, batch_size: int, rank: int, world: int) -> range:
    """The numbers of the training samples that process `rank` of `world` takes in batch `index`.

    Batch `index` covers samples `[index * world * batch_size, (index + 1) * world * batch_size)`, the ranks
    one after the other; so two processes with `batch_size` see in each step what one does with twice that.
    """
    start = (index * world + rank) * batch_size
    return range(start, start + batch_size)


def batches_done(trainer: Any) -> int:
    """Training batches that `trainer` (a Lightning Trainer, or None) has finished over the whole run.

    Read from the progress that Lightning keeps in every checkpoint, so it cannot disagree with the weights.
    """
    return 0 if trainer is None else int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


def check_same(trained_with: Mapping[str, Any], mine: Mapping[str, Any], trainer: Any) -> None:
    """Raise ValueError where a checkpoint's data module, whose state was `trained_with`, had another value of
    one of the names in `mine`. trainer: a Lightning Trainer, or None: outside a run."""
    going_on = trainer is None or trainer.state.fn == "fit"
    for name, value in mine.items():
        kept = trained_with.get(name)
        if kept != value:
            raise ValueError(
                f"the checkpoint was trained with {name} {kept}, got {value}; "
                + ("resume with the same data, or start a new run" if going_on else "give the data the same")
            )


class _Indexed(Dataset[Any]):
    """`make_batch` as a map-style data set, so that DataLoader's workers keep the order of the indices."""

    def __init__(self, make_batch: MakeBatch, rank: int, world: int) -> None:
        self.make_batch, self.rank, self.world = make_batch, rank, world

    def __getitem__(self, index: int) -> Any:
        return self.make_batch(index, self.rank, self.world)


class ResumableLoader:
    """Yields `make_batch(index, rank, world)` for rising `index`, starting where the run stands.

    `make_batch` must be a pure function of its arguments (draw random numbers from `derived_generator` only)
    and, with `num_workers > 0`, picklable where processes are spawned. Use `ResumableLoader.training` and
    `.evaluation`.

    Args:
        make_batch: `(index, rank, world) -> batch`.
        n_batches: batches of all processes together; None: endless (training; `trainer.max_steps` ends the
            run). Finite loaders hand index i to process `i % world`, none twice and none left out.
        position: the first index of an endless loader, asked for each time an iteration starts.
        rank, world: this process and how many there are.
        num_workers: processes that make batches ahead of time; 0 makes them in this one. Same batches either
        way.
        pin_memory: copy batches to pinned memory, for an asynchronous copy to a CUDA device.
        done: batches that a finite loader leaves out.
    """

    def __init__(
        self,
        make_batch: MakeBatch,
        *,
        n_batches: int | None = None,
        position: Callable[[], int] | None = None,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        done: Container[int] = frozenset(),
    ) -> None:
        if n_batches is not None and n_batches < 0:
            raise ValueError(f"n_batches is {n_batches}, expected 0 or more, or None for an endless loader")
        if n_batches is not None and position is not None:
            raise ValueError(
                "position is for endless loaders; a finite one (n_batches given) starts at its beginning"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}, expected 0 to world - 1 = {world - 1}")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}, expected 0 or more")
        self.make_batch, self.n_batches, self.position = make_batch, n_batches, position
        self.rank, self.world = rank, world
        self.num_workers, self.pin_memory, self.done = num_workers, pin_memory, done

    @classmethod
    def training(
        cls, make_batch: MakeBatch, trainer: Any = None, *, num_workers: int = 0, pin_memory: bool = False
    ) -> ResumableLoader:
        """An endless loader for `trainer` (None: one process, from batch 0)."""
        rank, world = _place(trainer)
        return cls(
            make_batch,
            position=lambda: batches_done(trainer),
            rank=rank,
            world=world,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )

    @classmethod
    def evaluation(
        cls,
        make_batch: MakeBatch,
        n_batches: int,
        trainer: Any = None,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> ResumableLoader:
        """A finite loader of `n_batches`, shared out over the processes of `trainer`.

        In a prediction a task may have `kept_batches(n_batches)`, the numbers of those of this process whose
        results it has already; they are left out.
        """
        rank, world = _place(trainer)
        predicting = trainer is not None and trainer.state.fn == "predict"
        ask = getattr(trainer.lightning_module, "kept_batches", None) if predicting else None
        return _Sized(
            make_batch,
            n_batches=n_batches,
            rank=rank,
            world=world,
            num_workers=num_workers,
            pin_memory=pin_memory,
            done=frozenset() if ask is None else ask(n_batches),
        )

    def indices(self) -> Iterable[int]:
        """The batch indices the next iteration will go through."""
        if self.n_batches is None:
            return itertools.count(self.position() if self.position is not None else 0)
        return [i for i in range(self.rank, self.n_batches, self.world) if i not in self.done]

    def __iter__(self) -> Iterator[Any]:
        indices = self.indices()
        if self.num_workers == 0 and not self.pin_memory:
            return (self.make_batch(i, self.rank, self.world) for i in indices)
        return iter(
            DataLoader(
                _Indexed(self.make_batch, self.rank, self.world),
                batch_size=None,
                sampler=indices,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory and torch.cuda.is_available(),
                # DataLoader draws a base seed at each start; without a generator of its own it would draw it
                # from the global one and shift every random number after it.
                generator=torch.Generator().manual_seed(0),
            )
        )


class _Sized(ResumableLoader):
    """A finite loader; only it has a length, as Lightning would count epochs of an endless one."""

    def __len__(self) -> int:
        indices = self.indices()
        assert isinstance(indices, list)
        return len(indices)


def _place(trainer: Any) -> tuple[int, int]:
    return (0, 1) if trainer is None else (int(trainer.global_rank), int(trainer.world_size))
