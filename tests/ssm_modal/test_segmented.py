"""Training by segments: values and gradients of the whole sequence, in the memory of one segment."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ssm_modal
from ssm_modal.backbone import Backbone, BackboneConfig, Segment, sum_over_segments
from ssm_modal.errors import StateError
from ssm_modal.heads import long_token_loss
from ssm_modal.kernels.dispatch import use_backend
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers import AttentionConfig, BidirectionalConfig, MambaConfig
from tests.tolerances import assert_close, relative_error

VOCAB = 13
EXACT = 1e-10


def model(name: str = "mamba_lm", **overrides: Any) -> Any:
    layers = {"hybrid_lm": 6}.get(name, 2)
    sizes = {"vocab_size": VOCAB, "d_model": 16, "n_layers": layers, **overrides}
    return ssm_modal.create_model(name, **sizes).double()


def batch(length: int = 37, rows: int = 2, unlabelled: int = 12) -> tuple[Tensor, Tensor]:
    """Random ids and labels; the first steps have none."""
    ids, labels = (torch.randint(VOCAB, (rows, length)) for _ in range(2))
    labels[:, :unlabelled] = -100
    return ids, labels


def plain_loss(lm: Any, ids: Tensor, labels: Tensor, seqs: Sequences | None = None) -> Tensor:
    logits, _ = lm(ids, seqs=seqs)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def assert_gradients(lm: nn.Module, got: Tensor, want: Tensor, tolerance: float = EXACT) -> None:
    parameters = list(lm.parameters())
    assert_close(got, want, tolerance, "loss")
    ours, theirs = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (got, want))
    for (name, _), g, w in zip(lm.named_parameters(), ours, theirs):
        assert g is not None, name
        assert w is not None, name
        assert g.dtype == w.dtype
        assert_close(g, w, tolerance, f"gradient of {name}")


# ---------------------------------------------------------------------- equal to the whole


@pytest.mark.parametrize("segment", [1, 5, 12, 36, 37, 100])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_whole(segment: int, tied: bool, device: torch.device) -> None:
    lm = model(tie_embeddings=tied, pad_vocab_multiple=8).to(device)
    ids, labels = (t.to(device) for t in batch())
    loss, count = long_token_loss(lm, ids, labels, segment=segment, chunk=7)
    assert int(count) == 2 * (37 - 12)
    assert_gradients(lm, loss, plain_loss(lm, ids, labels))


@pytest.mark.parametrize("name", ["s4d_lm", "transformer_lm", "hybrid_lm"])
@pytest.mark.parametrize("segment", [1, 9])
def test_every_mixer_with_a_state_is_exact(name: str, segment: int) -> None:
    lm, (ids, labels) = model(name), batch(20, unlabelled=3)
    assert_gradients(lm, long_token_loss(lm, ids, labels, segment=segment)[0], plain_loss(lm, ids, labels))


@pytest.mark.parametrize("name", ["mamba_lm", "s4d_lm", "transformer_lm", "hybrid_lm"])
@pytest.mark.parametrize("segment", [1, 6, 40])
def test_packed_sequences_cross_segments(name: str, segment: int) -> None:
    """Borders inside a segment, on its edges, sequences over three segments, one of length 0."""
    lm, (ids, labels) = model(name), batch(40, rows=1, unlabelled=2)
    seqs = Sequences.from_lengths([3, 3, 0, 20, 1, 5, 8])
    loss, _ = long_token_loss(lm, ids, labels, segment=segment, seqs=seqs)
    assert_gradients(lm, loss, plain_loss(lm, ids, labels, seqs))


@pytest.mark.parametrize("labelled", [slice(0, 4), slice(33, 37), slice(14, 15), slice(0, 0)])
def test_segments_without_a_label(labelled: slice) -> None:
    """What comes before the only labels gets their gradients; no label at all gives zeros."""
    lm, (ids, labels) = model(), batch(unlabelled=0)
    few = torch.full_like(labels, -100)
    few[:, labelled] = labels[:, labelled]
    loss, count = long_token_loss(lm, ids, few, segment=5)
    assert int(count) == int((few != -100).sum())
    assert_gradients(lm, loss, plain_loss(lm, ids, few))


def test_ahead_and_later_agree_and_scale_with_the_incoming_gradient() -> None:
    """ahead hands out gradients scaled; without it they are computed in the backward."""
    lm, (ids, labels) = model(), batch()
    want = torch.autograd.grad(3.5 * plain_loss(lm, ids, labels), list(lm.parameters()))
    for ahead in (True, False):
        calls: list[int] = []

        def head(hidden: Tensor, own: Segment, calls: list[int] = calls) -> Tensor:
            calls.append(own.start)
            logits = lm.logits(hidden).flatten(0, 1)
            return F.cross_entropy(logits, own.inputs[1].flatten(), ignore_index=-100, reduction="sum")

        loss = sum_over_segments(body_of(lm), head, (ids, labels), lm.parameters(), 10, ahead=ahead)
        assert calls == ([30, 20, 10, 0] if ahead else [0, 10, 20, 30])
        got = torch.autograd.grad(3.5 * loss, list(lm.parameters()))
        assert calls == ([30, 20, 10, 0] if ahead else [0, 10, 20, 30, 30, 20, 10, 0])
        for g, w in zip(got, want):
            assert_close(g, w, EXACT)


def body_of(lm: Any) -> Callable[[Segment, Any], tuple[Tensor, Any]]:
    return lambda own, state: lm.hidden(own.inputs[0], state, seqs=own.seqs)


def test_an_empty_sequence() -> None:
    lm = model()
    ids = torch.zeros(1, 0, dtype=torch.int64)
    loss, count = long_token_loss(lm, ids, ids, segment=4)
    assert float(loss.detach()) == 0.0
    assert int(count) == 0
    assert all(
        g is None or g.abs().max() == 0
        for g in torch.autograd.grad(loss, list(lm.parameters()), allow_unused=True)
    )


# ---------------------------------------------------------------------- other heads and inputs


@pytest.mark.parametrize("pool", ["mean", "last", "both"])
def test_pooled_vectors_for_a_classifier_and_gradients_of_the_inputs(pool: str) -> None:
    """Heads that give vectors, whose gradient is known in the backward only; continuous inputs."""
    backbone = Backbone(BackboneConfig(d_model=16, n_layers=2, mixer=MambaConfig(d_state=4))).double()
    classifier = nn.Linear(16, 3).double()
    x = torch.randn(2, 23, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 2])

    def head(hidden: Tensor, own: Segment) -> Any:
        mean = hidden.sum(1) / 23
        last = hidden[:, -1] if own.end == 23 else hidden.new_zeros(2, 16)
        return {"mean": mean, "last": last, "both": (mean, last)}[pool]

    leaves = [x, *backbone.parameters(), *classifier.parameters()]
    losses = []
    for segment in (7, 23):
        if segment == 23:
            hidden = backbone(x)[0]
            pooled = head(hidden, Segment(0, 23, (x,), None))
        else:
            pooled = sum_over_segments(
                lambda own, state: backbone(own.inputs[0], state), head, (x,), backbone.parameters(), segment
            )
        assert isinstance(pooled, tuple) == (pool == "both")
        vector = pooled[0] + 2 * pooled[1] if isinstance(pooled, tuple) else pooled
        losses.append(F.cross_entropy(classifier(vector), targets))
    assert_close(losses[0], losses[1], EXACT)
    got, want = (torch.autograd.grad(loss, leaves) for loss in losses)
    for g, w in zip(got, want):
        assert_close(g, w, EXACT)


def test_ahead_gives_the_inputs_gradients_too() -> None:
    backbone = Backbone(BackboneConfig(d_model=16, n_layers=1, mixer=MambaConfig(d_state=4))).double()
    x = torch.randn(1, 11, 16, dtype=torch.float64, requires_grad=True)
    loss = sum_over_segments(
        lambda own, state: backbone(own.inputs[0], state),
        lambda hidden, own: hidden.square().sum(),
        (x,),
        backbone.parameters(),
        4,
        ahead=True,
    )
    want = backbone(x)[0].square().sum()
    assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(want, x)[0], EXACT)


# ---------------------------------------------------------------------- random numbers


@pytest.mark.parametrize("again", [False, True])
def test_dropout_draws_the_same_numbers_again(again: bool) -> None:
    """Against one graph over all segments, made by hand with the same seed; the generator ends as there."""
    lm, (ids, labels) = model(dropout=0.4), batch()
    lm.backbone.gradient_checkpointing = again
    for ahead in (True, False):

        def head(hidden: Tensor, own: Segment) -> Tensor:
            return plain(lm, hidden, own.inputs[1])

        torch.manual_seed(3)
        state, want = None, torch.zeros((), dtype=torch.float64)
        for a in range(0, 37, 8):
            hidden, state = lm.hidden(ids[:, a : a + 8], state)
            want = want + plain(lm, hidden, labels[:, a : a + 8])
        end = torch.get_rng_state()
        torch.manual_seed(3)
        got = sum_over_segments(body_of(lm), head, (ids, labels), lm.parameters(), 8, ahead=ahead)
        assert torch.equal(torch.get_rng_state(), end)
        torch.rand(5)  # what is drawn before the backward changes nothing, and nothing is changed by it
        end = torch.get_rng_state()
        assert_gradients(lm, got, want)
        assert torch.equal(torch.get_rng_state(), end)
    torch.manual_seed(4)
    assert relative_error(long_token_loss(lm, ids, labels, segment=8)[0], want) > 1e-3


def plain(lm: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        lm.logits(hidden).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_restored_for_what_is_computed_again(dtype: torch.dtype) -> None:
    """Gradients as those of the plain model under the same autocast, with the backward outside of it."""
    torch.manual_seed(1)
    lm = model().float()
    ids, labels = batch(24, unlabelled=4)
    seen: set[torch.dtype] = set()
    lm.backbone.layers[1].mixer.in_proj.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    with torch.autocast("cpu", dtype=dtype):
        loss, _ = long_token_loss(lm, ids, labels, segment=7, chunk=5)
        want = F.cross_entropy(
            lm(ids)[0].float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
    scale = 8.0 if dtype == torch.float16 else 1.0  # as of a GradScaler
    (scale * loss).backward()
    got = [p.grad / scale for p in lm.parameters()]
    assert seen == {dtype}
    rounded = torch.autograd.grad(want, list(lm.parameters()))
    wide = copy.deepcopy(lm).double()
    exact = torch.autograd.grad(plain_loss(wide, ids, labels), list(wide.parameters()))
    assert all(p.dtype == torch.float32 for p in got)
    for (name, _), g, w, r in zip(lm.named_parameters(), got, exact, rounded):
        # Rounding differs, its size does not.
        assert relative_error(g, w) < 1.5 * max(relative_error(r, w), 1e-4), name


@pytest.mark.parametrize("ahead", [True, False])
def test_autocast_casts_a_weight_once_a_pass(ahead: bool) -> None:
    """Not once a segment; what a pass without gradients cast serves none with them, nor the caller."""
    torch.manual_seed(1)
    lm = model().float()
    ids, labels = batch(24)
    weight = lm.backbone.layers[1].mixer.in_proj.weight
    casts: list[bool] = []

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and args[0] is weight:
                casts.append(True)
            return func(*args, **(kwargs or {}))

    def head(hidden: Tensor, own: Segment) -> Tensor:
        return plain(lm, hidden, own.inputs[1])

    with Casts(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sum_over_segments(body_of(lm), head, (ids, labels), lm.parameters(), 6, ahead=ahead)
        grads = torch.autograd.grad(loss, list(lm.parameters()))
        assert len(casts) == 2
        # The caller's own forward casts again, with gradients.
        want = plain(lm, lm.hidden(ids)[0], labels)
        assert len(casts) == 3
        expected = torch.autograd.grad(want, list(lm.parameters()))
    for g, e in zip(grads, expected):
        assert relative_error(g, e) < 2e-2


def test_half_precision_parameters_are_summed_in_fp32() -> None:
    """Many segments' bf16 gradients add up to what fp32 gradients would be, rounded once."""
    weight = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    x = torch.full((1, 600, 4), 1.0, dtype=torch.bfloat16)
    total = sum_over_segments(
        lambda own, state: (own.inputs[0] * weight, Empty(own.inputs[0][:, -1])),
        lambda hidden, own: hidden.float().sum(),
        (x,),
        [weight],
        1,
        ahead=True,
    )
    (grad,) = torch.autograd.grad(total, [weight])
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grad, torch.full((4,), 600.0, dtype=torch.bfloat16))  # bf16 sums of ones stop at 256


@dataclass(frozen=True)
class Empty(ssm_modal.State):
    """A state of one tensor that nothing reads."""

    last: Tensor


def test_the_backend_chosen_around_the_forward_serves_the_backward_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ssm_modal.kernels.scan import custom_op

    served: set[str] = set()
    real = custom_op.backend_functions
    monkeypatch.setattr(custom_op, "backend_functions", lambda b: served.add(b) or real(b))
    lm, (ids, labels) = model().float(), batch(20)
    loss_of = lambda hidden, own: plain(lm, hidden, own.inputs[1])  # noqa: E731
    with use_backend("torch"):
        loss = sum_over_segments(body_of(lm), loss_of, (ids, labels), lm.parameters(), 8)
    loss.backward()
    assert served == {"torch"}


# ---------------------------------------------------------------------- autograd's rules


def test_frozen_parameters_hooks_and_accumulation() -> None:
    lm, (ids, labels) = model(), batch()
    frozen = lm.backbone.layers[0].mixer.in_proj.weight.requires_grad_(False)
    fired: list[Tensor] = []
    lm.embedding.weight.register_hook(lambda grad: fired.append(grad) or 2 * grad)  # type: ignore[func-returns-value]
    for row in (0, 1):  # two micro-batches
        long_token_loss(lm, ids[row : row + 1], labels[row : row + 1], segment=9)[0].backward()
    assert frozen.grad is None
    assert len(fired) == 2
    assert len(lm.embedding.weight._backward_hooks) == 1
    kept = {n: p.grad for n, p in lm.named_parameters() if p.requires_grad}
    lm.zero_grad()
    plain_loss(lm, ids, labels).backward()
    assert len(fired) == 3
    for name, p in lm.named_parameters():
        if p.requires_grad:
            assert_close(kept[name], p.grad, EXACT, name)


def test_a_parameter_changed_before_the_backward_raises() -> None:
    lm, (ids, labels) = model(), batch()
    loss = sum_over_segments(
        body_of(lm), lambda h, own: plain(lm, h, own.inputs[1]), (ids, labels), lm.parameters(), 9
    )
    with torch.no_grad():
        lm.embedding.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"parameter of shape \(13, 16\) was changed in place"):
        loss.backward()


def test_second_derivatives_and_second_backwards_raise() -> None:
    lm, (ids, labels) = model(), batch()
    loss, _ = long_token_loss(lm, ids, labels, segment=9)
    with pytest.raises(RuntimeError, match=r"first derivatives only, .* create_graph=True"):
        loss.backward(create_graph=True)
    whole, _ = long_token_loss(lm, ids, labels)
    with pytest.raises(RuntimeError, match=r"first derivatives only, .* create_graph=True"):
        whole.backward(create_graph=True)
    loss, _ = long_token_loss(lm, ids, labels, segment=9)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# ---------------------------------------------------------------------- errors


def test_bad_arguments_are_named() -> None:
    lm, (ids, labels) = model(), batch()
    for segment, error in ((0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="segment"):
            long_token_loss(lm, ids, labels, segment=segment)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels has shape \(2, 36\), expected \(2, 37\)"):
        long_token_loss(lm, ids, labels[:, 1:], segment=5)
    with pytest.raises(ValueError, match="expected 1 with seqs"):
        long_token_loss(lm, ids, labels, segment=5, seqs=Sequences.from_lengths([37]))
    with pytest.raises(ValueError, match="seqs covers 36 steps, expected 37"):
        long_token_loss(lm, ids[:1], labels[:1], segment=5, seqs=Sequences.from_lengths([36]))
    body, head = body_of(lm), lambda h, own: h.sum()
    with pytest.raises(ValueError, match="inputs is empty"):
        sum_over_segments(body, head, (), lm.parameters(), 5)
    with pytest.raises(ValueError, match=r"inputs\[1\] has shape \(1, 37\)"):
        sum_over_segments(body, head, (ids, labels[:1]), lm.parameters(), 5)
    with pytest.raises(TypeError, match=r"inputs\[0\] must be a tensor, got list"):
        sum_over_segments(body, head, ([1],), lm.parameters(), 5)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="seqs must be Sequences or None, got list"):
        sum_over_segments(body, head, (ids,), lm.parameters(), 5, seqs=[0, 37])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"parameters\[0\] must be a tensor, got str"):
        sum_over_segments(body, head, (ids,), ["w"], 5)  # type: ignore[list-item]
    with pytest.raises(
        ValueError, match=r"ahead needs a head that returns one real scalar, got shapes \(2, 16\)"
    ):
        sum_over_segments(body, lambda h, own: h.sum(1), (ids,), lm.parameters(), 5, ahead=True)
    with pytest.raises(TypeError, match="head must return tensors, got float"):
        sum_over_segments(body, lambda h, own: 1.0, (ids,), lm.parameters(), 5)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    "config",
    [
        BackboneConfig(16, 1, MambaConfig(d_state=4), bidirectional=BidirectionalConfig()),
        BackboneConfig(16, 1, AttentionConfig(n_heads=2, causal=False)),
    ],
)
def test_a_model_that_needs_the_whole_sequence_raises(config: BackboneConfig) -> None:
    backbone = Backbone(config)
    x = torch.randn(1, 9, 16)
    with pytest.raises(StateError, match=r"after step 4, but the rest needs one; .*recompute its blocks"):
        sum_over_segments(
            lambda own, state: backbone(own.inputs[0], state),
            lambda h, own: h.sum(),
            (x,),
            backbone.parameters(),
            4,
        )
