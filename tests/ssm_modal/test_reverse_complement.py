"""The law of the two strands: for the embedding, every layer, per-position and pooled heads, packed or not;
and masked models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ssm_modal
from ssm_modal.backbone import BackboneConfig
from ssm_modal.errors import ConfigError, StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.reverse_complement import (
    Strands,
    StrandsConfig,
    reverse_complement_hidden,
    reverse_complement_logits,
    reversed_steps,
)
from ssm_modal.models import MaskedLM, MaskedLMConfig, SequenceClassifier
from ssm_modal.tokenizers import DNATokenizer, KmerTokenizer, NucleotideTokenizer
from tests.tolerances import OUTPUT, assert_close

TOKENIZERS: dict[str, tuple[dict[str, Any] | None, DNATokenizer]] = {
    "nucleotides": (None, NucleotideTokenizer()),
    "k-mers": ({"kmer": 2, "overlapping": False}, KmerTokenizer(2, False)),
    "overlapping k-mers": ({"kmer": 2, "overlapping": True}, KmerTokenizer(2, True)),
}
TINY: dict[str, Any] = {"d_model": 8, "n_layers": 2, "d_state": 4, "embedding_std": 1.0}
LENGTHS = (5, 1, 0, 7)
FP64 = torch.float64


def strands(kind: str) -> StrandsConfig:
    return StrandsConfig(**(TOKENIZERS[kind][0] or {}))


def draw(kind: str, *shape: int) -> Tensor:
    """Ids of every kind, special ones too; not the single bases behind non-overlapping k-mers."""
    tokenizer = TOKENIZERS[kind][1]
    single = torch.arange(tokenizer.n_id + 1, tokenizer.pad_id)
    allowed = torch.tensor([i for i in range(tokenizer.vocab_size) if i not in single])
    return allowed[torch.randint(0, len(allowed), shape)]


def masked(kind: str = "nucleotides", dtype: torch.dtype = FP64, **more: Any) -> MaskedLM:
    vocab_size = TOKENIZERS[kind][1].vocab_size
    overrides = {**TINY, "vocab_size": vocab_size, "strands": strands(kind), **more}
    model = ssm_modal.create_model("caduceus_ps", **overrides)
    assert isinstance(model, MaskedLM)
    return model.to(dtype).eval()


def classifier(name: str = "caduceus_ps_classifier", **more: Any) -> SequenceClassifier:
    model = ssm_modal.create_model(name, **{**TINY, "n_classes": 3, **more})
    assert isinstance(model, SequenceClassifier)
    return model.to(FP64).eval()


def packed(kind: str, tokenizer: DNATokenizer) -> tuple[Tensor, Tensor, Sequences]:
    """Sequences end to end, each one's other strand in its place, and their borders."""
    rows = [draw(kind, n) for n in LENGTHS]
    other = [tokenizer.reverse_complement(row) for row in rows]
    return torch.cat(rows)[None], torch.cat(other)[None], Sequences.from_lengths(LENGTHS)


# ---------------------------------------------------------------- the law


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_embedding_every_layer_hidden_and_logits_are_equivariant(kind: str) -> None:
    tokenizer = TOKENIZERS[kind][1]
    model = masked(kind, tie_embeddings=False, n_layers=3)
    assert model.strands is not None
    seen: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, args, out: seen.append(out))
    for block in model.backbone.layers:
        block.register_forward_hook(lambda module, args, out: seen.append(out[0] + out[1]))
    ids = draw(kind, 2, 9)
    hidden, _ = model.hidden(ids)
    there, seen = seen, []
    again, _ = model.hidden(tokenizer.reverse_complement(ids))
    assert hidden.shape == (2, 9, 16)
    assert len(there) == len(seen) == 4
    for layer, (a, b) in enumerate(zip(there, seen)):
        a, b = model.strands.join(a), model.strands.join(b)
        assert_close(b, reverse_complement_hidden(a), OUTPUT[FP64], f"layer {layer}")
        # The law is not met by saying the same of everything.
        assert (a - reverse_complement_hidden(a)).abs().max().item() > 1e-3
    assert_close(again, reverse_complement_hidden(hidden), OUTPUT[FP64], "hidden")
    logits, other = model.logits(hidden), model.logits(again)
    assert_close(other, reverse_complement_logits(logits, tokenizer.complement), OUTPUT[FP64], "logits")
    assert logits.std().item() > 1e-3


def test_logits_are_the_mean_of_both_strands_by_hand() -> None:
    """Position t of the given strand is position n - 1 - t of the other, and A there is T here."""
    tokenizer = NucleotideTokenizer()
    model = masked()
    plain = ssm_modal.create_model("caduceus_ph", **TINY).double().eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([tokenizer.encode("ACGTTNA")])
    given, _ = plain(ids)
    other, _ = plain(torch.tensor([tokenizer.encode("TNAACGT")]))
    logits, state = model(ids)
    assert state is None
    for place in range(7):
        for base, complement in zip("ACGTN", "TGCAN"):
            a, b = tokenizer.encode(base)[0], tokenizer.encode(complement)[0]
            expected = (given[0, place, a] + other[0, 6 - place, b]) / 2
            assert_close(logits[0, place, a], expected, OUTPUT[FP64])
        # begin (7) here is end (8) there
        assert_close(logits[0, place, 7], (given[0, place, 7] + other[0, 6 - place, 8]) / 2, OUTPUT[FP64])


@pytest.mark.parametrize("kind", ["nucleotides", "overlapping k-mers"])
def test_packed_sequences_are_reversed_each_in_itself(kind: str) -> None:
    tokenizer = TOKENIZERS[kind][1]
    model = masked(kind)
    ids, other, seqs = packed(kind, tokenizer)
    logits, _ = model(ids, seqs=seqs)
    for start, n in zip(seqs.starts, LENGTHS):
        if n:
            alone, _ = model(ids[:, start : start + n])
            assert_close(logits[:, start : start + n], alone, OUTPUT[FP64])
    expected = reverse_complement_logits(logits, tokenizer.complement, seqs)
    assert_close(model(other, seqs=seqs.cu_seqlens)[0], expected, OUTPUT[FP64])
    hidden, _ = model.hidden(ids, seqs=seqs)
    again, _ = model.hidden(other, seqs=seqs)
    assert_close(again, reverse_complement_hidden(hidden, seqs), OUTPUT[FP64])


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("name", ["caduceus_ps_classifier", "caduceus_ph_classifier"])
def test_pooled_logits_are_the_same_for_both_strands(name: str, pooling: str) -> None:
    model = classifier(name, pooling=pooling)
    ids, other, seqs = packed("nucleotides", NucleotideTokenizer())
    logits, state = model(ids, seqs=seqs)
    assert state is None
    assert_close(model(other, seqs=seqs)[0], logits, OUTPUT[FP64])
    plain = ssm_modal.create_model("dna_classifier", **{**TINY, "n_classes": 3, "pooling": pooling})
    plain.load_state_dict(model.state_dict())
    plain = plain.double().eval()
    assert_close(logits, (plain(ids, seqs=seqs)[0] + plain(other, seqs=seqs)[0]) / 2, OUTPUT[FP64])
    row = ids[:, :5]
    assert_close(model(row)[0], logits[:1], OUTPUT[FP64])


def test_what_the_law_does_not_hold_for() -> None:
    """The plain model, Caduceus-Ph in training, and a head that is to tell the strands apart."""
    tokenizer = NucleotideTokenizer()
    ids = draw("nucleotides", 2, 9)
    other = tokenizer.reverse_complement(ids)
    trained = classifier("caduceus_ph_classifier").train()
    plain = classifier("dna_classifier")
    plain.load_state_dict(trained.state_dict())
    assert torch.equal(trained(ids)[0], plain(ids)[0])
    aware = classifier(strand_use="aware")
    assert aware.head.proj.weight.shape == (3, 16)
    for model in (plain, trained, aware):
        assert (model(ids)[0] - model(other)[0]).abs().max().item() > 1e-4
    # Exchanging the halves of its weight is exchanging the strands.
    with torch.no_grad():
        left, right = aware.head.proj.weight.clone().chunk(2, dim=1)
        before = aware(ids)[0]
        aware.head.proj.weight.copy_(torch.cat([right, left], dim=1))
    assert_close(aware(other)[0], before, OUTPUT[FP64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_law_in_the_dtypes_of_training(dtype: torch.dtype) -> None:
    tokenizer = NucleotideTokenizer()
    model = masked(dtype=dtype)
    ids = draw("nucleotides", 2, 9)
    logits = model(ids)[0]
    other = model(tokenizer.reverse_complement(ids))[0]
    assert_close(other, reverse_complement_logits(logits, tokenizer.complement), OUTPUT[dtype])


def test_gradients_are_the_same_for_both_strands() -> None:
    """A loss over all places of one strand has the gradients of the same loss on the other."""
    tokenizer = NucleotideTokenizer()
    model = masked().train()
    ids = draw("nucleotides", 1, 9)
    found = []
    for one in (ids, tokenizer.reverse_complement(ids)):
        loss = torch.nn.functional.cross_entropy(model(one)[0][0], one[0])
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for (name, _), a, b in zip(model.named_parameters(), *found):
        assert_close(a, b, 1e-9, name)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    model = masked().train()
    ids = draw("nucleotides", 2, 9)
    found = []
    for again in (False, True):
        model.backbone.gradient_checkpointing = again
        found.append(torch.autograd.grad(model(ids)[0].square().sum(), list(model.parameters())))
    for a, b in zip(*found):
        assert_close(a, b, 1e-12)


# ---------------------------------------------------------------- strands, configs, saving


def test_both_and_join_by_hand() -> None:
    one = Strands(StrandsConfig(), 9)
    rows, none = one.both(torch.tensor([[0, 1, 4], [7, 2, 6]]))
    assert none is None
    assert rows.tolist() == [[0, 1, 4], [7, 2, 6], [4, 2, 3], [6, 1, 8]]
    seqs = Sequences.from_lengths((2, 0, 1))
    rows, both = one.both(torch.tensor([[0, 1, 2]]), seqs)
    assert rows.tolist() == [[0, 1, 2, 2, 3, 1]]
    assert both is not None
    assert both.lengths == (2, 0, 1, 2, 0, 1)
    assert both.cu_seqlens.tolist() == [0, 2, 2, 3, 5, 5, 6]
    joined = one.join(torch.arange(6.0).view(1, 6, 1), seqs)
    assert joined.tolist() == [[[0.0, 4.0], [1.0, 3.0], [2.0, 5.0]]]
    assert one.join(torch.arange(6.0).view(2, 3, 1)).tolist() == [[[0.0, 5.0], [1.0, 4.0], [2.0, 3.0]]]
    assert reversed_steps(torch.tensor([[1, 2, 3]]), seqs).tolist() == [[2, 1, 3]]


def test_saved_models_come_back(tmp_path: Path) -> None:
    ids = draw("nucleotides", 2, 7)
    for model in (masked(), classifier(strand_use="aware")):
        model.save_pretrained(tmp_path / "model")
        again = ssm_modal.load_pretrained(tmp_path / "model")
        assert again.config == model.config
        assert torch.equal(again(ids)[0], model(ids)[0])


def test_parameters_are_those_of_one_strand_and_of_the_published_size() -> None:
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in ssm_modal.create_model(name).parameters())
            for name in ("caduceus_ps", "caduceus_ph")
        }
    # 16 layers of d_model 256: the paper's table says 7.7 M.
    assert sizes["caduceus_ps"] == sizes["caduceus_ph"] == 7_723_520
    layer = ssm_modal.create_model("caduceus_ps", d_model=8, n_layers=1).backbone.layers[0].mixer
    names = {name for name, _ in layer.named_parameters()}
    assert "forwards.in_proj.weight" in names
    assert "backwards.conv1d.weight" in names
    assert not any(name.startswith(("backwards.in_proj", "backwards.out_proj")) for name in names)


def test_bad_configs_and_states() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 10, expected 9, the vocabulary of nucleotides"):
        ssm_modal.create_model("caduceus_ps", vocab_size=10)
    with pytest.raises(ConfigError, match="kmer is 11, expected 1 to 10"):
        StrandsConfig(kmer=11)
    with pytest.raises(ConfigError, match="overlapping is True without kmer"):
        StrandsConfig(overlapping=True)
    with pytest.raises(ConfigError, match="the backbone is causal"):
        MaskedLMConfig(vocab_size=9, backbone=BackboneConfig(d_model=8, n_layers=1))
    with pytest.raises(ConfigError, match="strands is set, but the input is 'waveform', not ids"):
        ssm_modal.create_model("audio_classifier", input={"type": "waveform"}, strands={"type": "strands"})
    state = ssm_modal.create_model("dna_lm", **TINY).init_state(1)
    with pytest.raises(StateError, match="MaskedLM: was given a state"):
        masked()(torch.zeros(1, 3, dtype=torch.int64), state)
    causal = classifier(bidirectional=None)
    assert not causal.has_state
    with pytest.raises(StateError, match="needs the whole sequence"):
        causal.init_state(1)
