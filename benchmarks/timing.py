"""Times and peak memory: candidates checked, then timed in turn, round after round.

A machine that slows down slows all candidates. On CUDA a call is timed by events; the GPU is kept busy while
the host prepares it, so that what is timed is the work and not the launching (`Clock`), or the call is
captured in a CUDA graph and its replay timed. On the CPU it is the wall clock.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from benchmarks.harness import Check, Figure, Options, Report

GIB = 2**30
# What a peer's error may be beside our limit: enough to see that it computes the same thing.
SLACK = 5.0
# Event pairs and the clock of a GPU resolve about a microsecond: short calls are timed several at a time.
SHORTEST = 1e-3
# A launch queue holds about a thousand kernels, so keeping the GPU busy for longer than this gains nothing.
LONGEST_LEAD = 10e-3

How = Literal["events", "graph", "wall"]


@dataclass(frozen=True)
class Candidate:
    """One way of doing what is timed.

    run: one call; what it returns is what stays alive (outputs, gradients). verify: the checks of the first
    call's result; ours must pass them, a peer must come within SLACK of the limits. holds: the tensors that
    `run` reads, counted in its peak memory. slow: takes fewer rounds.
    """

    name: str
    run: Callable[[], object]
    verify: Callable[[object], list[Check]] | None = None
    holds: Callable[[], Iterable[Tensor]] = tuple
    slow: bool = False


class Sampler(Protocol):
    def sample(self) -> float:
        """Seconds of one call."""


class Wall:
    """The wall clock from an idle device to an idle device: what a caller waits for."""

    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        self.run, self.device = run, device

    def sample(self) -> float:
        wait(self.device)
        start = time.perf_counter()
        self.run()
        wait(self.device)
        return time.perf_counter() - start


class Clock:
    """Calls between two CUDA events, behind a pause of the GPU as long as the host needs to prepare them."""

    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        self.run, self.device = run, device
        wait(device)
        start = time.perf_counter()
        run()
        host = time.perf_counter() - start
        wait(device)
        whole = time.perf_counter() - start
        self.calls = max(1, min(10, math.ceil(SHORTEST / max(whole, 1e-6))))
        self.lead = min(1.5 * host * self.calls, LONGEST_LEAD)

    def sample(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait(self.device)
        torch.cuda._sleep(int(self.lead * 2e9))  # cycles of a clock of about 2 GHz
        start.record()
        for _ in range(self.calls):
            self.run()
        end.record()
        wait(self.device)
        return start.elapsed_time(end) / 1e3 / self.calls


class Replay:
    """Replays of a CUDA graph of the call, between two events."""

    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        self.device = device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.kept = run()
        once = self._seconds(3)
        self.calls = max(3, min(200, math.ceil(SHORTEST / max(once, 1e-7))))

    def _seconds(self, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait(self.device)
        start.record()
        for _ in range(calls):
            self.graph.replay()
        end.record()
        wait(self.device)
        return start.elapsed_time(end) / 1e3 / calls

    def sample(self) -> float:
        return self._seconds(self.calls)


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give unused memory back, after an out of memory or between large problems."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.empty_cache()


def sampler(run: Callable[[], object], device: torch.device, how: How) -> Sampler:
    """What times `run` on `device`; on the CPU always the wall clock."""
    if device.type != "cuda" or how == "wall":
        return Wall(run, device)
    return Replay(run, device) if how == "graph" else Clock(run, device)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind `tensors`, views of one storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_gib(candidate: Candidate, device: torch.device) -> float | None:
    """The most that one call of `candidate` holds at a time, its inputs included, its results kept alive.

    What others hold meanwhile is not counted. None on a device that does not count.
    """
    if device.type != "cuda":
        return None
    wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = candidate.run()
    wait(device)
    peak = torch.cuda.max_memory_allocated(device) - before + bytes_of(candidate.holds())
    del kept
    return peak / GIB


def in_turn(
    samplers: dict[str, Sampler], rounds: dict[str, int], seconds: float
) -> dict[str, tuple[float, ...]]:
    """Seconds of each round of each sampler, one after the other, `rounds[name]` times each.

    Ends early, after at least one round, when all together have taken `seconds`.
    """
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    began = time.perf_counter()
    for turn in range(max(rounds.values(), default=0)):
        if turn and time.perf_counter() - began > seconds:
            break
        for name, one in samplers.items():
            if turn < rounds[name]:  # a candidate with fewer rounds takes part in the first ones
                taken[name].append(one.sample())
    return {name: tuple(t) for name, t in taken.items()}


def admit(report: Report, what: str, candidate: Candidate) -> bool:
    """One call of `candidate` to compile and check it; whether it may be timed. Says in a note why not.

    Checks of ours go to the report. What a peer raises leaves the peer out; what ours raises passes on.
    """
    own = candidate.name == report.ours
    try:
        result = candidate.run()
        checks = candidate.verify(result) if candidate.verify is not None else []
        del result
    except torch.OutOfMemoryError:
        report.notes.append(f"{what}: {candidate.name} runs out of memory")
        return False
    except Exception as error:
        if own:
            raise
        first = (str(error).splitlines() or [""])[0]
        report.notes.append(f"{what}: {candidate.name} left out, {type(error).__name__}: {first}")
        return False
    if own:
        known = {check.name for check in report.checks}
        report.checks += [check for check in checks if check.name not in known or not check.passed]
        return all(check.passed for check in checks)
    off = [check for check in checks if not check.error <= SLACK * check.limit]
    if off:
        worst = max(off, key=lambda check: check.error / check.limit)
        report.notes.append(
            f"{what}: {candidate.name} left out, its {worst.name} is off by {worst.error:.1e}"
        )
    return not off


def settle_allocator() -> None:
    """Bring the C library's allocator to where a long run has it.

    It returns a large block to the system at once, until one below 32 MiB was freed for the first time; then
    it keeps blocks of that size. Before, each call pays for fresh pages, after, none does, so without this
    the time of a call would depend on what ran before it.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def measure(
    report: Report,
    what: str,
    candidates: Iterable[Candidate],
    options: Options,
    device: torch.device,
    *,
    how: How = "events",
    memory: bool = False,
    times: bool = True,
) -> None:
    """Check `candidates` (ours first), then add to `report` their times of `what` and, if asked, peak memory.

    Nothing is measured once a check of ours has failed, in this comparison or an earlier one.
    """
    admitted: list[Candidate] = []
    settle_allocator()
    for candidate in candidates:
        fine = report.correct and admit(report, what, candidate)
        free(device)
        if not report.correct:
            return
        if fine:
            admitted.append(candidate)
    samplers: dict[str, Sampler] = {}
    for candidate in admitted:
        try:
            if memory:
                peak = peak_gib(candidate, device)
                if peak is not None:
                    report.figures.append(Figure(peak_of(what), candidate.name, (peak,), "GiB"))
            if times:
                samplers[candidate.name] = _sampler(report, what, candidate, device, how)
        except torch.OutOfMemoryError:
            report.notes.append(f"{what}: {candidate.name} runs out of memory")
            free(device)
    few = {
        c.name: min(options.repeats, options.slow_repeats if c.slow else options.repeats) for c in admitted
    }
    taken = in_turn(samplers, {name: few[name] for name in samplers}, options.seconds)
    for name, seconds in taken.items():
        report.figures.append(Figure(what, name, tuple(1e3 * s for s in seconds)))
    samplers.clear()
    free(device)


def peak_of(what: str) -> str:
    """The name of the figure for the peak memory of `what`."""
    return f"peak of {what}"


def _sampler(report: Report, what: str, candidate: Candidate, device: torch.device, how: How) -> Sampler:
    try:
        return sampler(candidate.run, device, how)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if how != "graph":
            raise
        first = (str(error).splitlines() or [""])[0]
        report.notes.append(
            f"{what}: {candidate.name} cannot be captured in a graph ({first}), timed by events"
        )
        return sampler(candidate.run, device, "events")


def host_microseconds(run: Callable[[], object], device: torch.device, calls: int = 20) -> float:
    """Median microseconds that the host spends in one call of `run`, the device left to catch up."""
    wait(device)
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    wait(device)
    return 1e6 * statistics.median(taken)
