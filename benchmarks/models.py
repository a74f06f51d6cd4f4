"""Whole causal language models: a training step and a generation step, beside peers with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.harness import Check, Options, Report, case, relative_error
from benchmarks.scan import OURS
from benchmarks.timing import Candidate, measure
from ssm_modal import create_model

TRAINING, STEP = "forward + backward", "training step"
EAGER, GRAPH = "token, eager", "token, in a graph"
# Logits and gradients of 24 layers in bf16, beside the same weights in fp64.
LOGITS, GRADIENT = 5e-2, 1e-1
CHECKED = 64
TOKENS = 8

Logits = Callable[[Tensor], Tensor]


def _ours(options: Options, name: str = "mamba_130m") -> Any:
    torch.manual_seed(0)
    with torch.device(options.device):
        if options.tiny:
            return create_model(name, n_layers=2, d_model=16, vocab_size=64)
        return create_model(name)


def _sizes(ours: Any) -> dict[str, int]:
    """What peers call these is theirs to say; ours: d_model, n_layers, rows of the embedding."""
    backbone = ours.config.backbone
    return {
        "d_model": backbone.d_model,
        "n_layers": backbone.n_layers,
        "rows": ours.embedding.weight.shape[0],
    }


def mamba_ssm_model(ours: nn.Module, options: Options, dtype: torch.dtype) -> Any:
    """mamba_ssm's MambaLMHeadModel with our weights."""
    make = peers.peer("mamba_ssm.models.mixer_seq_simple", "MambaLMHeadModel")
    config = peers.peer("mamba_ssm.models.config_mamba", "MambaConfig")
    if options.device.type != "cuda":
        raise peers.Unavailable("mamba_ssm's model runs on NVIDIA GPUs only")
    sizes = _sizes(ours)
    there = config(d_model=sizes["d_model"], n_layer=sizes["n_layers"], vocab_size=sizes["rows"])
    return peers.load_model(make(there, device=options.device, dtype=dtype), ours)


def transformers_model(ours: nn.Module, options: Options, dtype: torch.dtype, use_mambapy: bool) -> Any:
    """transformers' MambaForCausalLM with our weights."""
    make = peers.peer("transformers", "MambaForCausalLM")
    config = peers.peer("transformers", "MambaConfig")
    if use_mambapy:
        peers.peer("mambapy.pscan", "pscan")
    sizes = _sizes(ours)
    there = config(
        vocab_size=sizes["rows"],
        hidden_size=sizes["d_model"],
        num_hidden_layers=sizes["n_layers"],
        use_mambapy=use_mambapy,
    )
    with torch.device(options.device):
        model = make(there).to(dtype)
    model.lm_head.weight = model.backbone.embeddings.weight
    return peers.load_model(model, ours)


def _training_way(
    name: str, model: nn.Module, logits: Logits, ids: Tensor, verify: Callable, step: bool, slow: bool = False
) -> Candidate:
    """One batch in bf16 autocast: loss and gradients of every weight; with `step` AdamW's update too."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=ids.device.type == "cuda") if step else None

    def loss() -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16):
            found = logits(ids[:, :-1])
        return F.cross_entropy(found.float().flatten(0, 1), ids[:, 1:].flatten())

    def run() -> object:
        if optimizer is None:
            found = loss()
            return found.detach(), *torch.autograd.grad(found, weights)
        optimizer.zero_grad(set_to_none=True)
        found = loss()
        found.backward()
        optimizer.step()
        return found.detach()

    def holds() -> list[Tensor]:
        held: list[Tensor] = [*weights, ids]
        if optimizer is not None:
            held += [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
            held += [p.grad for p in weights if p.grad is not None]
        return held

    # Checked before the first update moves the weights away from the reference's.
    checks = None if step else lambda result: verify(logits, weights[0])
    return Candidate(name, run, checks, holds, slow)


def _training_reference(ours: Any, ids: Tensor) -> Callable[[Logits, nn.Parameter], list[Check]]:
    """Logits of the first tokens, and the gradient of their loss to the embedding, in fp64."""
    wide = copy.deepcopy(ours).double()
    start = ids[:1, : CHECKED + 1]

    def both(logits: Logits, weight: Tensor) -> tuple[Tensor, Tensor]:
        found = logits(start[:, :-1])
        loss = F.cross_entropy(found.to(torch.float64).flatten(0, 1), start[:, 1:].flatten())
        return found.detach(), torch.autograd.grad(loss, weight)[0]

    right, grad = both(lambda ids: wide(ids)[0], wide.embedding.weight)

    def verify(logits: Logits, embedding: nn.Parameter) -> list[Check]:
        with torch.autocast(ids.device.type, torch.bfloat16):
            found, own = both(logits, embedding)
        return [
            Check("logits", relative_error(found[..., : right.shape[-1]], right), LOGITS),
            Check("gradient of the embedding", relative_error(own, grad), GRADIENT),
        ]

    return verify


def _train(name: str, options: Options, batch: int, length: int, slow: bool) -> Report:
    options.need()
    batch, _, length = options.shrink(batch, 0, length)
    ours = _ours(options)
    vocabulary = ours.config.vocab_size
    make = torch.Generator(options.device).manual_seed(0)
    ids = torch.randint(vocabulary, (batch, length + 1), generator=make, device=options.device)
    shape = f"mamba_130m B{batch} L{length}, bf16 autocast, head and loss"
    report = Report(name, shape, OURS)
    report.rates = dict.fromkeys((TRAINING, STEP), (batch * length, "tokens"))
    verify = _training_reference(ours, ids)

    def ways(notes: list[str], step: bool) -> Iterator[Candidate]:
        yield _training_way(OURS, ours, lambda ids: ours(ids)[0], ids, verify, step)

        def add(name: str, make: Callable[[], Any], slow: bool) -> Iterator[Candidate]:
            def candidate() -> Candidate:
                model = make().train()
                return _training_way(name, model, lambda ids: model(ids).logits, ids, verify, step, slow)

            return iter(peers.offer(notes, name, candidate))

        yield from add(peers.MAMBA_SSM, lambda: mamba_ssm_model(ours, options, torch.float32), False)
        if slow:
            make = partial(transformers_model, ours, options, torch.float32)
            yield from add(peers.TRANSFORMERS, partial(make, use_mambapy=False), True)
            yield from add(
                f"{peers.TRANSFORMERS} with {peers.MAMBAPY}", partial(make, use_mambapy=True), True
            )

    measure(report, TRAINING, ways(report.notes, False), options, options.device, memory=True)
    if not slow:
        measure(report, STEP, ways([], True), options, options.device, memory=True)
    return report


@case(quick=True, seconds=10.0)
def train_130m(options: Options) -> Report:
    """130M causal language model, B8 L2048, bf16 autocast: forward + backward with head; a training step."""
    return _train("train_130m", options, 8, 2048, slow=False)


@case(seconds=20.0)
def train_130m_small(options: Options) -> Report:
    """130M causal language model, B1 L512, beside transformers' MambaForCausalLM too."""
    return _train("train_130m_small", options, 1, 512, slow=True)


def _steps(
    model: nn.Module, step: Callable[[Tensor], Tensor], name: str, ids: Tensor, verify: Callable
) -> Candidate:
    token = ids[:, :1].contiguous()

    def run() -> Tensor:
        with torch.no_grad():
            return step(token)

    return Candidate(name, run, lambda result: verify(name), lambda: model.parameters())


def _generate(name: str, options: Options, batch: int, model_name: str, others: bool = True) -> Report:
    """Generation steps: checked as the logits after a few tokens, one at a time, against fp64 at once."""
    options.need()
    (batch,) = options.shrink(batch)
    ours = _ours(options, model_name).to(torch.bfloat16).eval()
    make = torch.Generator(options.device).manual_seed(0)
    ids = torch.randint(ours.config.vocab_size, (batch, TOKENS), generator=make, device=options.device)
    report = Report(name, f"{model_name} B{batch} bf16", OURS)
    report.rates = dict.fromkeys((EAGER, GRAPH), (batch, "tokens"))
    with torch.no_grad():
        wide = copy.deepcopy(ours).double()
        right = wide(ids[:1])[0][:, -1]
        del wide

    def check(step: Callable[[Tensor], Tensor]) -> list[Check]:
        with torch.no_grad():
            for t in range(TOKENS):
                logits = step(ids[:, t : t + 1])
        found = logits[:1, -1, : right.shape[-1]]
        return [Check("logits", relative_error(found, right), LOGITS)]

    def ways(notes: list[str], graph: bool) -> Iterator[Candidate]:
        makers = {OURS: lambda: _our_steps(ours, batch)}
        if others:
            makers[peers.MAMBA_SSM] = lambda: _mamba_ssm_steps(ours, options, batch)
            if not graph:
                makers[peers.TRANSFORMERS] = lambda: _transformers_steps(ours, options)
        for who, maker in makers.items():

            def candidate(who: str = who, maker: Callable = maker) -> Candidate:
                model, start = maker()
                return _steps(model, start(), who, ids, lambda _: check(start()))

            yield from peers.offer(notes, who, candidate)

    measure(report, EAGER, ways(report.notes, False), options, options.device, how="wall")
    if options.device.type == "cuda":
        measure(report, GRAPH, ways([], True), options, options.device, how="graph")
    return report


# Each returns the model and what starts a generation: a function of the next ids (batch, 1) to logits.
Start = Callable[[], Callable[[Tensor], Tensor]]


def _our_steps(ours: Any, batch: int) -> tuple[nn.Module, Start]:
    def start() -> Callable[[Tensor], Tensor]:
        state = ours.init_state(batch)
        return lambda ids: ours.step_(ids, state)

    return ours, start


def _mamba_ssm_steps(ours: nn.Module, options: Options, batch: int) -> tuple[nn.Module, Start]:
    make = peers.peer("mamba_ssm.utils.generation", "InferenceParams")
    model = mamba_ssm_model(ours, options, torch.bfloat16).eval()

    def start() -> Callable[[Tensor], Tensor]:
        states = make(max_seqlen=1 << 20, max_batch_size=batch)
        states.key_value_memory_dict = model.allocate_inference_cache(batch, 1 << 20, torch.bfloat16)
        states.seqlen_offset = 1  # above 0 it steps
        return lambda ids: model(ids, inference_params=states).logits

    return model, start


def _transformers_steps(ours: nn.Module, options: Options) -> tuple[nn.Module, Start]:
    model = transformers_model(ours, options, torch.bfloat16, use_mambapy=False).eval()

    def start() -> Callable[[Tensor], Tensor]:
        cache: list[Any] = [None]

        def step(ids: Tensor) -> Tensor:
            found = model(ids, cache_params=cache[0], use_cache=True)
            cache[0] = found.cache_params
            return found.logits

        return step

    return model, start


@case(quick=True, seconds=8.0)
def generate_130m(options: Options) -> Report:
    """A generation step of the 130M model, one sequence, eager and in a CUDA graph."""
    return _generate("generate_130m", options, 1, "mamba_130m")


@case(seconds=8.0)
def generate_130m_b64(options: Options) -> Report:
    """A generation step of the 130M model, 64 sequences, eager and in a CUDA graph."""
    return _generate("generate_130m_b64", options, 64, "mamba_130m")


@case(seconds=15.0)
def generate_2_8b(options: Options) -> Report:
    """A generation step of the 2.8B model, one sequence, eager and in a CUDA graph."""
    return _generate("generate_2_8b", options, 1, "mamba_2_8b")
