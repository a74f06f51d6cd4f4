"""`python -m benchmarks.streaming`: the time that a causal audio classifier takes for each chunk of a stream,
on one CPU core; `--help` lists the options.

Before anything is timed, the stream's probabilities are checked against those of the whole at once.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import ssm_modal
from ssm_modal.generation import StreamingClassifier
from ssm_modal.models import SequenceClassifier

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Timing:
    """Chunks of `ms`: the median and the 99th percentile of a chunk's time in ms, and the time that the
    chunks take as a part of the time they last: by the clock, and counting the work of the core alone, which
    other programs do not lengthen."""

    ms: float
    median: float
    late: float
    real_time_factor: float
    work_factor: float


def measure(model: SequenceClassifier, wave: Tensor, rate: int, ms: float) -> Timing:
    """Stream `wave`, (n,), of `rate` samples a second, in chunks of `ms`; whole chunks alone count."""
    size = max(1, round(ms * rate / 1000))
    chunks = [chunk[None] for chunk in wave.split(size) if chunk.shape[0] == size]
    if len(chunks) < 2:
        raise ValueError(f"{wave.shape[0]} samples hold {len(chunks)} chunks of {size}, expected 2 or more")
    stream = StreamingClassifier(model)
    for chunk in chunks[:5]:
        stream.feed(chunk)
    stream.reset()
    taken = []
    worked = time.process_time()
    for chunk in chunks:
        began = time.perf_counter()
        stream.feed(chunk)
        taken.append(time.perf_counter() - began)
    worked = time.process_time() - worked
    late = sorted(taken)[min(len(taken) - 1, int(0.99 * len(taken)))]
    lasts = len(chunks) * size / rate
    return Timing(ms, 1000 * statistics.median(taken), 1000 * late, sum(taken) / lasts, worked / lasts)


def difference(model: SequenceClassifier, wave: Tensor, size: int) -> float:
    """The greatest difference between probabilities of `wave` by chunks of `size` and at once."""
    stream, probabilities = StreamingClassifier(model), torch.zeros(())
    for chunk in wave.split(size):
        probabilities = stream.feed(chunk[None])
    whole = StreamingClassifier(model).feed(wave[None])
    return float((probabilities - whole).abs().max())


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__)
    add = parser.add_argument
    add("--model", default="audio_classifier_causal", help="a causal audio classifier (default: %(default)s)")
    add("--rate", type=int, default=8000, help="samples a second (default: %(default)s)")
    add("--seconds", type=float, default=20.0, help="length of the stream (default: %(default)s)")
    add("--chunk-ms", type=float, nargs="+", default=[20.0, 50.0, 100.0, 250.0], help="chunks, in ms")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ssm_modal.create_model(options.model)
    if not isinstance(model, SequenceClassifier):
        parser.error(f"--model {options.model}: is a {type(model).__name__}, expected a SequenceClassifier")
    wave = 0.1 * torch.randn(round(options.seconds * options.rate))
    error = difference(model, wave[: 2 * options.rate], max(1, options.rate // 50))
    right = error <= TOLERANCE
    say(
        f"check: {'ok' if right else 'FAILED'}, probabilities by chunks differ by {error:.1e} from those of "
        f"the whole (at most {TOLERANCE:g})"
    )
    if not right:
        return 1
    size = sum(p.numel() for p in model.parameters())
    say(
        f"{options.model}, {size:,} parameters, {options.rate} Hz, one thread, torch {torch.__version__}, "
        f"{platform.processor() or platform.machine()}"
    )
    say(f"{'chunk ms':>8}  {'median ms':>9}  {'99 % ms':>8}  {'real-time factor':>16}  {'of CPU time':>11}")
    for ms in options.chunk_ms:
        found = measure(model, wave, options.rate, ms)
        say(
            f"{ms:>8g}  {found.median:9.2f}  {found.late:8.2f}  {found.real_time_factor:16.4f}  "
            f"{found.work_factor:11.4f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
