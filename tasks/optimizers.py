"""AdamW and its parameter groups: which parameters decay, and at which learning rate each is trained."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Attributes:
        lr: peak learning rate.
        betas: decay rates of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, in units of the learning rate, for the parameters that decay.
        decay_embeddings: whether embedding tables decay too.
        lr_multipliers: a pattern on parameter names (`*`, `?`, as in a shell) to a factor on the learning
            rate; the first pattern that fits a name counts.
        fused: torch's fused kernel; None takes it where all parameters are on CUDA.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)
    fused: bool | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr is {self.lr}, expected above 0")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(
                f"optimizer.betas is {self.betas}, expected two numbers from 0 up to, not including, 1"
            )
        if not self.eps > 0:
            raise ValueError(f"optimizer.eps is {self.eps}, expected above 0")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay is {self.weight_decay}, expected 0 or more")
        for pattern, factor in self.lr_multipliers.items():
            if factor < 0:
                raise ValueError(f"optimizer.lr_multipliers[{pattern!r}] is {factor}, expected 0 or more")


def no_decay_names(model: nn.Module, decay_embeddings: bool = True) -> set[str]:
    """Names of the parameters of `model` that take no weight decay.

    These are the ones marked `_no_weight_decay` by their layer (A_log, D, dt_bias), all of fewer than two
    dimensions (biases, norm weights) and, unless `decay_embeddings`, embedding tables.
    """
    embeddings = (
        set()
        if decay_embeddings
        else {
            id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
        }
    )
    return {
        name
        for name, p in model.named_parameters()
        if getattr(p, "_no_weight_decay", False) or p.ndim < 2 or id(p) in embeddings
    }


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in groups of one weight decay and one learning rate each.

    Each group holds `params`, `lr`, `weight_decay` and `names`. Raises ValueError for a pattern in
    `config.lr_multipliers` that fits no parameter.
    """
    still = no_decay_names(model, config.decay_embeddings)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    used: set[str] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = 1.0
        for pattern, value in config.lr_multipliers.items():
            if fnmatch.fnmatchcase(name, pattern):
                factor = value
                used.add(pattern)
                break
        decay = 0.0 if name in still else config.weight_decay
        group = groups.setdefault(
            (factor, decay), {"params": [], "names": [], "lr": config.lr * factor, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    unused = [p for p in config.lr_multipliers if p not in used]
    if unused:
        names = ", ".join(name for name, _ in itertools.islice(model.named_parameters(), 5))
        raise ValueError(
            f"optimizer.lr_multipliers has the pattern {unused[0]!r}, which decides for no parameter; names "
            f"look like {names}, ..."
        )
    if not groups:
        raise ValueError("the model has no trainable parameter")
    return list(groups.values())


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, allow_fused: bool = True
) -> torch.optim.AdamW:
    """AdamW over the parameter groups of `model`.

    `allow_fused=False` keeps torch's fused kernel off where `config.fused` is None (mixed precision with
    clipping needs gradients that the optimizer does not unscale itself).
    """
    groups = parameter_groups(model, config)
    on_cuda = all(p.is_cuda for group in groups for p in group["params"])
    fused = config.fused if config.fused is not None else (True if on_cuda and allow_fused else None)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
