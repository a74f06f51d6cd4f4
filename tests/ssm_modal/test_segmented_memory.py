"""Training and evaluation by segments: what is kept, the peak of memory, one pass without gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ssm_modal
from ssm_modal.backbone import Segment, iterate_segments, sum_over_segments
from ssm_modal.heads import long_token_loss, long_token_nats
from ssm_modal.kernels.sequences import Sequences
from tests.ssm_modal.test_segmented import (
    EXACT,
    batch,
    body_of,
    model,
    plain,
    plain_loss,
)
from tests.tolerances import assert_close

# ---------------------------------------------------------------------- memory


def saved_bytes(lm: Any, length: int, segment: int | None, seqs: Sequences | None = None) -> int:
    """Bytes that autograd keeps between forward and backward, beside the parameters."""
    ids, labels = batch(length, rows=1)
    known = {p.data_ptr() for p in lm.parameters()}
    total = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal total
        if t.data_ptr() not in known:
            known.add(t.data_ptr())
            total += t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if segment is None:
            plain_loss(lm, ids, labels)
        else:
            head = lambda hidden, own: plain(lm, hidden, own.inputs[1])  # noqa: E731
            sum_over_segments(body_of(lm), head, (ids, labels), lm.parameters(), segment, seqs=seqs)
    return total


@pytest.mark.parametrize("name", ["mamba_lm", "s4d_lm"])
def test_what_is_kept_is_states_and_ids(name: str) -> None:
    lm = model(name)
    state = sum(t.numel() * t.element_size() for t in lm.init_state(1).tensors())
    whole = saved_bytes(lm, 512, None)
    later = saved_bytes(lm, 512, 64)
    # Seven boundaries have a state; ids and labels are given anyway.
    assert 7 * state <= later <= 7 * state + 2 * 512 * 8
    assert later < whole / 10
    # Packed, a segment's state has a row a sequence; the one row that goes on is kept, and not a view of all.
    assert saved_bytes(lm, 512, 64, Sequences.from_lengths([30] * 17 + [2])) == later


def test_ahead_keeps_the_gradients_alone() -> None:
    lm = model()
    loss, _ = long_token_loss(lm, *batch(300), segment=64)
    kept = [tuple(t.shape) for t in loss.grad_fn.saved_tensors]  # type: ignore[union-attr]
    assert kept == [tuple(p.shape) for p in lm.parameters()]
    assert not hasattr(loss.grad_fn, "kept")


def test_peak_memory_is_one_segments() -> None:
    """Live bytes, by watching every tensor made: 16 times the length takes little more."""
    peaks = []
    for length in (256, 4096):
        lm = model()
        ids, labels = batch(length, rows=1)
        with Watch() as watch:
            long_token_loss(lm, ids, labels, segment=128, chunk=64)[0].backward()
        peaks.append(watch.peak - 2 * ids.numel() * 8)
    with Watch() as watch:
        plain_loss(lm, ids, labels).backward()
    states = sum(t.numel() * t.element_size() for t in lm.init_state(1).tensors())
    assert peaks[1] < peaks[0] + 40 * states + 100_000
    assert peaks[1] < watch.peak / 8


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Peak of the bytes in storages that are alive and were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self.live and storage.nbytes():
                    self.live[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


@pytest.mark.gpu
def test_peak_memory_on_a_gpu_hardly_grows_with_the_length() -> None:
    device = torch.device("cuda")
    lm = ssm_modal.create_model("mamba_lm", vocab_size=50280, d_model=256, n_layers=4).to(device)
    peaks = []
    for length in (1 << 15, 1 << 16, 1 << 17):
        ids = torch.randint(50280, (1, length), device=device)
        lm.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss, _ = long_token_loss(lm, ids, ids, segment=1 << 12, chunk=1024)
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] < peaks[0] * 1.03
    assert peaks[2] < 3 << 30  # full logits alone would take 24 GiB


# ---------------------------------------------------------------------- evaluation


def test_without_gradients_it_is_one_pass() -> None:
    lm, (ids, labels) = model(), batch()
    starts: list[int] = []
    body = body_of(lm)

    def counted(own: Segment, state: Any) -> tuple[Tensor, Any]:
        starts.append(own.start)
        return body(own, state)

    with torch.no_grad():
        total = sum_over_segments(
            counted, lambda h, own: plain(lm, h, own.inputs[1]), (ids, labels), lm.parameters(), 15
        )
        assert_close(total, plain_loss(lm, ids, labels), EXACT)
    assert starts == [0, 15, 30]
    assert not total.requires_grad


@pytest.mark.parametrize("packed", [False, True])
def test_nats_and_hidden_by_segments(packed: bool) -> None:
    lm, (ids, labels) = model(), batch(rows=1)
    seqs = Sequences.from_lengths([20, 0, 17]) if packed else None
    nats = long_token_nats(lm, ids, labels, segment=6, seqs=seqs, chunk=4)
    want = F.cross_entropy(lm(ids, seqs=seqs)[0][0], labels[0], ignore_index=-100, reduction="none")
    assert_close(nats[0], want, EXACT)
    assert (nats[labels == -100] == 0).all()
    assert not nats.requires_grad
    found = [h for _, h in iterate_segments(body_of(lm), (ids,), 6, seqs=seqs)]
    assert_close(torch.cat(found, 1), lm.hidden(ids, seqs=seqs)[0], EXACT)
