"""Vision Mamba: against the published block in plain torch, positions, the published keys, and what timm asks
of a registered model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("timm")

import timm

import ssm_modal
from ssm_modal.errors import CheckpointError, ConfigError
from ssm_modal.kernels.scan import selective_scan_ref
from ssm_modal.models import VisionMambaConfig
from ssm_modal.models.vision.positions import resample_positions
from ssm_modal.models.vision.published import checkpoint_filter_fn, published_key
from ssm_modal.models.vision_mamba import VisionMamba

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "d_state": 4, "num_classes": 3}
NAMES = (
    "vim_base_patch16_224",
    "vim_mini_patch4_28",
    "vim_mini_patch4_32",
    "vim_small_patch16_224",
    "vim_tiny_patch16_224",
)


def make(name: str = "vim_mini_patch4_28", **options: Any) -> VisionMamba:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **options})


def image(model: VisionMamba, batch: int = 2, seed: int = 0) -> Tensor:
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    dtype = model.pos_embed.dtype
    return torch.randn(batch, config.in_chans, *config.image, generator=generator, dtype=dtype)


# ------------------------------------------------------------ the published model, in plain torch


def published_layout(
    depth: int, d: int, d_state: int, tokens: int, patch: int, classes: int
) -> dict[str, tuple]:
    """Names and shapes of a published checkpoint (hustvl/Vim: models_mamba.py, mamba_simple.py)."""
    inner, rank = 2 * d, -(-d // 16)
    shapes: dict[str, tuple] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, tokens, d),
        "patch_embed.proj.weight": (d, 3, patch, patch),
        "patch_embed.proj.bias": (d,),
        "norm_f.weight": (d,),
        "head.weight": (classes, d),
        "head.bias": (classes,),
    }
    for i in range(depth):
        shapes[f"layers.{i}.norm.weight"] = (d,)
        mixer = {"in_proj.weight": (2 * inner, d), "out_proj.weight": (d, inner)}
        for way in ("", "_b"):
            mixer |= {
                f"conv1d{way}.weight": (inner, 1, 4),
                f"conv1d{way}.bias": (inner,),
                f"x_proj{way}.weight": (rank + 2 * d_state, inner),
                f"dt_proj{way}.weight": (inner, rank),
                f"dt_proj{way}.bias": (inner,),
            }
        mixer |= {"A_log": (inner, d_state), "A_b_log": (inner, d_state), "D": (inner,), "D_b": (inner,)}
        shapes |= {f"layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    return shapes


def made_checkpoint(shapes: dict[str, tuple], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: 0.3 * torch.randn(shape, generator=generator, dtype=dtype)
        + (1.0 if name.endswith(("norm.weight", "norm_f.weight")) else 0.0)
        for name, shape in shapes.items()
    }


def direction(w: dict[str, Tensor], xz: Tensor, way: str, d_state: int) -> Tensor:
    """One direction of the published block, in its layout (batch, channels, length)."""
    x, z = xz.chunk(2, dim=1)
    x = F.conv1d(x, w[f"conv1d{way}.weight"], w[f"conv1d{way}.bias"], padding=3, groups=x.shape[1])
    x = F.silu(x[..., : xz.shape[-1]]).transpose(1, 2)
    dt, B, C = (x @ w[f"x_proj{way}.weight"].T).split(
        [w[f"dt_proj{way}.weight"].shape[1], d_state, d_state], dim=-1
    )
    delta = F.softplus(dt @ w[f"dt_proj{way}.weight"].T + w[f"dt_proj{way}.bias"])
    A = -torch.exp(w["A_b_log" if way else "A_log"])
    y = selective_scan_ref(x, delta, A, B, C, D=w["D_b" if way else "D"])
    return y.transpose(1, 2) * F.silu(z)


def published_forward(w: dict[str, Tensor], x: Tensor, depth: int, patch: int, d_state: int) -> Tensor:
    """models_mamba.VisionMamba.forward with flips, `if_divide_out` and the class token in the middle."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    middle = x.shape[1] // 2
    token = w["cls_token"].expand(len(x), -1, -1)
    x = torch.cat([x[:, :middle], token, x[:, middle:]], dim=1) + w["pos_embed"]
    stream = torch.zeros_like(x)
    for i in range(depth):
        stream = stream + x
        begin = f"layers.{i}.mixer."
        own = {name.removeprefix(begin): t for name, t in w.items() if name.startswith(begin)}
        normed = norm(stream, w[f"layers.{i}.norm.weight"])
        xz = (normed @ own["in_proj.weight"].T).transpose(1, 2)
        y = direction(own, xz, "", d_state) + direction(own, xz.flip(-1), "_b", d_state).flip(-1)
        x = (y / 2).transpose(1, 2) @ own["out_proj.weight"].T
    out = norm(stream + x, w["norm_f.weight"])
    return out[:, middle] @ w["head.weight"].T + w["head.bias"]


def test_a_published_checkpoint_gives_what_the_published_model_gives() -> None:
    shapes = published_layout(depth=3, d=16, d_state=4, tokens=17, patch=4, classes=3)
    weights = made_checkpoint(shapes)
    model = make("vim_mini_patch4_32", depth=3, img_size=16).double().eval()
    model.load_state_dict(checkpoint_filter_fn({"model": weights, "epoch": 3}, model), strict=True)
    x = image(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), published_forward(weights, x, 3, 4, 4), rtol=1e-9, atol=1e-9)


def test_the_key_map_takes_every_published_key_to_one_of_ours() -> None:
    shapes = published_layout(depth=24, d=192, d_state=16, tokens=197, patch=16, classes=1000)
    with torch.device("meta"):
        model = ssm_modal.create_model("vim_tiny")
    mapped = {published_key(name): shape for name, shape in shapes.items()}
    assert len(mapped) == len(shapes) == 24 * 17 + 7
    assert mapped == {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert published_key("layers.0.mixer.A_b_log") == "backbone.layers.0.mixer.backwards.A_log"
    assert published_key("layers.11.mixer.dt_proj.bias") == "backbone.layers.11.mixer.forwards.dt_bias"
    for stranger in (
        "layers.0.mixer.gamma",
        "layers.0.norm.bias",
        "rope.freqs_cos",
        "layers.0.mixer.in_proj_b.weight",
    ):
        assert published_key(stranger) is None
    weights = made_checkpoint(published_layout(1, 16, 4, 17, 4, 3), torch.float32)
    with pytest.raises(CheckpointError, match=r"1 keys are none of a published Vision Mamba's: rope.freqs"):
        checkpoint_filter_fn({**weights, "rope.freqs": torch.zeros(1)}, make())


def test_a_published_checkpoint_of_another_image_size_has_its_positions_resampled() -> None:
    weights = made_checkpoint(published_layout(2, 16, 4, 50, 4, 3), torch.float32)
    model = make("vim_mini_patch4_32", img_size=(16, 24))
    found = checkpoint_filter_fn(weights, model)
    model.load_state_dict(found, strict=True)
    expected = resample_positions(weights["pos_embed"], (7, 7), (4, 6), "middle")
    torch.testing.assert_close(found["pos_embed"], expected)
    # Our own checkpoints pass as they are.
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()
    with pytest.raises(CheckpointError, match="pos_embed holds 44 vectors, expected 25"):
        checkpoint_filter_fn({**weights, "pos_embed": torch.zeros(1, 44, 16)}, model)


# ------------------------------------------------------------ positions


def test_resampling_keeps_the_class_token_apart() -> None:
    from timm.layers import resample_abs_pos_embed

    patches = torch.randn(1, 12, 5)
    token = torch.full((1, 1, 5), 100.0)
    plain = resample_abs_pos_embed(patches, [6, 4], [3, 4], num_prefix_tokens=0)
    assert not torch.equal(plain[:, :12], patches)
    table = torch.cat([patches[:, :6], token, patches[:, 6:]], 1)
    out = resample_positions(table, (3, 4), (6, 4), "middle")
    torch.testing.assert_close(out, torch.cat([plain[:, :12], token, plain[:, 12:]], 1))
    out = resample_positions(torch.cat([token, patches], 1), (3, 4), (6, 4), "head")
    torch.testing.assert_close(out, torch.cat([token, plain], 1))
    torch.testing.assert_close(resample_positions(patches, (3, 4), (6, 4), "none"), plain)
    # As many patches in another shape are resampled too.
    assert not torch.equal(resample_positions(patches, (3, 4), (4, 3), "none"), patches)
    assert resample_positions(table, (3, 4), (3, 4), "middle") is table
    with pytest.raises(ValueError, match=r"holds 12 vectors, expected 13 for a grid of 3 x 4 patches"):
        resample_positions(patches, (3, 4), (6, 4), "middle")


def test_where_the_class_token_stands_is_what_the_head_sees() -> None:
    for class_token, slot in (("middle", 24), ("head", 0)):
        model = make(class_token=class_token).eval()
        tokens = torch.randn(2, 50, 16)
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, slot])
        model.reset_classifier(3, "avg")
        rest = torch.cat([tokens[:, :slot], tokens[:, slot + 1 :]], 1)
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), rest.mean(1))
    model = make(class_token="none").eval()
    assert model.cls_token is None
    assert model.config.pool == "avg"
    tokens = torch.randn(2, 49, 16)
    torch.testing.assert_close(model.forward_head(tokens), model.head(tokens.mean(1)))


# ------------------------------------------------------------ what timm asks of a model


def test_the_models_are_registered_with_the_published_sizes() -> None:
    assert tuple(timm.list_models("vim_*")) == NAMES
    sizes = {"vim_tiny_patch16_224": 6_956_938, "vim_small_patch16_224": 25_796_584}
    with torch.device("meta"):
        tiny = timm.create_model("vim_tiny_patch16_224", num_classes=10)
        small = timm.create_model("vim_small_patch16_224")
        base = timm.create_model("vim_base_patch16_224", in_chans=1, img_size=(64, 32))
    for name, model in (("vim_tiny_patch16_224", tiny), ("vim_small_patch16_224", small)):
        assert sum(p.numel() for p in model.parameters()) == sizes[name]
        assert len(model.backbone.layers) == 24
    assert (tiny.embed_dim, small.embed_dim, base.embed_dim) == (192, 384, 768)
    assert base.pos_embed.shape == (1, 9, 768)
    assert base.patch_embed.proj.weight.shape == (768, 1, 16, 16)
    assert tiny.default_cfg["input_size"] == (3, 224, 224)
    assert tiny.default_cfg["first_conv"] == "patch_embed.proj"
    assert tiny.default_cfg["classifier"] == "head"
    with pytest.raises(TypeError, match="if_divide_out"):
        timm.create_model("vim_tiny_patch16_224", if_divide_out=True)


@pytest.mark.parametrize("scan_order", ["row", "column", "snake", "cross"])
@pytest.mark.parametrize("class_token", ["head", "middle", "none"])
def test_forward_and_backward(scan_order: Any, class_token: Any) -> None:
    model = make(scan_order=scan_order, class_token=class_token, drop_path_rate=0.1, drop_rate=0.1).train()
    logits = model(image(model))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    model.eval()
    x = image(model)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
        torch.testing.assert_close(model(x[:1]), model(x)[:1])


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (40, 12)])
def test_other_and_non_square_sizes(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    built = make(img_size=size, in_chans=2)
    assert built(torch.randn(1, 2, *size)).shape == (1, 3)
    changed, dynamic = make().eval(), make(dynamic_img_size=True).eval()
    changed.set_input_size(size)
    assert changed.config.image == size
    x = torch.randn(1, 1, *size)
    with torch.no_grad():
        torch.testing.assert_close(changed(x), dynamic(x))
    assert changed.pos_embed._no_weight_decay
    changed.set_input_size(patch_size=(2, 4))
    assert changed(x).shape == (1, 3)
    assert changed.pos_embed.shape[1] == (size[0] // 2) * (size[1] // 4) + 1


@pytest.mark.parametrize("scan_order", ["row", "column", "snake", "cross"])
def test_features_stand_where_their_patch_does(scan_order: Any) -> None:
    """One block, whose stream is its patch's vector plus a small branch: the maps must be the patches."""
    model = make(depth=3, scan_order=scan_order, img_size=(12, 20)).double().eval()
    for block in model.backbone.layers:
        block.mixer.forwards.out_proj.weight.data.mul_(1e-9)
    x = image(model)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, indices=[0, -1])
        patches = model.patch_embed(x)
        table = torch.cat([model.pos_embed[:, :7], model.pos_embed[:, 8:]], 1)
        expected = (patches + table).transpose(1, 2).unflatten(2, (3, 5))
    assert len(maps) == 2
    for found in maps:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(final, model.forward_features(x))
    flat, token = model.forward_intermediates(
        x, 1, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )[0]
    torch.testing.assert_close(flat, expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        token, (model.cls_token + model.pos_embed[:, 7:8]).expand(2, -1, -1), rtol=0, atol=1e-6
    )


def test_cross_scans_rows_and_columns_in_turn() -> None:
    """The second block of "cross" scans columns: on the transposed image it does what "row" does."""
    rows, cross = make(depth=1, img_size=12).eval(), make(depth=1, img_size=12, scan_order="column").eval()
    cross.load_state_dict(rows.state_dict())
    x = image(rows)
    # Transpose the image, its patches and its positions: the same sequence.
    cross.patch_embed.proj.weight.data = rows.patch_embed.proj.weight.data.transpose(2, 3)
    table = rows.pos_embed.data
    body = torch.cat([table[:, :4], table[:, 5:]], 1).unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2)
    cross.pos_embed.data = torch.cat([body[:, :4], table[:, 4:5], body[:, 4:]], 1)
    with torch.no_grad():
        torch.testing.assert_close(cross(x.transpose(2, 3)), rows(x))
    two = make(depth=2, img_size=12, scan_order="cross").eval()
    with torch.no_grad():
        _, maps = two.forward_intermediates(x)
        first = make(depth=2, img_size=12, scan_order="row").eval()
        first.load_state_dict(two.state_dict())
        _, plain = first.forward_intermediates(x)
    torch.testing.assert_close(maps[0], plain[0])
    assert not torch.allclose(maps[1], plain[1], atol=1e-3)


def test_features_only() -> None:
    model = make(depth=4, features_only=True, out_indices=(1, -1))
    assert model.feature_info.channels() == [16, 16]
    assert model.feature_info.reduction() == [4, 4]
    assert [f.shape for f in model(torch.randn(2, 1, 28, 28))] == [(2, 16, 7, 7)] * 2
    short = make(depth=4, features_only=True, out_indices=(1,))
    assert len(short.model.backbone.layers) == 2
    assert short.feature_info.module_name() == ["backbone.layers.1"]
    whole = make(depth=4)
    x = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        early = whole.eval().forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(short.eval()(x)[0], early[0])


def test_reset_classifier() -> None:
    model = make().eval()
    x = image(model)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model(x).shape == (2, 16)
    model.reset_classifier(5, global_pool="avg")
    assert (model.num_classes, model.config.pool) == (5, "avg")
    assert model(x).shape == (2, 5)
    assert model.get_classifier() is model.head
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), model.forward_features(x))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain = make(depth=3, drop_path_rate=0.3, scan_order="cross").double().train()
    again = make(depth=3, drop_path_rate=0.3, scan_order="cross").double().train()
    again.set_grad_checkpointing()
    assert again.grad_checkpointing
    grads = []
    for model in (plain, again):
        torch.manual_seed(1)
        model(image(model)).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_drop_path_grows_with_depth() -> None:
    model = make(depth=5, drop_path_rate=0.2)
    rates = [block.dropout.drop_prob for block in model.backbone.layers]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_groups_for_weight_and_layer_decay() -> None:
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    model = make(depth=2)
    still = model.no_weight_decay()
    assert {"pos_embed", "cls_token", "backbone.layers.0.mixer.backwards.A_log"} <= still
    assert len(still) == 2 + 2 * 2 * 3
    decayed = {
        id(p)
        for g in param_groups_weight_decay(model, 0.1, no_weight_decay_list=still)
        if g["weight_decay"]
        for p in g["params"]
    }
    assert not decayed & {id(p) for n, p in model.named_parameters() if n in still}
    assert id(model.backbone.layers[0].mixer.forwards.in_proj.weight) in decayed
    scale = {
        id(p): g["lr_scale"]
        for g in param_groups_layer_decay(model, no_weight_decay_list=still, layer_decay=0.5)
        for p in g["params"]
    }
    assert len(scale) == len(list(model.parameters()))
    head, block = scale[id(model.head.weight)], scale[id(model.backbone.layers[1].norm.weight)]
    first, stem = scale[id(model.backbone.layers[0].norm.weight)], scale[id(model.pos_embed)]
    assert head > block > first > stem
    assert first == pytest.approx(2 * stem)


def test_saving_and_the_package_registry(tmp_path: Path) -> None:
    model = ssm_modal.create_model(
        "vim_mini", d_model=16, n_layers=2, d_state=4, scan_order="snake", drop_path_rate=0.1
    ).eval()
    assert isinstance(model, VisionMamba)
    model.set_input_size((12, 16))
    model.save_pretrained(tmp_path)
    back = ssm_modal.load_pretrained(tmp_path)
    assert isinstance(back, VisionMamba)
    x = image(model)
    with torch.no_grad():
        assert torch.equal(back(x), model(x))
    backbone = ssm_modal.load_pretrained(tmp_path, part="backbone")
    assert backbone.d_model == 16


# ------------------------------------------------------------ bad input


def test_errors_name_the_argument() -> None:
    with pytest.raises(
        ConfigError, match=r"img_size is 30 x 28 pixels, expected a multiple of the patch, 4 x 4"
    ):
        make(img_size=(30, 28))
    with pytest.raises(ConfigError, match='global_pool is "token" with class_token "none"'):
        make(class_token="none", global_pool="token")
    with pytest.raises(
        ConfigError, match="class_token is 'centre', expected one of 'head', 'middle', 'none'"
    ):
        make(class_token="centre")
    with pytest.raises(TypeError, match=r"vim_tiny_patch16_224\(\) got .* keyword argument 'dropout'"):
        timm.create_model("vim_tiny_patch16_224", dropout=0.1)
    model = make()
    with pytest.raises(
        ValueError, match=r"x has 3 channels, expected 1: the model was built with in_chans=1"
    ):
        model(torch.zeros(1, 3, 28, 28))
    with pytest.raises(
        ValueError, match=r"x is 32 x 28 pixels, expected img_size 28 x 28; call set_input_size"
    ):
        model(torch.zeros(1, 1, 32, 28))
    with pytest.raises(ValueError, match=r"x is 30 x 28 pixels, expected a multiple of the patch"):
        make(dynamic_img_size=True)(torch.zeros(1, 1, 30, 28))
    with pytest.raises(TypeError, match=r"x is torch.int64, expected a tensor of a floating dtype"):
        model(torch.zeros(1, 1, 28, 28, dtype=torch.int64))
    with pytest.raises(ConfigError, match="img_size is"):
        model.set_input_size(30)
    assert model.config.image == (28, 28)
    assert isinstance(model.config, VisionMambaConfig)


def test_timm_loads_a_published_file(tmp_path: Path) -> None:
    weights = made_checkpoint(published_layout(2, 16, 4, 50, 4, 7), torch.float32)
    torch.save({"model": weights, "epoch": 3}, tmp_path / "vim.pth")
    options = {**SMALL, "img_size": 20, "num_classes": 7}
    overlay = {"file": str(tmp_path / "vim.pth"), "num_classes": 7}
    model = timm.create_model(
        "vim_mini_patch4_32", pretrained=True, pretrained_cfg_overlay=overlay, **options
    )
    assert torch.equal(model.backbone.layers[1].mixer.backwards.A_log, weights["layers.1.mixer.A_b_log"])
    torch.testing.assert_close(
        model.pos_embed, resample_positions(weights["pos_embed"], (7, 7), (5, 5), "middle")
    )
    # Another number of classes and of channels: the head is new, the patches' weights are summed, by timm.
    other = timm.create_model(
        "vim_mini_patch4_32",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        **{**options, "num_classes": 3, "in_chans": 1},
    )
    assert other.head.weight.shape == (3, 16)
    torch.testing.assert_close(
        other.patch_embed.proj.weight, weights["patch_embed.proj.weight"].sum(1, keepdim=True)
    )
