"""`python -m benchmarks.published`: published models at full size with random weights made on the device.

Each entry builds its model by the loader that reads checkpoints, reads a prompt and generates from it;
printed are tokens a second of reading, milliseconds a step of generating, and the peak of the device's
memory, the building of the model included. `--tiny` cuts every size to almost nothing, on a CPU too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.output import environment
from benchmarks.timing import wait
from ssm_modal.checkpoints.family import Part
from ssm_modal.checkpoints.formats import family_of_config
from ssm_modal.checkpoints.loading import Source, fill
from ssm_modal.checkpoints.weights import Weights
from ssm_modal.errors import CheckpointError
from ssm_modal.generation import GenerationConfig, prefill
from ssm_modal.generation.decode import Decoder
from ssm_modal.generation.prompts import evaluating
from ssm_modal.layers.quantized import Quantisation
from ssm_modal.models import CausalLM, CausalLMConfig, model_config

GIB = 1 << 30
FAMILIES = {"falcon_mamba_7b": "falcon_mamba_7b", "mamba_2_8b": "mamba_2_8b", "jamba_v0_1": "jamba_lm"}


@dataclass(frozen=True)
class Entry:
    """model: a registered name. prompts: (rows, tokens) of each case. steps: tokens then generated."""

    model: str
    prompts: tuple[tuple[int, int], ...]
    quantize: Quantisation | None = None
    steps: int = 256


ENTRIES = {
    "falcon": Entry("falcon_mamba_7b", ((1, 1024), (1, 65536), (1, 1 << 20))),
    "falcon_int4": Entry("falcon_mamba_7b", ((1, 1024), (1, 65536)), "int4"),
    "mamba_2_8b": Entry("mamba_2_8b", ((1, 1024), (16, 1024), (128, 128))),
    "jamba": Entry("jamba_v0_1", ((1, 262144),)),
    "jamba_int8": Entry("jamba_v0_1", ((1, 140000),), "int8"),
}


class RandomWeights(Weights):
    """Weights as at the start of training, made on the device a tensor at a time when they are asked for."""

    def __init__(self, config: CausalLMConfig, parts: Sequence[Part], device: torch.device) -> None:
        with torch.device("meta"):
            whole = config.build().state_dict()
        self._parts, self._device = parts, device
        self._layers = config.backbone.n_layers
        self.shapes = {part.key: tuple(whole[part.name][part.region].shape) for part in parts}
        self.dtypes = {part.key: torch.float32 for part in parts}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        torch.manual_seed(0)
        for part in self._parts:
            yield part.key, self._made(part.name.rpartition(".")[2], part.name, self.shapes[part.key])

    def _made(self, own: str, name: str, shape: tuple[int, ...]) -> Tensor:
        device = self._device
        if own == "A_log":
            return torch.arange(1, shape[1] + 1, device=device).float().log().expand(shape)
        if own == "dt_bias":  # softplus of it log-uniform from 0.001 to 0.1
            dt = torch.exp(torch.empty(shape, device=device).uniform_(-6.9, -2.3))
            return dt + torch.log(-torch.expm1(-dt))
        if own == "bias":
            return torch.zeros(shape, device=device)
        if len(shape) == 1:  # norms and D
            return torch.ones(shape, device=device)
        deep = "out_proj" in name
        spread = 0.02 / (2 * self._layers) ** 0.5 if deep else 0.02
        spread = 0.3 if "conv1d" in name else spread
        return torch.randn(shape, device=device) * spread


def build(entry: Entry, device: torch.device, *, tiny: bool) -> CausalLM:
    """The entry's model in bf16, through the loader of checkpoints."""
    name = FAMILIES[entry.model] if tiny else entry.model
    small: dict[str, Any] = {"d_model": 64, "vocab_size": 128} if tiny else {}
    if tiny and name != "jamba_lm":
        small["n_layers"] = 2
    config = model_config(name, **small)
    assert isinstance(config, CausalLMConfig)
    family = family_of_config(config)
    parts = tuple(family.parts(config, ()))
    source = Source(config, RandomWeights(config, parts, device), family, parts)
    with torch.device("meta"):
        model = config.build()
    fill(model, source, entry.model, device, torch.bfloat16, entry.quantize)
    return model.eval()


@dataclass(frozen=True)
class Figures:
    """What one case gave. peaks: GiB of the device's memory at most, building included; None on a CPU."""

    name: str
    rows: int
    tokens: int
    tokens_per_second: float
    step_ms: float
    step_spread: tuple[float, float]
    peak: float | None

    def line(self) -> str:
        low, high = self.step_spread
        peak = "-" if self.peak is None else f"{self.peak:.2f} GiB"
        return (
            f"| {self.name} | {self.rows} | {self.tokens:,} | {self.tokens_per_second:,.0f} "
            f"| {self.step_ms:.3f} ({low:.3f}-{high:.3f}) | {1000 * self.rows / self.step_ms:,.1f} | {peak} |"
        )


HEAD = (
    "| entry | rows | prompt tokens a row | prompt tokens/s | ms a step (quartiles) | new tokens/s | peak |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


@torch.no_grad()
def measure(
    name: str, model: CausalLM, rows: int, tokens: int, steps: int, prefill_tokens: int, device: torch.device
) -> Figures:
    """Read `rows` prompts of `tokens` ids, then generate `steps` tokens a row, greedily.

    Reading is timed once, after a warm-up on one piece; a step as the median over takes of the decoder, each
    of which waits for the device once.
    """
    vocab = model.config.vocab_size
    prompts = [torch.randint(vocab, (tokens,)) for _ in range(rows)]
    with evaluating(model):
        warm = [p[: max(1, min(tokens, prefill_tokens // rows))] for p in prompts]
        for _ in range(2):
            prefill(model, warm, prefill_tokens=prefill_tokens)
        wait(device)
        start = time.perf_counter()
        logits, state = prefill(model, prompts, prefill_tokens=prefill_tokens)
        wait(device)
        reading = time.perf_counter() - start
        config = GenerationConfig(max_new_tokens=steps, temperature=0)
        decoder = Decoder(model, logits, state, config, [], seen=None, limit=vocab)
        del state
        taken = min(decoder.most, steps)
        decoder.take(taken)  # captures the graph
        times = []
        for _ in range(max(1, steps // taken - 1)):
            start = time.perf_counter()
            decoder.take(taken)
            times.append((time.perf_counter() - start) * 1000 / taken)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
    return Figures(
        name,
        rows,
        tokens,
        rows * tokens / reading,
        statistics.median(times),
        (quartiles[0], quartiles[2]),
        peak,
    )


def run_entry(
    name: str, device: torch.device, *, tiny: bool, prefill_tokens: int, show: Callable[[Figures], None]
) -> None:
    """Every case of an entry, each shown when it is done."""
    entry = ENTRIES[name]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model = build(entry, device, tiny=tiny)
    if device.type == "cuda":
        print(f"{name}: built, peak {torch.cuda.max_memory_allocated(device) / GIB:.2f} GiB", flush=True)
    for i, (rows, tokens) in enumerate(entry.prompts):
        if i and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # the build counts in the first case
        if tiny:
            rows, tokens, prefill_tokens = min(rows, 3), min(tokens, 40), 16
        show(measure(name, model, rows, tokens, 8 if tiny else entry.steps, prefill_tokens, device))


def main(argv: list[str] | None = None) -> int:
    """0; 1 where an entry did not fit the device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__)
    parser.add_argument("--only", help=f"entries with commas, of {', '.join(ENTRIES)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="tokens read at once (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="cut every size to almost nothing: does it run?")
    arguments = parser.parse_args(argv)
    names = list(ENTRIES) if arguments.only is None else arguments.only.split(",")
    for name in names:
        if name not in ENTRIES:
            parser.error(f"--only holds {name!r}, expected names of {', '.join(ENTRIES)}")
    print(", ".join(f"{key} {value}" for key, value in environment().items() if value != "none"))
    device = torch.device(arguments.device)
    found: list[Figures] = []
    failed = 0
    for name in names:

        def show(figures: Figures) -> None:
            found.append(figures)
            print(figures.line(), flush=True)

        try:
            run_entry(name, device, tiny=arguments.tiny, prefill_tokens=arguments.prefill_tokens, show=show)
        except (CheckpointError, torch.OutOfMemoryError) as error:
            failed = 1
            print(f"{name}: {error}", file=sys.stderr)
    print("\n".join(["", HEAD, *(figures.line() for figures in found)]))
    return failed


if __name__ == "__main__":
    sys.exit(main())
