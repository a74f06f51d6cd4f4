"""A mixture of experts in place of an MLP: each token goes through the few experts a router picks for it.

Sparsely-gated experts: Shazeer et al., arXiv 1701.06538; the load-balancing loss: Fedus et al. (Switch
Transformer), arXiv 2101.03961, equations 4-6; between Mamba layers: Lieber et al. (Jamba), arXiv 2403.19887.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_modal.errors import ConfigError
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.feed_forward import FeedForward, FeedForwardConfig
from ssm_modal.layers.mlp import swiglu_width
from ssm_modal.layers.wide import WideParameters


@dataclass(frozen=True)
class MoEConfig(FeedForwardConfig):
    """n_experts SwiGLU layers of hidden width d_hidden (None: as an MLP's), of which top_k serve a token.

    aux_loss_coef: how much of the load-balancing loss training adds to its loss.
    """

    type: ClassVar[str] = "moe"
    n_experts: int = 16
    top_k: int = 2
    d_hidden: int | None = None
    aux_loss_coef: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("MoEConfig", n_experts=self.n_experts, top_k=self.top_k, d_hidden=self.d_hidden)
        if self.top_k > self.n_experts:
            raise ConfigError(
                f"MoEConfig: top_k is {self.top_k}, expected at most n_experts, which is {self.n_experts}"
            )
        if not self.aux_loss_coef >= 0:
            raise ConfigError(f"MoEConfig: aux_loss_coef is {self.aux_loss_coef}, expected 0 or more")

    def hidden(self, d_model: int) -> int:
        """The hidden width of an expert for inputs of width `d_model`."""
        return self.d_hidden if self.d_hidden is not None else swiglu_width(d_model)

    def build(self, d_model: int) -> MoE:
        return MoE(d_model, self)


@dataclass(frozen=True)
class Routing:
    """What the router of one layer did with one call's tokens.

    counts: (n_experts,) fp32, how many tokens each expert served. probabilities: (n_experts,) fp32, the sum
    over the tokens of what the router's softmax gave it, with gradients. tokens: how many there were.
    """

    counts: Tensor
    probabilities: Tensor
    tokens: int


class Router(WideParameters):
    """(tokens, d_model) to the softmax over the experts, in fp32 (fp64 for fp64): (tokens, n_experts).

    The weight stays fp32 when a model is cast: which experts serve a token is a choice, and a rounded score
    makes another one. Not an `nn.Linear`, so that what replaces those (quantisation, adapters) leaves it.
    """

    wide_parameters = ("weight",)

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.uniform_(self.weight, -(d_model**-0.5), d_model**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide)).softmax(-1)


class Experts(nn.Module):
    """The experts' weights, stacked: gate_up_proj (n_experts, 2 d_hidden, d_model), the gate's rows first;
    out_proj (n_experts, d_model, d_hidden)."""

    def __init__(self, d_model: int, d_hidden: int, n_experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * d_hidden, d_model))
        self.out_proj = nn.Parameter(torch.empty(n_experts, d_model, d_hidden))
        # As nn.Linear starts each of them.
        nn.init.uniform_(self.gate_up_proj, -(d_model**-0.5), d_model**-0.5)
        nn.init.uniform_(self.out_proj, -(d_hidden**-0.5), d_hidden**-0.5)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x: (rows, d_model), sorted by expert; ends: (n_experts,) int32, where each expert's rows end."""
        gate, up = grouped_linear(x, self.gate_up_proj, ends).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, self.out_proj, ends)


class MoE(FeedForward):
    """(..., d_model) to the same: sum over the top_k experts of p_e(x) * expert_e(x).

    p is the router's softmax over all experts, not normalised again over the chosen ones (as in Jamba). No
    token is dropped: an expert serves as many as choose it. Parameters: router.weight, experts.gate_up_proj,
    experts.out_proj. `collect_routing` tells what the routers did.
    """

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(d_model, config.n_experts)
        self.experts = Experts(d_model, config.hidden(d_model), config.n_experts)
        self.collected: list[Routing] | None = None  # set by collect_routing

    def forward(self, x: Tensor) -> Tensor:
        tokens, k = x.reshape(-1, x.shape[-1]), self.config.top_k
        probabilities = self.router(tokens)
        weights, chosen = probabilities.topk(k, dim=-1)
        by_expert, order = chosen.flatten().sort(stable=True)
        every = torch.arange(self.config.n_experts, device=x.device)
        ends = torch.searchsorted(by_expert, every, right=True, out_int32=True)
        if self.collected is not None:
            counts = ends.diff(prepend=ends.new_zeros(1)).to(probabilities.dtype)
            self.collected.append(Routing(counts, probabilities.sum(0), tokens.shape[0]))
        if tokens.shape[0] == 0:
            return x
        out = self.experts(tokens[order // k], ends)
        # Back in the tokens' order: a sum of k terms each, the same at every call, unlike scattered adds.
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=x.device))
        out = out[back].unflatten(0, (-1, k))
        y = out[:, 0] * weights[:, 0:1]
        for i in range(1, k):
            y = y + out[:, i] * weights[:, i : i + 1]
        return y.to(out.dtype).view(x.shape)

    def residual_weights(self) -> Iterator[Tensor]:
        yield self.experts.out_proj


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x in groups, each times the transpose of its group's weight.

    x: (rows, d_in), the groups one after another; weight: (groups, d_out, d_in); ends: (groups,) int32, the
    row behind each group's last. Returns (rows, d_out). torch's grouped product where it serves (bf16, fp16
    and fp32, rows a multiple of 16 bytes, CPU and CUDA from capability 8.0), else one product a group, which
    reads `ends` on the host.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if grouped_product_serves(x, weight):
        return _grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    parts, start = [], 0
    for own, end in zip(weight.unbind(0), ends.tolist()):
        if end > start:
            parts.append(F.linear(x[start:end], own))
        start = end
    return torch.cat(parts)


def grouped_product_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these operands, forward and backward."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    if x.device.type == "cuda":
        if torch.cuda.get_device_capability(x.device) < (8, 0):
            return False
    elif x.device.type != "cpu":
        return False
    if any(size * x.element_size() % 16 for size in weight.shape[1:]):
        return False
    if torch.compiler.is_compiling():
        return x.dtype == torch.bfloat16  # the only dtype its fake kernel knows
    return x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0


# Public from torch 2.10 on.
_grouped_mm = getattr(F, "grouped_mm", torch._grouped_mm)


@contextmanager
def collect_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Inside, the list it gives grows by one `Routing` a call of each MoE layer of `model`.

    Of two contexts, one inside the other, the inner collects. The list stays empty for a model without MoE.
    """
    layers = moe_layers(model)
    outer = [layer.collected for layer in layers]
    found: list[Routing] = []
    for layer in layers:
        layer.collected = found
    try:
        yield found
    finally:
        for layer, before in zip(layers, outer):
            layer.collected = before


def routing_asked_for(model: Any) -> list[Routing] | None:
    """The list that `collect_routing` fills for `model` now; None outside of it and without MoE layers."""
    layers = moe_layers(model) if isinstance(model, nn.Module) else []
    return layers[0].collected if layers else None


def moe_layers(model: nn.Module) -> list[MoE]:
    """Every MoE layer of `model`, in order."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def total_routing(routings: Sequence[Routing]) -> Routing:
    """The sums over layers or calls with the same number of experts."""
    if not routings:
        raise ValueError("routings is empty, expected at least one Routing")
    sizes = {r.counts.shape[0] for r in routings}
    if len(sizes) > 1:
        raise ValueError(f"routings are of layers with {sorted(sizes)} experts, expected one number")
    return Routing(
        torch.stack([r.counts for r in routings]).sum(0),
        torch.stack([r.probabilities for r in routings]).sum(0),
        sum(r.tokens for r in routings),
    )


def load_balancing_loss(routings: Sequence[Routing]) -> Tensor:
    """n_experts * sum over experts of (share of tokens served) * (mean probability); () with gradients.

    Shares and means over all tokens of all layers together, as transformers has it for Jamba and Mixtral. A
    share counts each of a token's top_k experts, so that the loss is top_k where experts are used alike, and
    more where they are not.
    """
    total = total_routing(routings)
    tokens = max(1, total.tokens)
    share, mean = total.counts / tokens, total.probabilities / tokens
    return total.counts.shape[0] * (share * mean).sum()
