"""Vision Mamba: patches, positions and a class token around the bidirectional backbone; what timm asks of a
model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import DropPath, PatchEmbed, lecun_normal_, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ssm_modal.backbone import Backbone, Block
from ssm_modal.layers.wide import WideParameters
from ssm_modal.models.base import Model
from ssm_modal.models.vision.config import GlobalPool, VisionMambaConfig, check_multiple
from ssm_modal.models.vision.positions import class_slot, insert_token, resample_positions, take_token
from ssm_modal.models.vision.scan_order import BLOCK_ORDERS, Grid, reordering

Indices = int | Sequence[int] | None


class Layout(NamedTuple):
    """How the tokens of one call stand: the grid of patches, and the class token's slot, None without one."""

    grid: Grid
    slot: int | None


class VisionMamba(Model, WideParameters):
    """Images (batch, in_chans, height, width) of a floating dtype to logits (batch, n_classes).

    A plain module with the methods of timm's models, so that timm's training scripts, layer decay and feature
    extraction take it.
    """

    undecayed_parameters = ("cls_token", "pos_embed")
    config: VisionMambaConfig
    backbone: Backbone
    _traits: dict[str, Any]  # what timm notes down of a model that it created

    def __init__(self, config: VisionMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = self.num_features = self.head_hidden_size = config.backbone.d_model
        self.patch_embed = PatchEmbed(
            img_size=config.image,
            patch_size=config.patch,  # type: ignore[arg-type]
            in_chans=config.in_chans,
            embed_dim=self.embed_dim,
            strict_img_size=not config.dynamic_img_size,
        )
        token = config.class_token != "none"
        self.num_prefix_tokens = int(token)
        tokens = config.grid[0] * config.grid[1] + int(token)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim)) if token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, self.embed_dim))
        self.pos_drop = nn.Dropout(config.pos_drop_rate)
        self.backbone = Backbone(config.backbone)
        self._set_drop_path(config.drop_path_rate)
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = self._new_head(config.n_classes)
        self.feature_info = [
            {"module": f"backbone.layers.{i}", "num_chs": self.embed_dim, "reduction": max(config.patch)}
            for i in range(config.backbone.n_layers)
        ]
        self._init_weights()
        self.mark_parameters()

    def _set_drop_path(self, rate: float) -> None:
        """Stochastic depth in the place of the blocks' dropout, from 0 in the first to `rate` in the last."""
        if rate == 0:
            return
        last = max(1, len(self.backbone.layers) - 1)
        for i, block in enumerate(self._blocks()):
            path = DropPath(rate * i / last)
            block.dropout = path if block.dropout is None else nn.Sequential(block.dropout, path)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """As published; the backbone has initialised itself."""
        lecun_normal_(self.patch_embed.proj.weight)
        assert self.patch_embed.proj.bias is not None
        self.patch_embed.proj.bias.zero_()
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def _new_head(self, n_classes: int) -> nn.Module:
        if n_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.embed_dim, n_classes)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def _blocks(self) -> Iterable[Block]:
        for block in self.backbone.layers:
            assert isinstance(block, Block)
            yield block

    @property
    def num_classes(self) -> int:
        return self.config.n_classes

    @property
    def in_chans(self) -> int:
        return self.config.in_chans

    @property
    def grad_checkpointing(self) -> bool:
        return self.backbone.gradient_checkpointing

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, in_chans, height, width) to logits (batch, n_classes).

        Raises TypeError or ValueError for an input of another kind, channel count or size.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The normed tokens (batch, tokens, embed_dim) in the order of the scan, the class token at its
        slot: 0 at the head, N // 2 of N patches in the middle."""
        tokens, layout = self._embed(x)
        return self._run(tokens, layout, ())[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gave, pooled, to logits; with `pre_logits` without the last Linear."""
        x = self.head_drop(self._pool(x))
        return x if pre_logits else self.head(x)

    def _pool(self, x: Tensor) -> Tensor:
        pool = self.config.pool
        if pool == "":
            return x
        slot = class_slot(self.config.class_token, x.shape[1] - self.num_prefix_tokens)
        if pool == "token":
            assert slot is not None
            return x[:, slot]
        return (x if slot is None else take_token(x, slot)[0]).mean(1)

    def _embed(self, x: Tensor) -> tuple[Tensor, Layout]:
        """Patches with positions and the class token, in the order of the first block."""
        self._check(x)
        patch = self.config.patch
        grid = (x.shape[2] // patch[0], x.shape[3] // patch[1])
        slot = class_slot(self.config.class_token, grid[0] * grid[1])
        tokens = self.patch_embed(x)
        if self.cls_token is not None:
            assert slot is not None
            tokens = insert_token(tokens, self.cls_token.expand(x.shape[0], -1, -1).to(tokens.dtype), slot)
        positions = resample_positions(self.pos_embed, self.config.grid, grid, self.config.class_token)
        return self.pos_drop(tokens + positions), Layout(grid, slot)

    def _check(self, x: Tensor) -> None:
        config = self.config
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"VisionMamba: x is {kind}, expected a tensor of a floating dtype")
        if x.ndim != 4:
            raise ValueError(
                f"VisionMamba: x has shape {tuple(x.shape)}, expected (batch, in_chans, height, width)"
            )
        if x.shape[1] != config.in_chans:
            raise ValueError(
                f"VisionMamba: x has {x.shape[1]} channels, expected {config.in_chans}: the model was built "
                f"with in_chans={config.in_chans}"
            )
        size = (x.shape[2], x.shape[3])
        if config.dynamic_img_size:
            check_multiple("VisionMamba: x", size, config.patch)
        elif size != config.image:
            raise ValueError(
                f"VisionMamba: x is {size[0]} x {size[1]} pixels, expected img_size "
                f"{config.image[0]} x {config.image[1]}; call set_input_size, or build the model with "
                "img_size= or dynamic_img_size=True"
            )

    def _run(
        self, tokens: Tensor, layout: Layout, take: Iterable[int], norm: bool = False, last: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Every block up to `last`: the normed tokens, and the streams behind the blocks `take`, by rows."""
        backbone, turns = self.backbone, BLOCK_ORDERS[self.config.scan_order]
        if not torch.is_autocast_enabled(tokens.device.type):
            tokens = tokens.to(backbone.norm.weight.dtype)
        branch, residual, here = tokens, None, "row"
        taken: dict[int, Tensor] = {}
        for i in range(len(backbone.layers) if last is None else last + 1):
            moved = reordering(here, turns[i % len(turns)], layout.grid, layout.slot, tokens.device)
            if moved is not None:
                branch = branch[:, moved]
                residual = None if residual is None else residual[:, moved]
                here = turns[i % len(turns)]
            branch, residual, _ = backbone.run_block(i, branch, residual)
            if i in take:
                stream = backbone.finish(branch, residual) if norm else branch + residual
                back = reordering(here, "row", layout.grid, layout.slot, tokens.device)
                taken[i] = stream if back is None else stream[:, back]
        assert residual is not None
        return backbone.finish(branch, residual), taken

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What stands behind blocks, with patches at their places in the image and without the class token.

        Args:
            x: (batch, in_chans, height, width).
            indices: blocks, counted from 0, or from the end where negative; an int n: the last n; None: all.
            return_prefix_tokens: each entry is then (patches, class token (batch, 1, embed_dim)).
            norm: norm what is taken by the final norm.
            stop_early: run no block behind the last one taken.
            output_fmt: "NCHW": (batch, embed_dim, rows, columns); "NLC": (batch, patches,
                embed_dim), by rows.
            intermediates_only: return the list alone, else (what `forward_features` gives, list).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected NCHW or NLC")
        own = indices if indices is None or isinstance(indices, int) else list(indices)
        take, highest = feature_take_indices(len(self.backbone.layers), own)
        tokens, layout = self._embed(x)
        final, taken = self._run(tokens, layout, take, norm, highest if stop_early else None)
        found: list[Any] = []
        for i in take:
            patches, prefix = taken[i], None
            if layout.slot is not None:
                patches, prefix = take_token(patches, layout.slot)
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, layout.grid).contiguous()
            found.append((patches, prefix) if return_prefix_tokens and prefix is not None else patches)
        return found if intermediates_only else (final, found)

    def patch_map(self, values: Tensor, layer: int, images: Tensor) -> Tensor:
        """Numbers of the tokens of block `layer`, (batch, tokens) in the order it scans them, laid over the
        image: (batch, rows, columns), the class token left out.

        images: (batch, in_chans, height, width), what the model was given.
        """
        patch, turns = self.config.patch, BLOCK_ORDERS[self.config.scan_order]
        grid = (images.shape[2] // patch[0], images.shape[3] // patch[1])
        slot = class_slot(self.config.class_token, grid[0] * grid[1])
        back = reordering(turns[layer % len(turns)], "row", grid, slot, values.device)
        ordered = values if back is None else values[:, back]
        if slot is not None:
            ordered = torch.cat([ordered[:, :slot], ordered[:, slot + 1 :]], dim=1)
        return ordered.unflatten(1, grid)

    # ------------------------------------------------------------------ what timm asks of a model

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last of `indices`, the final norm's weight and the head; returns the
        indices, counted from 0."""
        own = indices if indices is None or isinstance(indices, int) else list(indices)
        take, highest = feature_take_indices(len(self.backbone.layers), own)
        kept = replace(self.config.backbone, n_layers=highest + 1)
        self.backbone.layers = self.backbone.layers[: highest + 1]
        self.backbone.config = kept
        self.config = replace(self.config, backbone=kept)
        if prune_norm:
            self.backbone.norm.weight.requires_grad_(False).fill_(1.0)
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """A new head of `num_classes` (0: none), and another pooling where `global_pool` is given."""
        pool = self.config.global_pool if global_pool is None else global_pool
        self.config = replace(self.config, n_classes=num_classes, global_pool=pool)
        weight = self.pos_embed
        self.head = self._new_head(num_classes).to(weight.device, weight.dtype).train(self.training)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Take images, or patches, of another size from now on: positions and the patch embedding's weights
        are resampled. Raises ConfigError for an image that is no multiple of the patch."""
        config = replace(
            self.config,
            img_size=self.config.img_size if img_size is None else img_size,
            patch_size=self.config.patch_size if patch_size is None else patch_size,
        )
        with torch.no_grad():
            table = resample_positions(self.pos_embed, self.config.grid, config.grid, config.class_token)
        self.patch_embed.set_input_size(config.image, config.patch)
        self.pos_embed = nn.Parameter(table.clone(), requires_grad=self.pos_embed.requires_grad)
        self.config = config
        for info in self.feature_info:
            info["reduction"] = max(config.patch)
        if hasattr(self, "_traits"):
            self._traits = {**self._traits, "img_size": config.image}
        self.mark_parameters()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training keep the blocks' inputs alone and compute the rest again."""
        self.backbone.gradient_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that take no weight decay: positions, class token, and A_log, D and dt_bias."""
        return {n for n, p in self.named_parameters() if getattr(p, "_no_weight_decay", False)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Stem, blocks in their order, and the final norm and head, for layer decay."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^backbone\.layers\.(\d+)", None), (r"^backbone\.norm", (99999,))],
        }
