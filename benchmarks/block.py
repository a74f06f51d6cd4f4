"""A whole Mamba layer, `Mamba(1024)` in bf16, beside the peers' with the same weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.harness import Bar, Check, Options, Report, case, relative_error
from benchmarks.inputs import short
from benchmarks.scan import FORWARD, OURS, TRAINING
from benchmarks.timing import Candidate, measure
from ssm_modal.layers import MambaConfig

DTYPE = torch.bfloat16
# The layer rounds to bf16 seven times on the way, where the scan alone rounds once.
OUTPUT, GRADIENT = 2e-2, 4e-2
# Steps of the timed input that are taken through the layer in fp64.
CHECKED = 256

Layer = Callable[[Tensor], Tensor]
Verify = Callable[[Layer, object], list[Check]]


def mamba_layer(d_model: int, options: Options) -> nn.Module:
    """Our layer with bf16 weights, A, D and the bias of dt in fp32."""
    torch.manual_seed(0)
    with torch.device(options.device):
        return MambaConfig().build(d_model).to(DTYPE)


def layer_ways(
    ours: nn.Module, x: Tensor, options: Options, notes: list[str], training: bool, slow: bool
) -> Iterator[Candidate]:
    """Ours, mamba_ssm's and, where `slow` peers can bear the length, transformers' and mambapy's."""
    verify = _reference(ours, x)
    yield _way(OURS, lambda x: ours(x)[0], ours, x, verify, training)
    d_model = x.shape[2]

    def mamba_ssm() -> Candidate:
        make = peers.peer("mamba_ssm.modules.mamba_simple", "Mamba")
        if options.device.type != "cuda":
            raise peers.Unavailable("mamba_ssm's layer runs on NVIDIA GPUs only")
        layer = peers.load_block(make(d_model, device=options.device, dtype=DTYPE), ours)
        return _way(peers.MAMBA_SSM, layer, layer, x, verify, training)

    def transformers() -> Candidate:
        config = peers.peer("transformers", "MambaConfig")(hidden_size=d_model, num_hidden_layers=1)
        make = peers.peer("transformers.models.mamba.modeling_mamba", "MambaMixer")
        layer = peers.load_block(make(config, layer_idx=0).to(options.device, DTYPE), ours)
        layer.train(training)
        return _way(peers.TRANSFORMERS, layer, layer, x, verify, training, slow=True)

    def mambapy() -> Candidate:
        config = peers.peer("mambapy.mamba", "MambaConfig")(d_model=d_model, n_layers=1)
        layer = peers.load_block(peers.peer("mambapy.mamba", "MambaBlock")(config).to(options.device), ours)
        layer.float()  # it mixes its dtypes: fp32 weights, bf16 by autocast

        def run(x: Tensor) -> Tensor:
            with torch.autocast(options.device.type, DTYPE):
                return layer(x)

        return _way(f"{peers.MAMBAPY}, autocast", run, layer, x, verify, training, slow=True)

    yield from peers.offer(notes, peers.MAMBA_SSM, mamba_ssm)
    if slow:
        yield from peers.offer(notes, peers.TRANSFORMERS, transformers)
        yield from peers.offer(notes, peers.MAMBAPY, mambapy)


def attention_way(x: Tensor, training: bool) -> Candidate:
    """Causal attention alone at the width of x, no projections: the least that an attention layer takes.

    It computes something else, so that nothing is checked.
    """
    batch, length, d_model = x.shape
    heads = 16 if d_model % 16 == 0 else 1
    shape = (batch, heads, length, d_model // heads)
    q, k, v = (torch.randn(shape, device=x.device, dtype=x.dtype).requires_grad_() for _ in range(3))
    dout = torch.randn_like(q)

    def run() -> object:
        if not training:
            with torch.no_grad():
                return peers.flash_attention(q, k, v)
        out = peers.flash_attention(q, k, v)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    return Candidate(peers.SDPA, run, holds=lambda: (q, k, v, dout), slow=length > 32768)


def _way(
    name: str,
    layer: Layer,
    owner: nn.Module,
    x: Tensor,
    verify: Verify,
    training: bool,
    slow: bool = False,
) -> Candidate:
    """Forward, or forward and backward to the input and every parameter of `owner`."""
    given = (x.detach().requires_grad_(), *owner.parameters())
    make = torch.Generator(x.device).manual_seed(1)
    dout = torch.randn(x.shape, generator=make, device=x.device, dtype=x.dtype)

    def run() -> object:
        if not training:
            with torch.no_grad():
                return layer(x)
        out = layer(given[0])
        return out.detach(), *torch.autograd.grad(out, given, dout.to(out.dtype))

    return Candidate(name, run, lambda result: verify(layer, result), lambda: (*given, dout), slow=slow)


def _reference(ours: nn.Module, x: Tensor) -> Verify:
    """The first steps of x through the layer in fp64: the output, of which the timed result's must be a
    beginning, and the gradient to the input, of a call on these steps alone (in the whole, later steps reach
    back)."""
    start = x[:1, :CHECKED].detach()
    dout = torch.randn_like(start)
    wide = copy.deepcopy(ours).double()
    right, right_grad = _once(lambda x: wide(x)[0], start.double(), dout.double())

    def verify(layer: Layer, result: object) -> list[Check]:
        whole = result if isinstance(result, Tensor) else result[0]  # type: ignore[index]
        out, (_, grad) = whole[:1, :CHECKED], _once(layer, start, dout)
        return [
            Check("out", relative_error(out, right), OUTPUT),
            Check("dx", relative_error(grad, right_grad), GRADIENT),
        ]

    return verify


def _once(layer: Layer, x: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = layer(x)
    return out.detach(), torch.autograd.grad(out, x, dout.to(out.dtype))[0]


def _block(
    name: str, options: Options, batch: int, length: int, bars: tuple[Bar, ...] = (), slow: bool = False
) -> Report:
    options.need()
    batch, _, length = options.shrink(batch, 0, length)
    d_model = 16 if options.tiny else 1024
    ours = mamba_layer(d_model, options)
    make = torch.Generator(options.device).manual_seed(0)
    x = torch.randn(batch, length, d_model, generator=make, device=options.device, dtype=DTYPE)
    report = Report(name, f"B{batch} L{length} d{d_model} {short(DTYPE)}", OURS, bars=options.bars(*bars))
    for what in (FORWARD, TRAINING):
        training = what == TRAINING
        made = layer_ways(ours, x, options, [] if training else report.notes, training, slow)
        attention = (attention_way(x, training) for _ in range(1))  # made when it is its turn
        measure(report, what, itertools.chain(made, attention), options, options.device, memory=training)
    return report


@case(quick=True, seconds=6.0)
def block_b8_l8192(options: Options) -> Report:
    """Mamba(1024), bf16 weights, B8 L8192, forward and forward + backward."""
    return _block("block_b8_l8192", options, 8, 8192, (Bar(FORWARD, 3.1), Bar(TRAINING, 10.4)))


@case(quick=True, seconds=6.0)
def block_b1_l131072(options: Options) -> Report:
    """Mamba(1024), bf16 weights, B1 L131072, forward and forward + backward."""
    return _block("block_b1_l131072", options, 1, 131072, (Bar(FORWARD, 6.2), Bar(TRAINING, 21.0)))


@case(seconds=6.0)
def block_small(options: Options) -> Report:
    """Mamba(1024), bf16 weights, B2 L1024, beside the slow peers too: transformers' loop and mambapy."""
    return _block("block_small", options, 2, 1024, slow=True)
