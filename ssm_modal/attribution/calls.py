"""`attribute`: one call for every model and modality."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssm_modal.attribution.gradient import input_gradients
from ssm_modal.attribution.hidden_attention import (
    CHANNELS,
    AttentionRow,
    Channels,
    hidden_attention_row,
    mixing_layers,
)
from ssm_modal.attribution.layout import Layout
from ssm_modal.attribution.result import METHODS, Attribution, Method
from ssm_modal.layers.bidirectional import Bidirectional
from ssm_modal.layers.mixer import ROW_CHUNK, Mixer


def attribute(
    model: nn.Module,
    inputs: Tensor,
    target: int | Tensor | None = None,
    *,
    method: Method = "gradient_x_input",
    layer: int | Literal["mean"] | None = None,
    position: int | None = None,
    channels: Channels | None = None,
    chunk_size: int = ROW_CHUNK,
) -> Attribution:
    """Which input positions drove a decision of `model`.

    Args:
        model: a classifier, giving logits (batch, classes), or a language model, giving (batch, length,
            vocabulary); alone or as the first of a tuple. It is run in eval mode, on its own device.
        inputs: what the model takes, not packed: ids or waveforms (batch, length), images (batch, channels,
            height, width).
        target: the class or token explained, one for all or (batch,); None: the one with the greatest logit.
        method: "gradient_x_input" of the target's logit by the embeddings, samples or pixels; signed: what is
            positive spoke for the target. "hidden_attention": the row of one layer at one output step.
        layer: of hidden_attention: its number, negative from the end, default the last; "mean": the mean over
            layers of their rows at that step, each divided by its sum of absolute values.
        position: of a language model: the step whose prediction is explained, default the last. Of
            hidden_attention also the output step of the layer; the default is the one that the target's logit
            draws most from (the greatest sum of gradient x output over channels): a class token, the last
            step, or what weighs most among those that are pooled.
        channels: of hidden_attention, see `hidden_attention_row`: "abs" (default) or "mean".
        chunk_size: of hidden_attention: steps worked on at a time.

    Raises:
        ValueError: an option that does not fit the method, a target, layer or position outside.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a tensor, got {type(inputs).__name__}")
    if inputs.numel() == 0:
        raise ValueError(f"inputs has shape {tuple(inputs.shape)}, expected at least one element")
    with _evaluating(model):
        if method == "hidden_attention":
            return _hidden_attention(model, inputs, target, layer, position, channels or "abs", chunk_size)
        for name, value in (("layer", layer), ("channels", channels)):
            if value is not None:
                raise ValueError(f"{name} is {value!r}, but method {method!r} has none; leave it out")
        read = _Reader(target, position, classifier_position=False)
        found = input_gradients(model, inputs, read)
        return Attribution(method, found.relevance.cpu(), read.logits.cpu(), read.target.cpu())


def _hidden_attention(
    model: nn.Module,
    inputs: Tensor,
    target: int | Tensor | None,
    layer: int | Literal["mean"] | None,
    position: int | None,
    channels: Channels,
    chunk_size: int,
) -> Attribution:
    if channels not in CHANNELS[:2]:
        raise ValueError(f"channels is {channels!r}, expected one of {', '.join(CHANNELS[:2])}")
    layers = mixing_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer with attention rows (Mixer, Bidirectional)")
    if layer == "mean":
        chosen = list(range(len(layers)))
    else:
        number = len(layers) - 1 if layer is None else layer
        if not -len(layers) <= number < len(layers):
            raise ValueError(f"layer is {layer}, expected 0 to {len(layers) - 1}, or -1 for the last")
        chosen = [number % len(layers)]
    read = _Reader(target, position, classifier_position=True)
    # Where the position is to be found, gradients are needed by the output of the last layer chosen.
    with torch.set_grad_enabled(position is None), _recorded([layers[i] for i in chosen]) as calls:
        logit = read(model(inputs))
    for i, call in zip(chosen, calls):
        if len(call) != 1:
            raise ValueError(f"layer {i} ran {len(call)} times in one call of the model, expected once")
    layout = Layout(model, inputs)
    if position is None:
        positions = _strongest(logit, calls[-1][0].output, layout)
    else:
        positions = torch.full((inputs.shape[0],), position, device=inputs.device)
    rows = [
        _placed(_rows(layers[i], call[0].x, positions, channels, chunk_size, layout), i, layout)
        for i, call in zip(chosen, calls)
    ]
    row = rows[0] if layer != "mean" else _mean(rows)
    return Attribution(
        "hidden_attention",
        row.total.cpu(),
        read.logits.cpu(),
        read.target.cpu(),
        stride=layout.stride,
        layer="mean" if layer == "mean" else chosen[0],
        positions=positions.cpu(),
        forwards=None if row.forwards is None else row.forwards.cpu(),
        backwards=None if row.backwards is None else row.backwards.cpu(),
    )


class _Reader:
    """What a model returned to the numbers explained (batch,); keeps the logits and the targets."""

    logits: Tensor
    target: Tensor

    def __init__(
        self, target: int | Tensor | None, position: int | None, *, classifier_position: bool
    ) -> None:
        self._target, self._position = target, position
        self._classifier_position = classifier_position

    def __call__(self, output: Any) -> Tensor:
        logits = output[0] if isinstance(output, tuple) else output
        if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the model gave {got}, expected logits (batch, classes) or (batch, length, n)")
        if logits.ndim == 3:
            length = logits.shape[1]
            at = length - 1 if self._position is None else self._position
            if not 0 <= at < length:
                raise ValueError(f"position is {at}, expected 0 to {length - 1}")
            logits = logits[:, at]
        elif self._position is not None and not self._classifier_position:
            raise ValueError(
                f"position is {self._position}, but a classifier has one output for all steps: leave it out "
                "(it is for hidden_attention and for language models)"
            )
        self.logits = logits.detach()
        self.target = self._targets(logits)
        return logits.gather(1, self.target[:, None]).squeeze(1)

    def _targets(self, logits: Tensor) -> Tensor:
        rows, n = logits.shape
        if self._target is None:
            return logits.detach().argmax(-1)
        if isinstance(self._target, Tensor):
            target = self._target.to(device=logits.device, dtype=torch.int64)
            if target.shape != (rows,):
                raise ValueError(f"target has shape {tuple(target.shape)}, expected ({rows},), one a row")
        else:
            target = torch.full((rows,), self._target, dtype=torch.int64, device=logits.device)
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= n:
            raise ValueError(f"target is {high if high >= n else low}, expected 0 to {n - 1}")
        return target


class _Call:
    """One run of a layer: x (batch, length, d_model), its input, and its output, of the same shape."""

    def __init__(self, x: Tensor, output: Tensor) -> None:
        self.x, self.output = x.detach(), output


@contextmanager
def _recorded(layers: list[Mixer | Bidirectional]) -> Iterator[list[list[_Call]]]:
    """While open, the runs of each layer."""
    calls: list[list[_Call]] = [[] for _ in layers]

    def keep(into: list[_Call]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            into.append(_Call(args[0], output[0]))

        return hook

    handles = [layer.register_forward_hook(keep(into)) for layer, into in zip(layers, calls)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _strongest(logit: Tensor, output: Tensor, layout: Layout) -> Tensor:
    """(batch,) the step of `output` (batch, length, d) with the greatest gradient x output of `logit`, among
    those that it draws on at all."""
    (grad,) = torch.autograd.grad(logit.sum(), output)
    gain = layout.join((grad * output.detach()).sum(-1))
    drawn = layout.join((grad != 0).any(-1).int()) > 0
    return gain.masked_fill(~drawn, -torch.inf).argmax(-1)


def _rows(
    layer: Mixer | Bidirectional,
    x: Tensor,
    positions: Tensor,
    channels: Channels,
    chunk_size: int,
    layout: Layout,
) -> AttentionRow:
    """The row of its own position of every row of x."""
    rows = [
        hidden_attention_row(layer, x[i : i + 1], at, channels=channels, chunk_size=chunk_size)
        for i, at in enumerate(layout.positions(positions, x).tolist())
    ]
    return AttentionRow(
        _joined([row.forwards for row in rows]),
        _joined([row.backwards for row in rows]),
    )


def _placed(row: AttentionRow, layer: int, layout: Layout) -> AttentionRow:
    return AttentionRow(
        None if row.forwards is None else layout.place(row.forwards, layer),
        None if row.backwards is None else layout.place(row.backwards, layer),
    )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _mean(rows: list[AttentionRow]) -> AttentionRow:
    """Over layers, each row divided by its sum of absolute values; a direction that some lack counts zero."""
    sizes = []
    for row in rows:
        size = row.total.abs().flatten(1).sum(1).clamp(min=1e-30) * len(rows)
        sizes.append(size.view(-1, *[1] * (row.total.ndim - 1)))

    def total(parts: list[Tensor | None]) -> Tensor | None:
        there = [part / size for part, size in zip(parts, sizes) if part is not None]
        return torch.stack(there).sum(0) if there else None

    return AttentionRow(total([row.forwards for row in rows]), total([row.backwards for row in rows]))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode while open: an explanation is of what the model says, not of what its dropout left."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
