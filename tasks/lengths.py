"""Accuracy at a list of lengths, long ones streamed through the model's state.

`evaluate_lengths(model, source)` tests a model on a source of test sequences, say a `SyntheticDataModule`:

    from ssm_modal.datamodules.synthetic import SyntheticDataModule
    from ssm_modal.tasks.lengths import evaluate_lengths, print_table
    results = evaluate_lengths(model, SyntheticDataModule("induction_heads", lengths=[256, 16384, 1048576]))
    print_table(results)

A sequence longer than `segment` is cut up, and the state that the model returns for one segment enters the
next, so that what a length needs beside the ids is what one segment needs. The model is either one of this
package (`hidden` and `logits`: these are computed at labelled positions alone) or any module whose
`model(ids, state)` returns `(logits, state)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ssm_modal.io.atomic import atomic_write

IGNORE = -100

SEGMENT = 1 << 13
"""Tokens of a sequence that go through the model at once."""

TOKENS_IN_FLIGHT = {"cpu": 1 << 14, "cuda": 1 << 19}
"""Tokens of all sequences of a batch that go through the model at once, by kind of device."""


class Source(Protocol):
    """Where test sequences come from. `SyntheticDataModule` is one."""

    @property
    def test_settings(self) -> Sequence[Any]:
        """What to test: objects with `length`, `sequences` (how many) and `pairs` (of MQAR, or None)."""
        ...

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        ...

    def test_batch(self, setting: int, start: int, stop: int) -> Mapping[str, Tensor]:
        """`ids` and `labels` of a setting, (stop - start, length) int64; -100 where nothing is asked."""
        ...


@dataclass(frozen=True)
class LengthResult:
    """What one setting came to.

    Attributes:
        length: tokens a sequence.
        pairs: key-value pairs a sequence, None where the task has none.
        accuracy: share of labelled tokens predicted right; None where the length was not tested, see `note`.
        whole: share of sequences with every labelled token right; None likewise.
        sequences: sequences tested.
        answers: labelled tokens tested.
        seconds: wall time.
        note: "", or why the length was not tested: "above max_length" or "out of memory".
    """

    length: int
    pairs: int | None
    accuracy: float | None
    whole: float | None
    sequences: int
    answers: int
    seconds: float
    note: str = ""


class Counts(NamedTuple):
    """Of one batch: labelled tokens predicted right, sequences predicted right as a whole, and the summed
    cross-entropy at labelled tokens in nats."""

    right: int
    whole: int
    loss: float


def _answers(model: Any, ids: Tensor, state: Any, rows: Tensor, columns: Tensor) -> tuple[Tensor | None, Any]:
    """The model's logits (n, vocab) at (rows, columns) of a segment, None where n is 0; and its state."""
    if hasattr(model, "hidden") and hasattr(model, "logits"):
        hidden, state = model.hidden(ids, state)
        return (model.logits(hidden[rows, columns]) if len(rows) else None), state
    logits, state = model(ids, state)
    return (logits[rows, columns] if len(rows) else None), state


def count_right(
    model: nn.Module,
    ids: Tensor,
    labels: Tensor,
    *,
    segment: int = SEGMENT,
    device: torch.device | None = None,
) -> Counts:
    """What the model gets right, and its loss, the sequences streamed in segments.

    ids, labels: (batch, length) int64, best on the host: segments of `segment` tokens go to `device` one by
    one. A model that carries no state (a bidirectional one) takes each sequence in one piece.
    """
    length = ids.shape[1]
    device = ids.device if device is None else device
    wrong = torch.zeros(len(ids), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    state: Any = None
    start = 0
    while start < length:
        stop = min(start + segment, length)
        rows, columns = torch.nonzero(labels[:, start:stop] != IGNORE, as_tuple=True)
        wanted = labels[:, start:stop][rows, columns].to(device)
        rows, columns = rows.to(device), columns.to(device)
        logits, state = _answers(model, ids[:, start:stop].to(device), state, rows, columns)
        if start == 0 and stop < length and not any(isinstance(x, Tensor) for x in pytree.tree_leaves(state)):
            segment, state = length, None
            continue
        if logits is not None:
            wrong.index_add_(0, rows, (logits.argmax(-1) != wanted).to(torch.int64))
            loss += F.cross_entropy(logits.float(), wanted, reduction="sum").double()
        start = stop
    answers = int((labels != IGNORE).sum())
    return Counts(answers - int(wrong.sum()), int((wrong == 0).sum()), float(loss))


def evaluate_setting(
    model: nn.Module,
    source: Source,
    number: int,
    *,
    segment: int = SEGMENT,
    tokens_in_flight: int | None = None,
    max_length: int | None = None,
    device: torch.device | None = None,
    rank: int = 0,
    world: int = 1,
) -> LengthResult:
    """Test `source.test_settings[number]`; the arguments are those of `evaluate_lengths`."""
    if segment < 1:
        raise ValueError(f"segment is {segment}, expected at least 1")
    if tokens_in_flight is not None and tokens_in_flight < 1:
        raise ValueError(f"tokens_in_flight is {tokens_in_flight}, expected at least 1")
    setting = source.test_settings[number]
    length, pairs, sequences = setting.length, setting.pairs, setting.sequences
    if sequences is None:
        raise ValueError(f"the setting of length {length} has sequences None, expected a number")
    if max_length is not None and length > max_length:
        return LengthResult(length, pairs, None, None, 0, 0, 0.0, "above max_length")
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if tokens_in_flight is None:
        tokens_in_flight = TOKENS_IN_FLIGHT.get(device.type, TOKENS_IN_FLIGHT["cpu"])
    segment = min(segment, tokens_in_flight)
    batch = max(1, tokens_in_flight // min(length, segment))
    first, last = rank * sequences // world, (rank + 1) * sequences // world
    # tokens right, sequences right, sequences, answers, out of memory
    counts = torch.zeros(5, dtype=torch.int64)
    was_training = model.training
    model.eval()
    began = time.perf_counter()
    try:
        with torch.inference_mode():
            for start in range(first, last, batch):
                made = source.test_batch(number, start, min(start + batch, last))
                got = count_right(model, made["ids"], made["labels"], segment=segment, device=device)
                answers = int((made["labels"] != IGNORE).sum())
                counts += torch.tensor([got.right, got.whole, len(made["ids"]), answers, 0])
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        counts[4] = 1
    finally:
        model.train(was_training)
    if counts[4] and device.type == "cuda":
        torch.cuda.empty_cache()
    if world > 1:
        counts = counts.to(device)
        torch.distributed.all_reduce(counts)
    right, whole, tested, answers, failed = counts.tolist()
    seconds = time.perf_counter() - began
    if failed:
        return LengthResult(length, pairs, None, None, 0, 0, seconds, "out of memory")
    return LengthResult(length, pairs, right / answers, whole / tested, tested, answers, seconds)


def evaluate_lengths(
    model: nn.Module,
    source: Source,
    *,
    segment: int = SEGMENT,
    tokens_in_flight: int | None = None,
    max_length: int | None = None,
    device: torch.device | None = None,
    rank: int = 0,
    world: int = 1,
    on_result: Callable[[LengthResult], None] | None = None,
) -> list[LengthResult]:
    """Test a model on every setting of `source`.

    Args:
        model: see the module's docstring; put into evaluation mode while it is tested.
        source: the test sequences.
        segment: tokens of a sequence that go through the model at once; longer sequences are streamed.
        tokens_in_flight: tokens of a batch that go through the model at once, a bound on the memory: a batch
            holds `tokens_in_flight // segment` sequences, at least one. None: 2^14 on a CPU, 2^19 on CUDA.
        max_length: longer settings are not tested but come back with accuracy None. For models whose state
            grows with the length, such as attention's.
        device: where the model's inputs go; None: where its parameters are.
        rank, world: this process and how many share the sequences (counts are summed over torch.distributed).
        on_result: called with each result as soon as it is there.

    Returns:
        One result a setting, in order. A length that runs out of memory has accuracy None and the note
        "out of memory"; the others are tested all the same.
    """
    results = []
    for number in range(len(source.test_settings)):
        result = evaluate_setting(
            model,
            source,
            number,
            segment=segment,
            tokens_in_flight=tokens_in_flight,
            max_length=max_length,
            device=device,
            rank=rank,
            world=world,
        )
        results.append(result)
        if on_result is not None:
            on_result(result)
    return results


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text or "out of memory" in text


def write_results(
    folder: str | Path,
    results: Sequence[LengthResult],
    *,
    trained_length: int,
    chance: float,
    title: str = "",
) -> None:
    """Write `lengths.csv`, `lengths_details.csv` and `lengths.png` into `folder`, each whole or not at all.

    `lengths.csv` has the columns length, accuracy (0 to 1, or n/a) and sequences; `lengths_details.csv` also
    the pairs, the share of whole sequences, the labelled tokens, seconds, chance and notes.
    """
    folder = Path(folder)
    rows = ["length,accuracy,sequences"]
    details = ["length,pairs,accuracy,whole_sequences,sequences,answers,seconds,chance,trained_length,note"]
    for r in results:
        accuracy, whole = _number(r.accuracy), _number(r.whole)
        pairs = "" if r.pairs is None else r.pairs
        rows.append(f"{r.length},{accuracy},{r.sequences}")
        details.append(
            f"{r.length},{pairs},{accuracy},{whole},{r.sequences},{r.answers},{r.seconds:.2f},"
            f"{chance:.6g},{trained_length},{r.note}"
        )
    atomic_write(folder / "lengths.csv", "\n".join(rows) + "\n")
    atomic_write(folder / "lengths_details.csv", "\n".join(details) + "\n")
    atomic_write(
        folder / "lengths.png", plot(results, trained_length=trained_length, chance=chance, title=title)
    )


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.6f}"


def plot(
    results: Sequence[LengthResult], *, trained_length: int, chance: float, title: str = "", dpi: int = 150
) -> bytes:
    """A PNG of accuracy against length: the trained length and chance marked, untested lengths as crosses."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    kinds = list(dict.fromkeys(r.pairs for r in results))
    axes.axhline(
        100 * chance, color="0.5", linestyle=":", linewidth=1, label=f"chance ({100 * chance:.3g} %)"
    )
    axes.axvline(
        trained_length, color="0.5", linestyle="--", linewidth=1, label=f"trained length ({trained_length:,})"
    )
    for i, pairs in enumerate(kinds):
        own = sorted((r for r in results if r.pairs == pairs), key=lambda r: r.length)
        tested = [r for r in own if r.accuracy is not None]
        name = "accuracy" if pairs is None else f"{pairs} pairs"
        axes.plot(
            [r.length for r in tested],
            [100 * r.accuracy for r in tested if r.accuracy is not None],
            color=f"C{i}",
            marker="o",
            markersize=4,
            label=name,
        )
        missing = [r.length for r in own if r.accuracy is None]
        if missing:
            axes.plot(
                missing, [0] * len(missing), color=f"C{i}", marker="x", linestyle="none", label="not tested"
            )
    axes.set_xscale("log", base=2)
    axes.set_ylim(-4, 104)
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("accuracy (%)")
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    if title:
        axes.set_title(title, fontsize=10)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def print_table(results: Sequence[LengthResult], title: str = "accuracy by length") -> None:
    """Print the results as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    with_pairs = any(r.pairs is not None for r in results)
    for name in [
        "length",
        *(["pairs"] if with_pairs else []),
        "tokens right",
        "sequences right",
        "sequences",
        "s",
    ]:
        table.add_column(name, justify="right")
    for r in results:
        cells = [f"{r.length:,}"]
        if with_pairs:
            cells.append("" if r.pairs is None else str(r.pairs))
        if r.accuracy is None or r.whole is None:
            cells += [f"n/a ({r.note})", "n/a", "0"]
        else:
            cells += [f"{100 * r.accuracy:.2f} %", f"{100 * r.whole:.2f} %", f"{r.sequences:,}"]
        table.add_row(*cells, f"{r.seconds:.1f}")
    Console().print(table)
