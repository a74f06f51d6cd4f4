"""One row of a layer's hidden attention at length 2^17, beside the layer's forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor

from benchmarks.harness import Bar, Check, Options, Report, case, relative_error
from benchmarks.timing import Candidate, measure
from ssm_modal.attribution import hidden_attention_row
from ssm_modal.layers import Bidirectional, BidirectionalConfig, Mamba, MambaConfig, S4DConfig

WHAT, OURS, FORWARD = "row of the last step", "hidden_attention_row", "the layer's forward"
LENGTH = 1 << 17
# The row of the last step over its last steps hangs on these steps alone: so many are checked.
CHECKED = 2048
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def _kinds(d_model: int) -> dict[str, Callable[[], torch.nn.Module]]:
    return {
        "Mamba": lambda: MambaConfig().build(d_model),
        "Mamba both ways": lambda: Bidirectional(
            d_model, MambaConfig(), BidirectionalConfig(combine="mean", share="projections")
        ),
        "S4D": lambda: S4DConfig().build(d_model),
    }


def _reports(
    options: Options, name: str, d_model: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Report]:
    _, d_model, length = options.shrink(1, d_model, LENGTH)
    for kind, build in _kinds(d_model).items():
        torch.manual_seed(0)
        layer = build().to(device, dtype)
        x = torch.randn(1, length, d_model, device=device, dtype=dtype)
        shape = f"{kind}, B1 d_model {d_model} L{length} {str(dtype).removeprefix('torch.')}"
        report = Report(name, shape, OURS, bars=options.bars(Bar(WHAT, 4.0, FORWARD)), length=length)
        ways = [
            Candidate(OURS, lambda layer=layer, x=x: _row(layer, x), _verify(layer, x, LIMIT[dtype])),
            Candidate(FORWARD, lambda layer=layer, x=x: _forward(layer, x)),
        ]
        measure(report, WHAT, ways, options, device, memory=True)
        yield report


def _row(layer: torch.nn.Module, x: Tensor) -> Tensor:
    return hidden_attention_row(layer, x, x.shape[1] - 1).total


@torch.no_grad()
def _forward(layer: torch.nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


def _verify(layer: torch.nn.Module, x: Tensor, limit: float) -> Callable[[object], list[Check]]:
    """The end of the row against one of an fp64 copy of the layer on the end of the input alone."""
    ahead = layer.forwards if isinstance(layer, Bidirectional) else layer
    lead = ahead.config.d_conv - 1 if isinstance(ahead, Mamba) else 0  # what the convolution reads before
    checked = min(CHECKED, x.shape[1] - lead)
    tail = x[:, -checked - lead :].double()
    right = _row(deepcopy(layer).double(), tail)[:, lead:]

    def verify(result: object) -> list[Check]:
        assert isinstance(result, Tensor)
        return [Check("row", relative_error(result[:, -checked:], right), limit)]

    return verify


@case(on="cpu", seconds=60.0, whole=False)
def cpu_hidden_row(options: Options) -> Iterator[Report]:
    """A hidden-attention row at L131072, d_model 128 fp32: at most 4 times the layer's forward."""
    yield from _reports(options, "cpu_hidden_row", 128, torch.device("cpu"), torch.float32)


@case(seconds=20.0, whole=False)
def hidden_row(options: Options) -> Iterator[Report]:
    """A hidden-attention row at L131072, d_model 768 fp32 and bf16: at most 4 times the layer's forward."""
    options.need()
    for dtype in (torch.float32, torch.bfloat16):
        yield from _reports(options, "hidden_row", 768, options.device, dtype)
