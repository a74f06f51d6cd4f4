"""The loss by chunks of positions: the value and the gradients of the full logits, which never exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_modal.heads import LanguageHead, chunked_cross_entropy, long_token_loss
from ssm_modal.heads.chunked_loss import default_chunk
from ssm_modal.models import create_model
from tests.tolerances import assert_close, relative_error

VOCAB, WIDTH = 29, 8


def head(tied: bool = False, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[nn.Parameter]]:
    embedding = nn.Embedding(32, WIDTH)
    made = LanguageHead(WIDTH, VOCAB, rows=32, embedding=embedding if tied else None)
    parameters = [embedding.weight] if tied else list(made.parameters())
    for p in parameters:
        p.data = p.data.to(dtype)
    return made, parameters


def inputs(dtype: torch.dtype = torch.float64, labelled: float = 0.7) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(3, 11, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCAB, (3, 11)).masked_fill(torch.rand(3, 11) > labelled, -100)
    return hidden, labels


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("labelled", [1.1, 0.6, -1.0], ids=["all", "some", "none"])
@pytest.mark.parametrize("chunk", [1, 4, 33, 1000])
def test_equals_the_full_logits(chunk: int, labelled: float, tied: bool, device: torch.device) -> None:
    made, parameters = head(tied)
    for p in parameters:
        p.data = p.data.to(device)
    hidden, labels = inputs(labelled=labelled)
    hidden, labels = hidden.detach().to(device).requires_grad_(), labels.to(device)
    loss, count = chunked_cross_entropy(made, parameters, hidden, labels, chunk=chunk)
    assert int(count) == int((labels != -100).sum())
    want = plain(made(hidden), labels)
    assert_close(loss, want, 1e-12)
    got = torch.autograd.grad(0.3 * loss, [hidden, *parameters])
    for g, w in zip(got, torch.autograd.grad(0.3 * want, [hidden, *parameters])):
        assert_close(g, w, 1e-12)
    with torch.no_grad():
        assert_close(chunked_cross_entropy(made, parameters, hidden, labels, chunk=chunk)[0], want, 1e-12)


def test_any_head_and_gradients_of_what_asks_for_them() -> None:
    """A head of several layers that keeps its own output for its backward; frozen weights or inputs."""
    made = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, VOCAB), nn.Tanh()).double()
    unused = nn.Parameter(torch.ones(3))
    made[2].weight.requires_grad_(False)
    hidden, labels = inputs()
    parameters = [*made.parameters(), unused]
    loss, _ = chunked_cross_entropy(made, parameters, hidden, labels, chunk=7)
    wanted = [hidden, *(p for p in parameters if p.requires_grad)]
    got = torch.autograd.grad(loss, wanted, allow_unused=True)
    want = torch.autograd.grad(plain(made(hidden), labels), wanted, allow_unused=True)
    assert got[-1] is None
    assert want[-1] is None
    for g, w in zip(got[:-1], want[:-1]):
        assert_close(g, w, 1e-12)
    loss, _ = chunked_cross_entropy(made, parameters, hidden.detach(), labels, chunk=7)
    (g,) = torch.autograd.grad(loss, [made[0].weight])
    assert_close(g, want[1], 1e-12)
    made.requires_grad_(False)
    loss, _ = chunked_cross_entropy(made, [], hidden, labels, chunk=7)
    (g,) = torch.autograd.grad(loss, [hidden])
    assert_close(g, want[0], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_fp32(dtype: torch.dtype) -> None:
    """Value and gradients as close to fp64 as the full logits' are; fp16 under a large and a small scale."""
    made, parameters = head(dtype=dtype)
    hidden, labels = inputs(dtype)
    wide_made, wide_parameters = head()
    for w, p in zip(wide_parameters, parameters):
        w.data = p.data.double()
    wide = hidden.detach().double().requires_grad_()
    exact = torch.autograd.grad(plain(wide_made(wide), labels), [wide, *wide_parameters])
    for scale in (1.0, 2.0**12, 2.0**-8):
        loss, _ = chunked_cross_entropy(made, parameters, hidden, labels, chunk=5)
        assert loss.dtype == torch.float32
        want = plain(made(hidden), labels)
        assert_close(loss, want, 1e-6)
        got = torch.autograd.grad(loss * scale, [hidden, *parameters])
        ours = torch.autograd.grad(want * scale, [hidden, *parameters])
        for g, o, e in zip(got, ours, exact):
            assert g.dtype == dtype
            assert relative_error(g / scale, e) < 1.3 * relative_error(o / scale, e)


def test_fp16_gradients_see_the_scale_before_they_are_rounded() -> None:
    """A softmax of 1e-9 vanishes in fp16; with the scale 2^14 it does not."""
    weight = nn.Parameter(torch.tensor([[0.0], [-20.0]], dtype=torch.float16))
    hidden = torch.ones(1, 1, 1, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(1, 1, dtype=torch.int64)
    loss, _ = chunked_cross_entropy(lambda h: F.linear(h, weight), [weight], hidden, labels, chunk=1)
    (loss * 2.0**14).backward()
    assert weight.grad is not None
    assert float(weight.grad[1]) == pytest.approx(2.061e-9 * 2**14, rel=1e-2)


def test_a_head_with_dropout_draws_the_same_numbers_in_fp16s_second_pass() -> None:
    made = nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, VOCAB, bias=False))
    hidden, labels = inputs(torch.float32, labelled=1.1)
    grads = []
    for chunked in (True, False):
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.float16):
            if chunked:
                loss, _ = chunked_cross_entropy(made, made.parameters(), hidden, labels, chunk=33)
            else:
                loss = plain(made(hidden), labels)
        after = torch.get_rng_state()
        grads.append(torch.autograd.grad(loss, [hidden])[0])
        assert torch.equal(torch.get_rng_state(), after)
    assert_close(grads[0], grads[1], 3e-3)
    assert ((grads[0] == 0) == (grads[1] == 0)).all()


class Widest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of any tensor made with a vocabulary's axis."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.ndim and t.shape[-1] == self.vocab:
                self.rows = max(self.rows, t.numel() // self.vocab)
        return out


@pytest.mark.parametrize("segment", [None, 20])
def test_the_full_logits_never_exist(segment: int | None) -> None:
    lm = create_model("mamba_lm", vocab_size=997, d_model=8, n_layers=1)
    ids = torch.randint(997, (2, 50))
    with Widest(997) as widest:
        long_token_loss(lm, ids, ids, segment=segment, chunk=11)[0].backward()
    assert widest.rows == 11  # the weight has 8


def test_default_chunk() -> None:
    assert default_chunk(50280, torch.device("cuda")) == 5338
    assert default_chunk(50280, torch.device("cpu")) == 333
    assert default_chunk(1 << 40, torch.device("cpu")) == 1


def test_bad_arguments_are_named() -> None:
    made, parameters = head()
    hidden, labels = inputs()
    with pytest.raises(ValueError, match="chunk is 0"):
        chunked_cross_entropy(made, parameters, hidden, labels, chunk=0)
    with pytest.raises(TypeError, match="chunk must be a whole number, got float"):
        chunked_cross_entropy(made, parameters, hidden, labels, chunk=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels has shape \(3, 10\), expected \(3, 11\)"):
        chunked_cross_entropy(made, parameters, hidden, labels[:, 1:], chunk=4)
    with pytest.raises(TypeError, match=r"labels has dtype torch.int32, expected int64"):
        chunked_cross_entropy(made, parameters, hidden, labels.int(), chunk=4)
    for wrong in (VOCAB, -1):
        labels[1, 2] = wrong
        with pytest.raises(ValueError, match=f"labels holds {wrong}, expected 0 to 28, or -100"):
            chunked_cross_entropy(made, parameters, hidden, labels, chunk=4)
    with pytest.raises(ValueError, match=r"logits must give \(rows, vocab\) floating logits"):
        chunked_cross_entropy(lambda h: h.sum(-1), [], hidden, labels, chunk=4)
