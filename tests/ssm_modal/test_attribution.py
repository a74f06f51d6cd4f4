"""Attributions: layers' rows against explicit matrices, gradient x input by hand, one call for any model."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import ssm_modal
from ssm_modal.attribution import Attribution, attribute, hidden_attention_row, input_gradients, mixing_layers
from ssm_modal.kernels.conv import causal_conv1d_ref
from ssm_modal.kernels.scan import selective_scan_ref
from ssm_modal.layers import (
    S4D,
    Attention,
    AttentionConfig,
    Bidirectional,
    BidirectionalConfig,
    Mamba,
    MambaConfig,
    S4DConfig,
)
from ssm_modal.tokenizers import NucleotideTokenizer

FP64 = torch.float64
LENGTH, D_MODEL, BATCH = 7, 8, 2
MAMBA = MambaConfig(d_state=3, d_conv=3)


def sequences(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, D_MODEL, dtype=FP64, generator=torch.Generator().manual_seed(1))


def mamba_parts(layer: Mamba, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """u behind the convolution, the gate z, and what else the layer's scan takes, on the whole sequence."""
    u, z = layer.in_proj(x).chunk(2, -1)
    u = causal_conv1d_ref(
        u, layer.conv1d.weight.squeeze(1), layer.conv1d.bias, activation="silu", reverse=reverse
    )
    assert isinstance(u, Tensor)
    dt, B, C = layer.x_proj(u).split([layer.dt_rank, layer.d_state, layer.d_state], -1)
    if layer.config.bc_dt_norm_eps is not None:
        dt, B, C = (F.rms_norm(m, m.shape[-1:], eps=layer.config.bc_dt_norm_eps) for m in (dt, B, C))
    scan = {"delta": layer.dt_proj(dt), "A": -layer.A_log.exp(), "B": B, "C": C}
    return u, z, {**scan, "delta_bias": layer.dt_bias, "delta_softplus": True, "reverse": reverse}


@torch.no_grad()
def mamba_matrix(layer: Mamba, x: Tensor, reverse: bool) -> Tensor:
    """(batch, t, s, d_inner): column s is what the scan makes of a one at s in every channel."""
    u, _, scan = mamba_parts(layer, x, reverse)
    columns = []
    for s in range(x.shape[1]):
        one = torch.zeros_like(u)
        one[:, s] = 1.0
        columns.append(selective_scan_ref(one, **scan))
    return torch.stack(columns, 2)


@torch.no_grad()
def s4d_matrix(layer: S4D, x: Tensor, reverse: bool) -> Tensor:
    """The same of S4D by its own mix, its skip set to zero."""
    layer.D.zero_()
    ones = torch.eye(x.shape[1], dtype=x.dtype)[:, :, None].expand(-1, -1, layer.d_inner)
    return layer.mix(ones, reverse=reverse)[0].transpose(0, 1).expand(x.shape[0], -1, -1, -1)


@torch.no_grad()
def attention_matrix(layer: Attention, x: Tensor, reverse: bool) -> Tensor:
    """(batch, t, s, heads) by the layer's own mix, which gives its weights for values of one at one step."""
    q, k, v = layer.project_in(x)
    ones = torch.eye(x.shape[1], layer.head_dim, dtype=x.dtype)[None, :, None].expand_as(v)
    y = layer.mix((q, k, ones), reverse=reverse)[0]
    return y.unflatten(-1, (layer.n_heads, -1))[..., : x.shape[1]].transpose(-1, -2)


LAYERS: dict[str, Any] = {
    "mamba": (MAMBA, mamba_matrix),
    "mamba, normed": (MambaConfig(d_state=2, d_conv=1, bc_dt_norm_eps=1e-6), mamba_matrix),
    "s4d": (S4DConfig(d_state=3, dt_min=0.1, dt_max=1.0), s4d_matrix),
    "attention": (AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8), attention_matrix),
    "attention of all": (
        AttentionConfig(n_heads=2, head_dim=8, rope_theta=None, causal=False),
        attention_matrix,
    ),
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_rows_are_those_of_the_explicit_matrix_in_chunks_of_any_size(kind: str, reverse: bool) -> None:
    config, explicit = LAYERS[kind]
    torch.manual_seed(0)
    layer = config.build(D_MODEL).double()
    x = sequences()
    matrix = explicit(layer, x, reverse)
    for t in (0, 3, LENGTH - 1):
        for chunk in (1, 2, 5, 100):
            row = hidden_attention_row(layer, x, t, channels="each", reverse=reverse, chunk_size=chunk)
            torch.testing.assert_close(row.total, matrix[:, t], rtol=1e-8, atol=1e-10)
            assert (row.forwards is None) == reverse
            assert (row.backwards is None) != reverse
        for channels, expected in (("abs", matrix[:, t].abs().mean(-1)), ("mean", matrix[:, t].mean(-1))):
            found = hidden_attention_row(layer, x, t, channels=channels, reverse=reverse).total
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("reverse", [False, True])
def test_a_mamba_row_times_its_input_is_the_layers_output_without_skip(reverse: bool) -> None:
    torch.manual_seed(0)
    layer = MAMBA.build(D_MODEL).double()
    layer.D.zero_()
    x = sequences()
    u, z, _ = mamba_parts(layer, x, reverse)
    y, _ = layer.mix(layer.project_in(x), reverse=reverse)
    for t in (0, 2, LENGTH - 1):
        row = hidden_attention_row(layer, x, t, channels="each", reverse=reverse).total
        torch.testing.assert_close((row * u).sum(1) * F.silu(z[:, t]), y[:, t])


@pytest.mark.parametrize("combine", ["sum", "mean", "concat"])
@pytest.mark.parametrize("share", ["none", "projections", "all"])
def test_both_directions_give_a_row_each(share: Any, combine: Any) -> None:
    torch.manual_seed(0)
    layer = Bidirectional(D_MODEL, MAMBA, BidirectionalConfig(share=share, combine=combine)).double()
    x = sequences()
    second = layer.backwards if layer.backwards is not None else layer.forwards
    assert isinstance(second, Mamba)
    assert isinstance(layer.forwards, Mamba)
    if share == "projections":
        second.in_proj = layer.forwards.in_proj
    half = 0.5 if combine == "mean" else 1.0
    ahead, back = mamba_matrix(layer.forwards, x, False), mamba_matrix(second, x, True)
    if share == "projections":
        del second.in_proj
    row = hidden_attention_row(layer, x, 4, channels="each", chunk_size=3)
    assert row.forwards is not None
    assert row.backwards is not None
    torch.testing.assert_close(row.forwards, half * ahead[:, 4])
    torch.testing.assert_close(row.backwards, half * back[:, 4])
    # The step itself is in both.
    torch.testing.assert_close(row.total[:, 4], half * (ahead[:, 4, 4] + back[:, 4, 4]))


def test_fp32_rows_keep_to_the_matrix() -> None:
    """The promise of 1e-4, on the compiled kernels where they are there, of a length with several chunks."""
    torch.manual_seed(0)
    layer = MAMBA.build(D_MODEL)
    x = sequences(1, 40)
    right = mamba_matrix(layer.double(), x, False)[:, 39]
    found = hidden_attention_row(layer.float(), x.float(), 39, channels="each", chunk_size=16).total
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-6)


class _Linear(nn.Module):
    """Logits linear in the input: (batch, length[, d]) or images to (batch, 3)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.flatten(1))


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3), (2, 3, 4, 5)])
def test_gradient_x_input_of_a_linear_model_is_weight_times_input(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=FP64)
    model = _Linear(x[0].numel())
    found = attribute(model, x, 1)
    by_hand = (model.proj.weight[1].view(shape[1:]) * x).detach()
    if len(shape) > 2:
        by_hand = by_hand.sum(1 if len(shape) == 4 else -1)
    torch.testing.assert_close(found.relevance, by_hand)
    assert model.proj.bias is not None
    torch.testing.assert_close(
        found.relevance.flatten(1).sum(1), found.logits[:, 1] - model.proj.bias[1].detach()
    )
    assert found.target.tolist() == [1, 1]


class _Ids(nn.Module):
    """A mean of embeddings under a Linear, with a second embedding, of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(7, 4).double(), nn.Embedding(7, 4).double()
        self.proj = nn.Linear(4, 2, bias=False).double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.places(torch.arange(ids.shape[1]).expand_as(ids))
        return self.proj(x.mean(1))


class _NoEmbedding(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ids.double()


def test_gradient_x_input_of_ids_is_by_their_embeddings() -> None:
    torch.manual_seed(0)
    model, ids = _Ids(), torch.tensor([[3, 3, 0, 6], [1, 2, 0, 5]])
    found = attribute(model, ids, torch.tensor([0, 1]))
    by_hand = torch.stack(
        [model.embedding(row) @ model.proj.weight[c] / 4 for row, c in zip(ids, (0, 1))]
    ).detach()
    torch.testing.assert_close(found.relevance, by_hand)
    # The model is as it was: no hook, no gradient is left.
    assert not model.embedding._forward_hooks
    assert model.embedding.weight.grad is None
    with pytest.raises(ValueError, match=r"_NoEmbedding gave them to no nn\.Embedding"):
        input_gradients(_NoEmbedding(), ids, lambda out: out[:, 0])


def classifier(pooling: str = "mean", **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    name = "audio_classifier_causal" if pooling == "last" else "ids_classifier"
    small = {"d_model": D_MODEL, "n_layers": 3, "d_state": 4, "n_classes": 3, "pooling": pooling}
    return ssm_modal.create_model(name, **{**small, **overrides}).double()


IDS = torch.tensor([[1, 5, 2, 2, 4, 0, 3], [3, 3, 1, 0, 2, 6, 5]])


def test_a_classifiers_row_is_its_layers_row_at_the_step_that_weighed_most() -> None:
    model = classifier()
    found = attribute(model, IDS, method="hidden_attention")
    assert (found.layer, found.stride) == (2, 1)
    assert found.positions is not None
    # By hand: what each step of the last layer adds to the pooled, normed mean, by finite differences.
    layer = mixing_layers(model)[2]
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: kept.extend((args[0], output[0])))
    with torch.no_grad():
        logits = model(IDS)[0]
        x, y = kept[:2]
        handle.remove()
        step, gains = 1e-6, []
        for t in range(LENGTH):
            changed = y.clone()
            changed[:, t] *= 1 + step
            handle = layer.register_forward_hook(lambda m, a, o, y=changed: (y, o[1]))
            gains.append((model(IDS)[0] - logits).gather(1, found.target[:, None]) / step)
            handle.remove()
    assert found.positions.tolist() == torch.cat(gains, 1).argmax(1).tolist()
    torch.testing.assert_close(found.logits, logits)
    assert found.target.tolist() == logits.argmax(-1).tolist()
    for i, t in enumerate(found.positions.tolist()):
        row = hidden_attention_row(layer, x[i : i + 1], t)
        torch.testing.assert_close(found.relevance[i], row.total[0])
        assert found.forwards is not None
        assert row.forwards is not None
        torch.testing.assert_close(found.forwards[i], row.forwards[0])


def test_the_default_step_of_a_model_that_reads_its_last_is_the_last() -> None:
    model = classifier("last", input={"type": "strided_waveform", "kernel": 4, "stride": 2})
    waveform = torch.randn(2, 13, dtype=FP64)
    found = attribute(model, waveform, method="hidden_attention", layer=-1)
    assert found.positions is not None
    assert found.positions.tolist() == [6, 6]
    assert (tuple(found.relevance.shape), found.stride) == ((2, 7), 2)
    assert attribute(model, waveform).relevance.shape == waveform.shape
    assert found.backwards is None


def test_the_mean_over_layers_is_of_normed_rows() -> None:
    model = classifier()
    each = [attribute(model, IDS, method="hidden_attention", layer=i, position=2) for i in range(3)]
    mean = attribute(model, IDS, method="hidden_attention", layer="mean", position=2)
    expected = sum(one.relevance / one.relevance.sum(1, keepdim=True) for one in each)
    torch.testing.assert_close(mean.relevance, expected / 3)
    torch.testing.assert_close(mean.relevance.sum(1), torch.ones(2, dtype=FP64))
    assert mean.layer == "mean"


def test_a_language_model_is_explained_at_one_position() -> None:
    torch.manual_seed(0)
    model = ssm_modal.create_model("mamba_lm", vocab_size=7, d_model=D_MODEL, n_layers=2).double()
    found = attribute(model, IDS, position=3)
    assert (found.relevance[:, 4:] == 0).all()
    assert (found.relevance[:, :4] != 0).all()
    torch.testing.assert_close(found.logits, model(IDS)[0][:, 3].detach())
    row = attribute(model, IDS, method="hidden_attention", position=3)
    assert row.positions is not None
    assert row.positions.tolist() == [3, 3]
    assert (row.relevance[:, 4:] == 0).all()
    last = attribute(model, IDS, method="hidden_attention").positions
    assert last is not None
    assert last.tolist() == [LENGTH - 1] * 2


def test_dropout_is_off_and_comes_back() -> None:
    model = classifier(head_dropout=0.5).train()
    one, two = (attribute(model, IDS).relevance for _ in range(2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "saliency"}, "method is 'saliency', expected one of gradient_x_input, hidden_attention"),
        ({"layer": 1}, "layer is 1, but method 'gradient_x_input' has none"),
        ({"channels": "abs"}, "channels is 'abs', but method"),
        ({"position": 2}, "position is 2, but a classifier has one output for all steps"),
        ({"target": 3}, "target is 3, expected 0 to 2"),
        ({"target": torch.tensor([0])}, "target has shape \\(1,\\), expected \\(2,\\)"),
        ({"method": "hidden_attention", "layer": 3}, "layer is 3, expected 0 to 2"),
        ({"method": "hidden_attention", "position": 7}, "position is 7, expected 0 to 6"),
        ({"method": "hidden_attention", "channels": "each"}, "channels is 'each', expected one of abs, mean"),
        ({"method": "hidden_attention", "position": 1, "chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute(classifier(), IDS, **options)


def test_files(tmp_path: Path) -> None:
    found = Attribution(
        "hidden_attention",
        torch.tensor([[1.5, -2.0], [0.25, 0.0]]),
        torch.zeros(2, 3),
        torch.tensor([2, 0]),
        stride=4,
        layer=1,
        positions=torch.tensor([1, 1]),
        forwards=torch.tensor([[1.0, -2.0], [0.25, 0.0]]),
    )
    with safe_open(found.save(tmp_path / "sub" / "a.safetensors"), "pt") as file:
        assert file.metadata() == {"method": "hidden_attention", "layer": "1", "stride": "4"}
        assert set(file.keys()) == {"relevance", "logits", "target", "positions", "forwards"}
        torch.testing.assert_close(file.get_tensor("relevance"), found.relevance)
    rows = list(csv.reader(io.StringIO(found.table(0, ["a,b", "c"]))))
    assert rows == [
        ["position", "label", "relevance", "forwards"],
        ["0", "a,b", "1.5", "1"],
        ["4", "c", "-2", "-2"],
    ]
    image = Attribution(
        "gradient_x_input", torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 3), torch.tensor([2])
    )
    assert image.table() == "row,column,relevance\n0,0,1\n0,1,2\n"
    with pytest.raises(ValueError, match="labels has 1 entries, expected 2"):
        found.table(0, ["a"])


def layer_input(model: nn.Module, layer: int, inputs: Tensor) -> Tensor:
    kept: list[Tensor] = []
    handle = mixing_layers(model)[layer].register_forward_hook(lambda m, args, out: kept.append(args[0]))
    with torch.no_grad():
        model(inputs)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("order", ["row", "column", "snake", "cross"])
@pytest.mark.parametrize("token", ["middle", "none"])
def test_rows_of_vision_mamba_lie_where_their_patches_are(order: str, token: str) -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": [4, 6], "patch_size": 2, "d_model": 8, "n_layers": 2, "d_state": 4, "in_chans": 1}
    model = ssm_modal.create_model("vim_mini", class_token=token, scan_order=order, **options).double().eval()
    image = torch.rand(1, 1, 4, 6, dtype=FP64)
    assert attribute(model, image).relevance.shape == image[:, 0].shape
    for layer in (0, 1):
        found = attribute(model, image, method="hidden_attention", layer=layer)
        assert found.relevance.shape == (1, 2, 3)
        assert found.positions is not None
        position = int(found.positions[0])
        if token == "middle" and layer == 1:
            assert position == 3  # of 6 patches and the class token
        # The layer's own row, its tokens put back by hand.
        x = layer_input(model, layer, image)
        row = hidden_attention_row(mixing_layers(model)[layer], x, position).total[0].tolist()
        if token == "middle":
            del row[3]
        numbers = {
            "row": [0, 1, 2, 3, 4, 5],
            "column": [0, 3, 1, 4, 2, 5],
            "snake": [0, 1, 2, 5, 4, 3],
        }[("row", "column")[layer] if order == "cross" else order]
        for number, value in zip(numbers, row):
            assert float(found.relevance[0].flatten()[number]) == pytest.approx(value)


def strands_classifier() -> nn.Module:
    torch.manual_seed(0)
    model = ssm_modal.create_model("caduceus_ps_classifier", d_model=8, n_layers=2, d_state=4).double()
    # Larger embeddings than at the start, so that rows hang on the input.
    nn.init.normal_(model.token_embedding.weight)  # type: ignore[union-attr, arg-type]
    return model.eval()


@pytest.mark.parametrize("method", ["gradient_x_input", "hidden_attention"])
def test_both_strands_are_told_at_the_same_bases(method: Any) -> None:
    model = strands_classifier()
    tokenizer = NucleotideTokenizer()
    ids = torch.tensor([tokenizer.encode("ACCGTNATTGA"), tokenizer.encode("GGGATCCATAC")])
    found = attribute(model, ids, method=method)
    other = attribute(model, tokenizer.reverse_complement(ids), method=method)
    assert found.relevance.shape == ids.shape
    torch.testing.assert_close(other.logits, found.logits)
    torch.testing.assert_close(other.relevance, found.relevance.flip(1))
    if found.positions is not None and other.positions is not None:
        assert other.positions.tolist() == [10 - at for at in found.positions.tolist()]


def test_a_row_of_both_strands_is_the_sum_of_theirs() -> None:
    model = strands_classifier()
    tokenizer = NucleotideTokenizer()
    ids = torch.tensor([tokenizer.encode("ACCGTNATTGA")])
    found = attribute(model, ids, method="hidden_attention", position=3)
    x = layer_input(model, -1, ids)
    layer = mixing_layers(model)[-1]
    given, other = (hidden_attention_row(layer, x[i : i + 1], at).total for i, at in ((0, 3), (1, 10 - 3)))
    torch.testing.assert_close(found.relevance, given + other.flip(1))
