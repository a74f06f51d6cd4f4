"""One whole training step on one long sequence: `python -m benchmarks.long_training --length 1048576`.

Forward, backward, clipping and fused AdamW; on CUDA under bf16 autocast over fp32 weights. A causal model
(Mamba, tied embedding) is trained by segments, a bidirectional one (`--bidirectional`: masked tokens) with
its blocks recomputed. Before any time is printed, the same model's loss and gradients on a short sequence are
compared in fp32 with those of plain autograd, and the program ends with 1 where they differ.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ssm_modal.backbone import BackboneConfig
from ssm_modal.heads import long_token_loss
from ssm_modal.heads.chunked_loss import IGNORE, default_chunk
from ssm_modal.kernels import explain
from ssm_modal.layers import BidirectionalConfig, MambaConfig
from ssm_modal.models import CausalLM, CausalLMConfig, MaskedLM, MaskedLMConfig

GIB = 1 << 30
CHECK_LENGTH, CHECK_SEGMENT, CHECK_CHUNK = 333, 100, 77
TOLERANCE = 2e-4  # relative, in norm, of loss and gradients in fp32
MASKED = 0.15


@dataclass(frozen=True)
class Job:
    """What is trained, and how its loss is taken."""

    model: MaskedLM | CausalLM
    vocab_size: int
    bidirectional: bool
    segment: int
    chunk: int

    def batch(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random ids (1, length) and labels: the next token, or the token itself at masked positions."""
        tokens = torch.randint(self.vocab_size, (1, length + 1), device=device)
        if not self.bidirectional:
            return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        ids = tokens[:, :-1].contiguous()
        masked = torch.rand(ids.shape, device=device) < MASKED
        return ids.masked_fill(masked, 0), ids.masked_fill(~masked, IGNORE)

    def loss(self, ids: Tensor, labels: Tensor, segment: int, chunk: int) -> Tensor:
        """The mean loss, in bounded memory."""
        if self.bidirectional:
            self.model.backbone.gradient_checkpointing = True
        total, count = long_token_loss(
            self.model, ids, labels, segment=None if self.bidirectional else segment, chunk=chunk
        )
        return total / count

    def plain_loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The same by plain autograd: the whole sequence, all logits."""
        if self.bidirectional:
            self.model.backbone.gradient_checkpointing = False
        logits = self.model(ids)[0]
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def build(options: argparse.Namespace, device: torch.device) -> Job:
    """The model that the options describe, in fp32 on `device`."""
    torch.manual_seed(0)
    backbone = BackboneConfig(
        d_model=options.d_model,
        n_layers=options.layers,
        mixer=MambaConfig(d_state=options.d_state),
        bidirectional=BidirectionalConfig() if options.bidirectional else None,
        gradient_checkpointing=options.recompute,
    )
    with torch.device(device):
        model = (
            MaskedLM(MaskedLMConfig(vocab_size=options.vocab, backbone=backbone))
            if options.bidirectional
            else CausalLM(CausalLMConfig(vocab_size=options.vocab, backbone=backbone))
        )
    chunk = options.chunk or default_chunk(options.vocab, device)
    model.train()
    return Job(model, options.vocab, options.bidirectional, options.segment, chunk)


def worst_difference(job: Job, device: torch.device) -> tuple[str, float]:
    """The largest relative difference to plain autograd on a short sequence in fp32, and of what."""
    ids, labels = job.batch(CHECK_LENGTH, device)
    names = [name for name, _ in job.model.named_parameters()]
    parameters = list(job.model.parameters())
    want = job.plain_loss(ids, labels)
    wanted = [want.detach(), *torch.autograd.grad(want, parameters)]
    got = job.loss(ids, labels, CHECK_SEGMENT, CHECK_CHUNK)
    found = [got.detach(), *torch.autograd.grad(got, parameters)]
    worst = ("loss", 0.0)
    for name, g, w in zip(["loss", *(f"gradient of {n}" for n in names)], found, wanted):
        error = float((g - w).double().norm() / w.double().norm().clamp(min=1e-30))
        if not error <= worst[1]:  # NaN too
            worst = (name, error)
    return worst


def estimate(job: Job, length: int, narrow: bool, recompute: bool) -> dict[str, float]:
    """Bytes that a step should need, by what for; with `narrow` activations in bf16.

    Weights and Adam's two moments are fp32; the gradients stand twice, as sums over segments and as those of
    the segment at hand. A Mamba layer keeps for its backward, in elements a token: the residual stream
    (d_model, fp32), the norm's output (d_model), input and gate (2 d_inner), the convolution's output, delta
    and the scan's output (d_inner each), dt, B and C; and of the scan's states at its chunks' borders d_inner
    bytes.
    """
    config = job.model.backbone.config
    mixer = config.mixer_of(0)
    assert isinstance(mixer, MambaConfig)
    d_model, layers = config.d_model, config.n_layers
    d_inner = mixer.expand * d_model
    directions = 2 if job.bidirectional else 1
    e = 2 if narrow else 4
    mixing = e * (5 * d_inner + math.ceil(d_model / 16) + 2 * mixer.d_state) + d_inner
    block = 4 * d_model + e * d_model + directions * mixing
    stream = (4 + e) * d_model
    held = length if job.bidirectional else min(job.segment, length)
    whole = job.bidirectional or recompute
    parameters = sum(p.numel() for p in job.model.parameters())
    # Logits and their gradient; by torch also their logarithms of probability in fp32 and a copy.
    device = next(job.model.parameters()).device
    one = 2 * e if explain("cross_entropy", device=device).backend == "triton" else 8 + 2 * e
    # In the backward of one block, the gradients of its activations stand beside them.
    activations = held * (layers * stream + 1.6 * block if whole else layers * block)
    boundaries = 0 if job.bidirectional else -(-length // job.segment) - 1
    states = boundaries * layers * d_inner * (4 * mixer.d_state + e * (mixer.d_conv - 1))
    return {
        "weights, gradients, Adam": parameters * (4 + 8 + 8 + (2 if narrow else 0)),
        "activations": activations,
        "loss chunk": min(job.chunk, held) * job.vocab_size * one + 3 * job.vocab_size * d_model * 4,
        "states": states,
        "ids and labels": 16 * length,
    }


def synchronized(device: torch.device) -> float:
    """The time, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train_step(
    job: Job, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], narrow: bool
) -> tuple[float, float, float, float]:
    """Loss, and the seconds of the loss (by segments: gradients too), the backward, clipping and AdamW."""
    device = batch[0].device
    times = [synchronized(device)]
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow):
        loss = job.loss(*batch, job.segment, job.chunk)
    times.append(synchronized(device))
    loss.backward()
    times.append(synchronized(device))
    torch.nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)
    optimizer.step()
    times.append(synchronized(device))
    first, second, third = (b - a for a, b in itertools.pairwise(times))
    return float(loss.detach()), first, second, third


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_training",
        description="One training step on one long sequence: tokens a second and peak memory.",
    )
    add = parser.add_argument
    add("--length", type=int, default=1 << 20, help="tokens of the sequence (default 1048576)")
    add("--segment", type=int, default=1 << 15, help="tokens a segment (default 32768)")
    add("--layers", type=int, help="blocks (default 24; bidirectional 8)")
    add("--d-model", type=int, help="width (default 768; bidirectional 256)")
    add("--d-state", type=int, default=16, help="states a channel (default 16)")
    add("--vocab", type=int, default=50280, help="vocabulary (default 50280)")
    add("--chunk", type=int, help="positions whose logits exist at once (default: about 1 GiB in fp32)")
    add("--bidirectional", action="store_true", help="both directions, masked tokens, blocks recomputed")
    add("--recompute", action="store_true", help="recompute the blocks inside a segment too")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--dtype", choices=("bf16", "fp32"), help="autocast to bf16 or none (default: bf16 on cuda)")
    add("--steps", type=int, default=3, help="steps timed; the median counts (default 3)")
    add("--warmup", type=int, default=1, help="steps before them (default 1)")
    options = parser.parse_args(arguments)
    options.layers = options.layers or (8 if options.bidirectional else 24)
    options.d_model = options.d_model or (256 if options.bidirectional else 768)
    for name in ("length", "segment", "layers", "d_model", "d_state", "vocab", "chunk", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if options.warmup < 0:
        parser.error(f"--warmup is {options.warmup}, expected at least 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no NVIDIA GPU")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    return options


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    options = _options(arguments)
    device, narrow = torch.device(options.device), options.dtype == "bf16"
    job = build(options, device)
    size = sum(p.numel() for p in job.model.parameters())
    kind = "bidirectional Mamba, blocks recomputed" if options.bidirectional else "Mamba"
    if not options.bidirectional:
        kind += f", segments of {options.segment:,}" + (", blocks recomputed" if options.recompute else "")
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    say(f"{kind}: {options.layers} layers, d_model {options.d_model}, vocabulary {options.vocab:,}")
    say(f"{size:,} parameters; {options.length:,} tokens; {options.dtype}; torch {torch.__version__}; {name}")

    what, error = worst_difference(job, device)
    right = error <= TOLERANCE
    say(
        f"check in fp32 on {CHECK_LENGTH} tokens: {'ok' if right else 'FAILED'}, {what} differs by "
        f"{error:.2e} from plain autograd (at most {TOLERANCE:g})"
    )
    if not right:
        return 1
    job.model.zero_grad(set_to_none=True)

    parts = estimate(job, options.length, narrow, options.recompute)
    listed = ", ".join(f"{k} {v / GIB:.2f}" for k, v in parts.items())
    say(f"memory expected: {sum(parts.values()) / GIB:.1f} GiB ({listed})")
    optimizer = torch.optim.AdamW(
        job.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    batch = job.batch(options.length, device)
    for _ in range(options.warmup):
        train_step(job, optimizer, batch, narrow)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = [train_step(job, optimizer, batch, narrow) for _ in range(options.steps)]
    loss, first, second, third = sorted(steps, key=lambda s: sum(s[1:]))[len(steps) // 2]
    if not math.isfinite(loss):
        say(f"FAILED: the loss is {loss}")
        return 1
    whole = first + second + third
    say(
        f"{options.length / whole:,.0f} tokens a second: {whole:.3f} s a step (loss {first:.3f}, backward "
        f"{second:.3f}, clip and AdamW {third:.3f}); loss {loss:.3f}"
    )
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        say(f"peak memory {peak / GIB:.2f} GiB allocated, {reserved / GIB:.2f} GiB reserved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
