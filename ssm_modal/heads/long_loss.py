"""The next-token loss of a causal model over any length, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_modal.backbone.recompute import Surroundings
from ssm_modal.backbone.segmented import iterate_segments, sum_over_segments
from ssm_modal.backbone.segments import Segment
from ssm_modal.heads.chunked_loss import IGNORE, chunked_cross_entropy, default_chunk
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.moe import Routing, collect_routing, routing_asked_for, total_routing


class LanguageModel(Protocol):
    """What `long_token_loss` asks of a model; `ssm_modal.CausalLM` has it."""

    @property
    def config(self) -> Any:
        """With `vocab_size`."""

    @property
    def hidden(self) -> Callable[..., tuple[Tensor, Any]]:
        """`hidden(ids, state, seqs=) -> (hidden (batch, length, d_model), state)`."""

    @property
    def logits(self) -> Callable[[Tensor], Tensor]:
        """(..., d_model) to (..., vocab) logits, each position on its own."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter."""


def long_token_loss(
    model: LanguageModel,
    ids: Tensor,
    labels: Tensor,
    *,
    segment: int | None = None,
    seqs: Sequences | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed next-token cross-entropy in nats, and the number of targets, without ever holding all logits.

    Gradients are those of the whole sequence. With `segment` the model is run by segments
    (`sum_over_segments`): memory is that of one segment, and the gradients are computed in the forward,
    unless in fp16, and handed out in the backward. Without it the model is run once, and the loss alone goes
    by chunks.

    Args:
        model: `CausalLM`, or what has its `hidden`, `logits`, `config.vocab_size` and `parameters`.
        ids: (batch, length) int64, or (1, total) packed by `seqs`.
        labels: (batch, length) int64, -100 where nothing is predicted; labels[:, t] is predicted at t.
        segment: tokens a segment, or None for the whole at once.
        seqs: packed sequences; they may cross the borders of segments.
        chunk: positions whose logits exist at once; None: about 1 GiB of fp32 logits on CUDA, 64 MiB on a
            CPU.

    Inside `collect_routing(model)`, a mixture of experts run by segments adds one `Routing`, of all layers
    and the whole length.

    Returns (loss (), count ()). Raises as `sum_over_segments` and `chunked_cross_entropy`.
    """
    if ids.shape != labels.shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {tuple(ids.shape)}, that of ids")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if chunk is None:
        chunk = default_chunk(int(model.config.vocab_size), ids.device)

    def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
        return chunked_cross_entropy(model.logits, parameters, hidden, labels, chunk=chunk)[0]

    count = (labels != IGNORE).sum()
    if segment is None:
        hidden, _ = model.hidden(ids, seqs=seqs) if seqs is not None else model.hidden(ids)
        return loss_of(hidden, labels), count
    asked = routing_asked_for(model)
    if asked is not None:
        loss, routing = _loss_and_routing(model, ids, labels, parameters, segment, seqs, loss_of)
        asked.append(routing)
        return loss, count
    narrow = Surroundings(ids.device).narrow or any(p.dtype == torch.float16 for p in parameters)
    loss = sum_over_segments(
        lambda own, state: model.hidden(own.inputs[0], state, seqs=own.seqs),
        lambda hidden, own: loss_of(hidden, own.inputs[1]),
        (ids, labels),
        parameters,
        segment,
        seqs=seqs,
        ahead=not narrow,
    )
    return loss, count


def _loss_and_routing(
    model: Any,
    ids: Tensor,
    labels: Tensor,
    parameters: list[nn.Parameter],
    segment: int,
    seqs: Sequences | None,
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Routing]:
    """The loss by segments, and what the routers of all layers did over the whole length.

    The load-balancing loss is no sum over segments, but a function of sums: those are what the segments give,
    so its gradients are exact too.
    """
    layers = 0

    def body(own: Segment, state: Any) -> tuple[Any, Any]:
        nonlocal layers
        with collect_routing(model) as found:
            hidden, state = model.hidden(own.inputs[0], state, seqs=own.seqs)
        layers = len(found)
        return (hidden, total_routing(found)), state

    def head(out: tuple[Tensor, Routing], own: Segment) -> tuple[Tensor, ...]:
        hidden, routing = out
        return loss_of(hidden, own.inputs[1]), routing.counts, routing.probabilities

    loss, counts, probabilities = sum_over_segments(body, head, (ids, labels), parameters, segment, seqs=seqs)
    return loss, Routing(counts, probabilities, layers * ids.numel())


@torch.no_grad()
def long_token_nats(
    model: LanguageModel,
    ids: Tensor,
    labels: Tensor,
    *,
    segment: int,
    seqs: Sequences | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Each target's loss in nats, 0 where there is none: (batch, length) fp32 (fp64 for fp64 logits).

    Arguments as of `long_token_loss`; records no gradients.
    """
    if ids.shape != labels.shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {tuple(ids.shape)}, that of ids")
    chunk = chunk or default_chunk(int(model.config.vocab_size), ids.device)

    def body(own: Segment, state: Any) -> tuple[Tensor, Any]:
        return model.hidden(own.inputs[0], state, seqs=own.seqs)

    parts = []
    for own, hidden in iterate_segments(body, (ids, labels), segment, seqs=seqs):
        targets = own.inputs[1].reshape(-1)
        pieces = []
        for rows, wanted in zip(hidden.flatten(0, 1).split(chunk), targets.split(chunk)):
            logits = model.logits(rows)
            wide = logits if logits.dtype == torch.float64 else logits.float()
            pieces.append(F.cross_entropy(wide, wanted, ignore_index=IGNORE, reduction="none"))
        parts.append(torch.cat(pieces).view(own.inputs[1].shape))
    return torch.cat(parts, dim=1)
