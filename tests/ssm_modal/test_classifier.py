"""The sequence classifier: packed equals separate, chunks equal the whole, the strided front end against a
plain convolution, pooling by hand, configs, errors and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ssm_modal
from ssm_modal.errors import ConfigError, StateError
from ssm_modal.heads import ClassificationHead
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers import IdsConfig, MambaConfig, StridedWaveformConfig, WaveformConfig
from ssm_modal.layers.inputs import StridedWaveformInput
from ssm_modal.models import ModelConfig, SequenceClassifier, SequenceClassifierConfig, model_config
from tests.tolerances import GRADIENT, OUTPUT, assert_close

FP64 = torch.float64
# Shorter than a stride, than a kernel, a multiple of the stride, one more, and nothing at all.
LENGTHS = (1, 2, 9, 0, 12, 13, 4)
INPUTS: dict[str, Any] = {
    "ids": {"type": "ids", "vocab_size": 7, "embedding_std": 1.0},
    "waveform": {"type": "waveform", "scale": 2.0},
    "strided": {"type": "strided_waveform", "kernel": 7, "stride": 4, "scale": 2.0},
    "one sample": {"type": "strided_waveform", "kernel": 1, "stride": 1},
}
VECTORS = {"type": "vectors", "channels": 2, "positions": 13}


def small(input: str = "strided", direction: str = "causal", **more: Any) -> SequenceClassifier:
    name = "audio_classifier_causal" if direction == "causal" else "audio_classifier"
    overrides = {"input": INPUTS[input], "d_model": 8, "n_layers": 2, "d_state": 4, "n_classes": 3, **more}
    model = ssm_modal.create_model(name, **overrides)
    assert isinstance(model, SequenceClassifier)
    return model.double()


def inputs(kind: str, *shape: int) -> Tensor:
    return torch.randint(0, 7, shape) if kind == "ids" else torch.randn(*shape, dtype=FP64)


def sequences(kind: str) -> list[Tensor]:
    return [inputs(kind, 1, n) for n in LENGTHS]


CASES = [
    ("ids", "causal", "last"),
    ("ids", "both", "mean"),
    ("waveform", "causal", "mean"),
    ("waveform", "both", "max"),
    ("strided", "causal", "last"),
    ("strided", "causal", "max"),
    ("strided", "causal", "mean"),
    ("strided", "both", "mean"),
    ("one sample", "both", "mean"),
]


@pytest.mark.parametrize(("kind", "direction", "pooling"), CASES)
def test_packed_sequences_are_separate_sequences(kind: str, direction: str, pooling: str) -> None:
    """Logits, and the gradients of every parameter and of the waveform."""
    model = small(kind, direction, pooling=pooling)
    pieces = [x for x in sequences(kind) if x.shape[1]]
    if kind != "ids":
        pieces = [x.requires_grad_() for x in pieces]
    weight = torch.randn(len(pieces), 3, dtype=FP64)
    alone = torch.cat([model(x)[0] for x in pieces])
    wanted: list[Any] = list(model.parameters()) + ([] if kind == "ids" else pieces)
    separate = torch.autograd.grad((alone * weight).sum(), wanted)
    cu = torch.tensor([0] + [x.shape[1] for x in pieces]).cumsum(0)
    for seqs in (cu, Sequences.from_cu_seqlens(cu, int(cu[-1]), cu.device)):
        packed, state = model(torch.cat(pieces, 1), seqs=seqs)
        assert packed.shape == (len(pieces), 3)
        assert (state is None) == (direction == "both")
        assert_close(packed, alone, OUTPUT[FP64], "logits")
        together = torch.autograd.grad((packed * weight).sum(), wanted)
        for a, b in zip(together, separate):
            assert_close(a, b, GRADIENT[FP64], "gradient")
    assert (alone[0] - alone[1]).abs().max() > 1e-6


@pytest.mark.parametrize("kind", ["ids", "waveform", "strided"])
def test_an_empty_sequence_is_pooled_to_zeros_and_changes_no_other(kind: str) -> None:
    model = small(kind)
    pieces = sequences(kind)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    packed, _ = model(torch.cat(pieces, 1), seqs=cu)
    alone = torch.cat([model(x)[0] for x in pieces])
    assert_close(packed, alone, OUTPUT[FP64])
    assert torch.equal(packed[3], model.head.proj.bias)


@pytest.mark.parametrize("chunk", [1, 7, 160, 4096])
@pytest.mark.parametrize(
    ("kind", "pooling"), [("ids", "last"), ("waveform", "mean"), ("strided", "mean"), ("strided", "max")]
)
def test_chunks_give_the_logits_of_the_whole(kind: str, pooling: str, chunk: int) -> None:
    model = small(kind, pooling=pooling)
    x = inputs(kind, 2, 203)
    with torch.no_grad():
        whole, _ = model(x)
        half, _ = model(x[:, :160])
        state = None
        for at in range(0, 203, chunk):
            before = None if state is None else [t.clone() for t in state.tensors()]
            given = state
            logits, state = model(x[:, at : at + chunk], state)
            if at + chunk == 160:
                assert_close(logits, half, OUTPUT[FP64], "so far")
            if given is not None and before is not None:
                assert all(torch.equal(a, b) for a, b in zip(given.tensors(), before))
        assert_close(logits, whole, OUTPUT[FP64])
        assert_close(model(x, model.init_state(2))[0], whole, OUTPUT[FP64], "from the zero state")


@pytest.mark.parametrize("pooling", ["mean", "last", "max"])
def test_packed_chunks_carry_a_row_a_sequence(pooling: str) -> None:
    """Rows that stand at different places in their stride, some without a sample or a step in a chunk."""
    model = small("strided", pooling=pooling)
    whole = [inputs("strided", 1, n) for n in (11, 30, 6)]
    cuts = [(0, 3, 3, 11), (0, 0, 17, 30), (0, 5, 6, 6)]
    state = None
    for k in range(3):
        pieces = [x[:, c[k] : c[k + 1]] for x, c in zip(whole, cuts)]
        cu = torch.tensor([0] + [p.shape[1] for p in pieces]).cumsum(0)
        logits, state = model(torch.cat(pieces, 1), state, seqs=cu)
    assert_close(logits, torch.cat([model(x)[0] for x in whole]), OUTPUT[FP64])
    assert state is not None
    with pytest.raises(StateError, match="different places in their stride"):
        model(inputs("strided", 3, 5), state)
    rest = inputs("strided", 1, 5)
    want, _ = model(torch.cat([whole[1], rest], 1))
    assert_close(model(rest, state.select([1]))[0], want, OUTPUT[FP64], "a selected row")


def test_gradients_flow_through_the_chunks() -> None:
    model = small("strided")
    x = inputs("strided", 1, 41)
    want = torch.autograd.grad(model(x)[0].square().sum(), list(model.parameters()))
    _, state = model(x[:, :18])
    got = torch.autograd.grad(model(x[:, 18:], state)[0].square().sum(), list(model.parameters()))
    for a, b in zip(got, want):
        assert_close(a, b, GRADIENT[FP64])


@pytest.mark.parametrize(("kernel", "stride"), [(7, 4), (5, 5), (1, 1), (64, 16)])
def test_the_strided_front_end_is_a_plain_convolution(kernel: int, stride: int) -> None:
    """torch's conv1d with zeros before the first sample: vector i ends at sample i * stride."""
    layer = StridedWaveformInput(6, StridedWaveformConfig(kernel, stride, scale=3.0)).double()
    x = torch.randn(3, 33, dtype=FP64)
    got, seqs, _ = layer(x)
    weight = layer.conv.weight.unsqueeze(1)
    conv = F.conv1d(F.pad(3.0 * x.unsqueeze(1), (kernel - 1, 0)), weight, layer.conv.bias, stride=stride)
    want = F.linear(F.gelu(conv.transpose(1, 2)), layer.proj.weight, layer.proj.bias)
    assert seqs is None
    assert got.shape == (3, -(-33 // stride), 6)
    assert_close(got, want, OUTPUT[FP64])
    packed, steps, _ = layer(x.reshape(1, -1), seqs=Sequences.from_lengths([33] * 3))
    assert steps is not None
    assert steps.lengths == (got.shape[1],) * 3
    assert_close(packed.view_as(got), want, OUTPUT[FP64])


def test_a_causal_model_sees_no_future_and_a_bidirectional_one_does() -> None:
    x = inputs("strided", 1, 24)
    changed = x.clone()
    changed[0, 21] += 1
    for direction, same in (("causal", True), ("both", False)):
        model = small("strided", direction)
        hidden, other = (model.backbone(model.input(v)[0])[0] for v in (x, changed))
        # Sample 21 is read by vector 6 (samples 18 to 24) and later ones alone: there are 6, 0 to 5.
        assert hidden.shape[1] == 6
        assert torch.equal(hidden, other)
        changed_early = x.clone()
        changed_early[0, 20] += 1
        other = model.backbone(model.input(changed_early)[0])[0]
        assert torch.equal(hidden[:, :5], other[:, :5]) == same
        assert not torch.equal(hidden[:, 5], other[:, 5])


def test_pooling_by_hand() -> None:
    hidden = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [5.0, 9.0], [0.0, 1.0], [-1.0, 2.0]]])
    seqs = Sequences.from_lengths([2, 0, 3])
    by_hand: dict[Any, list[list[float]]] = {
        "mean": [[2.0, -3.0], [0.0, 0.0], [4 / 3, 4.0]],
        "last": [[3.0, -2.0], [0.0, 0.0], [-1.0, 2.0]],
        "max": [[3.0, -2.0], [0.0, 0.0], [5.0, 9.0]],
    }
    for pooling, want in by_hand.items():
        head = ClassificationHead(2, 2, pooling)
        with torch.no_grad():
            head.proj.weight.copy_(torch.eye(2))
            head.proj.bias.zero_()
        torch.testing.assert_close(head(hidden, seqs=seqs), torch.tensor(want))
        rest = head.pool(hidden[:, 2:], head.pool(hidden[:, :2]))
        torch.testing.assert_close(head.logits(rest), head(hidden))
        start = head.init_state(1)
        torch.testing.assert_close(head.logits(head.pool(hidden[:, :2], start)), torch.tensor(want[:1]))


def test_half_precision_pools_in_fp32() -> None:
    head = ClassificationHead(1, 1).bfloat16()
    hidden = torch.full((1, 4000, 1), 1.0, dtype=torch.bfloat16)
    state = head.pool(hidden)
    assert state.total.dtype == torch.float32
    assert float(state.total) == 4000.0  # bf16 would have stopped at 256
    assert head.logits(state).dtype == torch.bfloat16


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = small("strided", "both").float()
    model.save_pretrained(tmp_path)
    again = ssm_modal.load_pretrained(tmp_path)
    x = torch.randn(2, 50)
    assert isinstance(again, SequenceClassifier)
    assert again.config == model.config
    assert torch.equal(again(x)[0], model(x)[0])
    backbone = ssm_modal.load_pretrained(tmp_path, part="backbone")
    assert torch.equal(backbone(again.input(x)[0])[0], model.backbone(model.input(x)[0])[0])


def test_the_registered_classifiers() -> None:
    sizes = {}
    for name in ("audio_classifier", "audio_classifier_causal", "audio_classifier_s4d"):
        with torch.device("meta"):
            model = ssm_modal.create_model(name)
        sizes[name] = sum(p.numel() for p in model.parameters())
        assert ModelConfig.from_dict(model.config.to_dict()) == model.config
    assert max(sizes.values()) <= 500_000
    assert abs(sizes["audio_classifier"] / sizes["audio_classifier_causal"] - 1) < 0.1
    config = model_config("audio_classifier", kernel=80, stride=20, head_dropout=0.1, dropout=0.2)
    assert isinstance(config, SequenceClassifierConfig)
    assert config.input == StridedWaveformConfig(80, 20, 8.0)
    assert (config.head_dropout, config.backbone.dropout) == (0.1, 0.2)
    ids = model_config("audio_classifier", input={"type": "ids", "vocab_size": 258})
    assert isinstance(ids, SequenceClassifierConfig)
    assert ids.input == IdsConfig(258)
    assert not ids.causal


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kernel": 3, "stride": 4}, "kernel is 3, expected at least stride, which is 4"),
        ({"stride": 0}, "stride is 0, expected more than 0"),
        ({"scale": -1.0}, "scale is -1.0, expected more than 0"),
        (
            {"pooling": "last"},
            "pooling is 'last' with a backbone that is not causal, expected 'mean' or 'max'",
        ),
        ({"pooling": "median"}, "pooling is 'median', expected one of 'mean', 'last', 'max'"),
        ({"head_dropout": 1.0}, "head_dropout is 1.0, expected 0 or more and below 1"),
        ({"n_classes": 0}, "n_classes is 0, expected more than 0"),
        ({"input": {"type": "wave"}}, "unknown type 'wave'; did you mean 'waveform'"),
        ({"input": {"type": "ids"}}, "the key 'vocab_size' is missing"),
    ],
)
def test_wrong_configs_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config("audio_classifier", **overrides)


@pytest.mark.parametrize(
    ("kind", "x", "error", "message"),
    [
        ("ids", torch.tensor([[7]]), ValueError, "the largest id is 7, expected 0 to 6"),
        ("ids", torch.tensor([[1.0]]), TypeError, "ids has dtype torch.float32, expected int64 or int32"),
        (
            "waveform",
            torch.tensor([[1]]),
            TypeError,
            "the waveform has dtype torch.int64, expected a floating",
        ),
        (
            "strided",
            torch.tensor([[1]]),
            TypeError,
            "the waveform has dtype torch.int64, expected a floating",
        ),
        ("strided", torch.zeros(3), ValueError, r"x has shape \(3,\), expected \(batch, length\)"),
        ("strided", [[0.0]], TypeError, "x must be a tensor, got list"),
    ],
)
def test_wrong_inputs_are_named(kind: str, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small(kind)(x)


def test_wrong_states_and_packings_are_named() -> None:
    causal, both = small("strided"), small("strided", "both")
    x = inputs("strided", 2, 9)
    with pytest.raises(ValueError, match="x has batch 2, expected 1 with seqs"):
        causal(x, seqs=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="cu_seqlens ends at 8, expected 9"):
        causal(x[:1], seqs=torch.tensor([0, 8]))
    with pytest.raises(StateError, match="state has 3 rows, expected 2"):
        causal(x, causal.init_state(3))
    with pytest.raises(StateError, match="needs the whole sequence and has none"):
        both(x, causal.init_state(2))
    with pytest.raises(StateError, match="whole sequence"):
        both.init_state(2)
    with pytest.raises(StateError, match="state is a MambaState, expected ClassifierState"):
        causal(x, causal.init_state(2).backbone[0])
    with pytest.raises(StateError, match="the state is of another kind of input than StridedWaveformConfig"):
        causal(x, small("waveform").init_state(2))


def test_a_config_is_causal_by_its_layers() -> None:
    base = model_config("audio_classifier_causal")
    assert isinstance(base, SequenceClassifierConfig)
    assert base.causal
    for overrides in ({"bidirectional": {}}, {"mixer": {"type": "attention", "causal": False}}):
        config = base.with_overrides(overrides)
        assert not config.causal
    assert base.with_overrides({"mixer": [MambaConfig(), {"type": "attention"}]}).causal
    assert WaveformConfig().scale == 1.0


def test_vectors_with_positions_packed_are_what_they_are_one_by_one() -> None:
    config = small("strided", "both").config.with_overrides({"input": VECTORS})
    torch.manual_seed(0)
    model = SequenceClassifier(config).double()
    x = torch.randn(1, sum(LENGTHS), 2, dtype=FP64)
    packed, _ = model(x, seqs=Sequences.from_lengths(LENGTHS))
    pieces = x.split(LENGTHS, dim=1)
    alone = torch.cat([model(piece)[0] for piece in pieces if piece.shape[1]])
    assert_close(packed[[i for i, n in enumerate(LENGTHS) if n]], alone, OUTPUT[FP64])
    by_hand = model.input.proj(pieces[2]) + model.input.positions.weight[:9]
    assert_close(model.input(pieces[2])[0], by_hand, OUTPUT[FP64])
    assert_close(
        model.features(pieces[2]) @ model.head.proj.weight.T + model.head.proj.bias, alone[2:3], OUTPUT[FP64]
    )
    with pytest.raises(ValueError, match="VectorsInput: x has 14 steps, expected at most 13, the positions"):
        model(torch.zeros(1, 14, 2, dtype=FP64))
    with pytest.raises(ConfigError, match=r"input\.positions is set with a causal backbone"):
        small("strided").config.with_overrides({"input": VECTORS}).build()
