"""The mixture of experts against a plain loop over tokens, its load-balancing loss against transformers'."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ssm_modal
from ssm_modal.backbone import BackboneConfig
from ssm_modal.errors import ConfigError
from ssm_modal.heads import long_token_loss
from ssm_modal.layers import MLPConfig, MoE, MoEConfig, collect_routing, load_balancing_loss
from ssm_modal.layers import moe as module
from ssm_modal.layers.moe import Routing, grouped_linear, grouped_product_serves
from tests.ssm_modal.published import theirs
from tests.tolerances import GRADIENT, OUTPUT, assert_close


def token_by_token(layer: MoE, x: Tensor) -> Tensor:
    out = []
    gate_up, down = layer.experts.gate_up_proj, layer.experts.out_proj
    for token in x.reshape(-1, x.shape[-1]):
        p = torch.softmax(layer.router.weight @ token, 0)
        best = p.argsort(descending=True)[: layer.config.top_k].tolist()
        y = torch.zeros_like(token)
        for e in best:
            gate, up = (gate_up[e] @ token).chunk(2)
            y = y + p[e] * (down[e] @ (torch.nn.functional.silu(gate) * up))
        out.append(y)
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_equals_the_sum_over_chosen_experts(top_k: int, device: torch.device) -> None:
    layer = MoE(6, MoEConfig(5, top_k, d_hidden=7)).to(device, torch.float64)
    x = torch.randn(2, 9, 6, dtype=torch.float64, device=device, requires_grad=True)
    y, want = layer(x), token_by_token(layer, x)
    assert_close(y, want, OUTPUT[torch.float64])
    inputs = [x, *layer.parameters()]
    weight = torch.randn_like(y)
    for got, wanted in zip(
        torch.autograd.grad((y * weight).sum(), inputs), torch.autograd.grad((want * weight).sum(), inputs)
    ):
        assert_close(got, wanted, GRADIENT[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d_in", "d_out"), [(16, 24), (6, 5)])
def test_the_grouped_product_equals_one_product_a_group(
    d_in: int, d_out: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(11, d_in, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, d_out, d_in, device=device, dtype=dtype, requires_grad=True)
    ends = torch.tensor([3, 3, 10, 11], dtype=torch.int32, device=device)  # one group is empty
    assert grouped_product_serves(x, weight) == (d_in == 16)
    y = grouped_linear(x, weight, ends)
    want = torch.cat([x[:3] @ weight[0].T, x[3:10] @ weight[2].T, x[10:] @ weight[3].T])
    assert_close(y, want, OUTPUT[dtype])
    up = torch.randn_like(y)
    for got, wanted in zip(
        torch.autograd.grad(y, [x, weight], up), torch.autograd.grad(want, [x, weight], up)
    ):
        assert_close(got, wanted, GRADIENT[dtype])
    assert torch.autograd.grad((grouped_linear(x, weight, ends) * up).sum(), weight)[0][1].abs().max() == 0


def test_a_layer_gives_the_same_with_and_without_the_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = MoE(16, MoEConfig(4, 2, d_hidden=8)), torch.randn(3, 5, 16)
    grouped = layer(x)
    monkeypatch.setattr(module, "grouped_product_serves", lambda x, weight: False)
    assert_close(layer(x), grouped, OUTPUT[torch.float32])


def test_under_autocast_and_empty() -> None:
    layer, x = MoE(16, MoEConfig(4, 2, d_hidden=8)), torch.randn(3, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, layer(x), 2e-2)
    with collect_routing(layer) as routing:
        assert layer(x[:, :0]).shape == (3, 0, 16)
    assert (routing[0].tokens, routing[0].counts.sum()) == (0, 0)


def test_the_router_stays_fp32() -> None:
    layer = MoE(16, MoEConfig(4, 2)).to(torch.bfloat16)
    assert {n for n, p in layer.named_parameters() if p.dtype == torch.float32} == {"router.weight"}


def test_compiles_whole_in_bf16() -> None:
    layer, x = MoE(16, MoEConfig(4, 2, d_hidden=8)).to(torch.bfloat16), torch.randn(2, 5, 16).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(x), layer(x), OUTPUT[torch.bfloat16])


def test_an_expert_nobody_chooses_and_one_everybody_does() -> None:
    layer = MoE(4, MoEConfig(3, 1, d_hidden=4)).double()
    with torch.no_grad():
        layer.router.weight.zero_()[1] = 100.0
    x = torch.rand(2, 7, 4, dtype=torch.float64)
    with collect_routing(layer) as routing:
        assert_close(layer(x), token_by_token(layer, x), OUTPUT[torch.float64])
    assert routing[0].counts.tolist() == [0, 14, 0]
    assert load_balancing_loss(routing).item() == pytest.approx(3.0)  # the worst: n_experts
    alike = Routing(torch.full((3,), 14.0), torch.full((3,), 14 / 3), 14)
    assert load_balancing_loss([alike]).item() == pytest.approx(3.0)  # every token by all three: top_k


def test_the_load_balancing_loss_is_that_of_transformers(tmp_path: str) -> None:
    pytest.importorskip("transformers")
    there = theirs("jamba", {"num_hidden_layers": 4})
    there.save_pretrained(tmp_path)
    ours = ssm_modal.load_pretrained(tmp_path)
    ids = torch.randint(0, 37, (2, 19))
    with torch.no_grad():
        want = there(ids, output_router_logits=True).aux_loss
    with collect_routing(ours) as routing:
        ours(ids)
    assert len(routing) == 2
    assert load_balancing_loss(routing).item() == pytest.approx(want.item(), rel=1e-5)
    assert ours.config.backbone.aux_loss_coef == 0.001


def small() -> ssm_modal.CausalLM:
    model = ssm_modal.create_model(
        "jamba_lm", vocab_size=11, d_model=16, n_layers=5, n_heads=2, d_state=4, **{"mlp.d_hidden": 16}
    )
    assert isinstance(model, ssm_modal.CausalLM)
    return model.double()


@pytest.mark.parametrize("segment", [4, 7, 100])
def test_by_segments_loss_and_balance_are_those_of_the_whole(segment: int) -> None:
    model = small()
    ids, labels = torch.randint(0, 11, (2, 18)), torch.randint(0, 11, (2, 18))

    def gradients(segment: int | None) -> tuple[float, float, list[Tensor]]:
        with collect_routing(model) as routing:
            loss, count = long_token_loss(model, ids, labels, segment=segment)
        balance = load_balancing_loss(routing)
        grads = torch.autograd.grad(loss / count + 3 * balance, list(model.parameters()))
        return loss.item(), balance.item(), list(grads)

    loss, balance, want = gradients(None)
    got_loss, got_balance, got = gradients(segment)
    assert got_loss == pytest.approx(loss, rel=1e-9)
    assert got_balance == pytest.approx(balance, rel=1e-9)
    for a, b in zip(got, want):
        assert_close(a, b, GRADIENT[torch.float64])
    # The balance matters to the router's gradient, so that the comparison above sees it.
    with collect_routing(model):
        loss_alone, count = long_token_loss(model, ids, labels, segment=segment)
    (alone,) = torch.autograd.grad(loss_alone / count, [model.backbone.layers[1].mlp.router.weight])
    assert not torch.allclose(
        alone, got[[n for n, _ in model.named_parameters()].index("backbone.layers.1.mlp.router.weight")]
    )


def test_recomputed_blocks_give_the_same_gradients() -> None:
    model = small().train()
    ids = torch.randint(0, 11, (2, 9))

    def gradients() -> tuple[Tensor, ...]:
        with collect_routing(model) as routing:
            logits, _ = model(ids)
        return torch.autograd.grad(
            logits.square().sum() + load_balancing_loss(routing), list(model.parameters())
        )

    want = gradients()
    model.backbone.gradient_checkpointing = True
    for a, b in zip(gradients(), want):
        assert_close(a, b, GRADIENT[torch.float64])


def test_a_pattern_of_mlps_repeats_with_gaps() -> None:
    backbone = BackboneConfig(
        d_model=8, n_layers=5, mlp=(None, MoEConfig(2, 1, d_hidden=4), MLPConfig(d_hidden=4))
    )
    model = ssm_modal.Backbone(backbone)
    kinds = [type(block.mlp).__name__ for block in model.layers]
    assert kinds == ["NoneType", "MoE", "MLP", "NoneType", "MoE"]
    assert BackboneConfig.from_dict(backbone.to_dict()) == backbone
    y, _ = model(torch.randn(1, 3, 8))
    assert y.shape == (1, 3, 8)
    assert backbone.aux_loss_coef == 0.001
    assert BackboneConfig(d_model=8, n_layers=1).aux_loss_coef == 0
    # Eight writes into the stream: five mixers and three MLPs or mixtures.
    bound = 4**-0.5 / 8**0.5
    assert 0.9 * bound < model.layers[1].mlp.experts.out_proj.abs().max() <= bound


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoEConfig(4, 5), "top_k is 5, expected at most n_experts, which is 4"),
        (lambda: MoEConfig(0), "n_experts is 0, expected more than 0"),
        (lambda: MoEConfig(aux_loss_coef=-1.0), "aux_loss_coef is -1.0, expected 0 or more"),
        (lambda: BackboneConfig(8, 1, mlp=()), "mlp is an empty list"),
        (
            lambda: BackboneConfig(8, 2, mlp=(MoEConfig(4), MoEConfig(8))),
            "differ in n_experts, top_k or aux_loss_coef",
        ),
    ],
)
def test_wrong_configs_are_named(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_routings_of_different_layers_do_not_add_up() -> None:
    routings = [Routing(torch.ones(n), torch.ones(n), 1) for n in (2, 3)]
    with pytest.raises(ValueError, match=r"layers with \[2, 3\] experts, expected one number"):
        load_balancing_loss(routings)
    with pytest.raises(ValueError, match=r"routings is empty"):
        load_balancing_loss([])
