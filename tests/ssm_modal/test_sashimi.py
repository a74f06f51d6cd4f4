"""The U-Net and WaveNet: the layers' laws at every pooling factor, chunks, uneven rows, configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ssm_modal
from ssm_modal.backbone import Sashimi, SashimiConfig, SashimiState, WaveNet, WaveNetConfig
from ssm_modal.backbone.base import BackboneBase
from ssm_modal.errors import ConfigError, StateError
from ssm_modal.heads import long_token_loss
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers import AttentionConfig, MambaConfig, MLPConfig, S4DConfig
from ssm_modal.layers.dilated import DilatedCausalConv
from ssm_modal.layers.pooling import DownPool, UpPool, queue_through
from tests.ssm_modal import layer_laws as laws
from tests.tolerances import OUTPUT, assert_close

S4D, MAMBA = S4DConfig(d_state=4, expand=1), MambaConfig(d_state=4)


def unet(pool: tuple[int, ...], dtype: torch.dtype = torch.float64, **fields: Any) -> Sashimi:
    settings: dict[str, Any] = {"n_layers": 1, "mixer": (S4D, MAMBA), "stage_expand": 1.5, **fields}
    return SashimiConfig(d_model=4, pool=pool, **settings).build().to(dtype)


def wavenet(dtype: torch.dtype = torch.float64, **fields: Any) -> WaveNet:
    return WaveNetConfig(d_model=4, **{"n_layers": 5, "dilation_cycle": 3, **fields}).build().to(dtype)


BUILD = {
    "pool 2": lambda: unet((2,)),
    "pool 2, 3": lambda: unet((2, 3), mlp=MLPConfig(d_hidden=6)),
    "down layers": lambda: unet((3, 2), down_layers=1, n_layers=(2, 1)),
    "selective alone": lambda: unet((2, 2), mixer=MAMBA),
    "wavenet": wavenet,
    "wavenet, kernel 3": lambda: wavenet(kernel=3, n_layers=3, d_skip=6),
}


@pytest.mark.parametrize("name", list(BUILD))
def test_laws(name: str) -> None:
    torch.manual_seed(0)
    laws.all_laws(BUILD[name](), torch.float64)


@pytest.mark.parametrize("pool", [(4, 4), (2, 8), (16,), (3, 5)])
def test_exactly_causal_at_every_factor_and_place(pool: tuple[int, ...]) -> None:
    """Bit for bit: whatever step changes, nothing before it does, and every later frame hears of it."""
    torch.manual_seed(1)
    model = unet(pool)
    x = torch.randn(1, 37, 4, dtype=torch.float64)
    with torch.no_grad():
        a = model(x)[0]
        for at in range(37):
            changed = x.clone()
            changed[:, at:] += 1
            b = model(changed)[0]
            assert torch.equal(a[:, :at], b[:, :at])
            assert not torch.equal(a[:, at], b[:, at])


def test_what_comes_from_below_is_as_early_as_it_can_be() -> None:
    """The step that makes a frame whole is the first that the frame's own stage reaches."""
    torch.manual_seed(2)
    model = unet((4,), n_layers=1, mixer=(MambaConfig(d_state=4, d_conv=1), MAMBA))
    x = torch.randn(1, 12, 4, dtype=torch.float64)

    def below(at: int) -> list[int]:
        """The steps whose sum from below changes with step `at`."""
        seen: list[Tensor] = []
        hook = model.stages[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            changed = x.clone()
            changed[:, at] += 1
            model(x), model(changed)
        hook.remove()
        difference = (seen[1] - changed - (seen[0] - x)).abs().amax((0, 2))
        return (difference > 1e-12).nonzero().flatten().tolist()

    assert below(4) == below(7) == [7, 8, 9, 10, 11]
    assert below(8) == [11]


@pytest.mark.parametrize("name", ["pool 2, 3", "pool 4, 4", "wavenet"])
@pytest.mark.parametrize("chunk", [1, 7, 160])
def test_chunks_of_any_size_equal_the_whole(name: str, chunk: int) -> None:
    torch.manual_seed(3)
    model: BackboneBase = unet((4, 4)) if name == "pool 4, 4" else BUILD[name]()
    length = 37 if chunk < 10 else 333
    x = torch.randn(2, length, 4, dtype=torch.float64)
    with torch.no_grad():
        whole, last = model(x)
        state, parts = None, []
        for start in range(0, length, chunk):
            y, state = model(x[:, start : start + chunk], state)
            parts.append(y)
    assert_close(torch.cat(parts, 1), whole, OUTPUT[torch.float64], "chunks")
    laws.assert_states_close(state, last, OUTPUT[torch.float64], "chunks")


def test_rows_at_different_places_in_their_frames_go_on_together() -> None:
    """After prompts of unequal length: chunks and steps of the batch equal each row's own."""
    torch.manual_seed(4)
    model = unet((2, 3))
    lengths = (5, 1, 6, 3)
    seqs = Sequences.from_lengths(lengths)
    first = torch.randn(1, seqs.total, 4, dtype=torch.float64)
    more = torch.randn(4, 9, 4, dtype=torch.float64)
    with torch.no_grad():
        _, state = model(first, seqs=seqs)
        chunk, after = model(more[:, :4], state)
        stepping = state.clone()
        steps = torch.cat([model.step_(more[:, t : t + 1], stepping) for t in range(9)], 1)
        for row, (a, n) in enumerate(zip(seqs.starts, lengths)):
            whole, own = model(torch.cat([first[:, a : a + n], more[row : row + 1]], 1))
            assert_close(steps[row], whole[0, n:], OUTPUT[torch.float64], f"row {row}")
            assert_close(chunk[row], whole[0, n : n + 4], OUTPUT[torch.float64], f"row {row}, chunk")
            laws.assert_states_close(stepping.select([row]), own, OUTPUT[torch.float64], f"row {row}")
    assert isinstance(after, SashimiState)
    assert after.seen.tolist() == [9, 5, 10, 7]


def test_pools_and_the_queue_by_hand() -> None:
    down, up = DownPool(1, 1, 2), UpPool(1, 1, 2)
    with torch.no_grad():
        down.proj.weight.copy_(torch.tensor([[1.0, 10.0]]))
        down.proj.bias.zero_()
        up.proj.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        up.proj.bias.zero_()
    assert down(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])).flatten().tolist() == [21.0, 43.0]
    assert up(torch.tensor([[[5.0], [7.0]]])).flatten().tolist() == [5.0, -5.0, 7.0, -7.0]
    held = torch.tensor([[[1.0], [0.0]], [[2.0], [3.0]]])
    x = torch.tensor([[[4.0], [5.0], [6.0]]])
    out, kept = queue_through(held, [1, 2], x, [3, 1], Sequences.from_lengths([3, 0]))
    assert out.flatten().tolist() == [1.0, 4.0, 5.0, 2.0]
    assert kept.squeeze(-1).tolist() == [[6.0, 0.0], [3.0, 0.0]]


def test_dilated_convolution_is_torchs() -> None:
    torch.manual_seed(5)
    conv = DilatedCausalConv(3, 5, kernel=3, dilation=4)
    x = torch.randn(2, 20, 3)
    weight = conv.proj.weight.view(5, 3, 3).transpose(1, 2)  # (out, in, tap)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (8, 0))
    want = torch.nn.functional.conv1d(padded, weight, conv.proj.bias, dilation=4).transpose(1, 2)
    y, past = conv(x, torch.zeros(2, 8, 3))
    torch.testing.assert_close(y, want)
    assert torch.equal(past, x[:, -8:])


def test_wavenet_sees_as_far_as_its_dilations() -> None:
    torch.manual_seed(6)
    model = wavenet(n_layers=6, dilation_cycle=3)  # 2 * (1 + 2 + 4) steps back
    x = torch.randn(1, 30, 4, dtype=torch.float64, requires_grad=True)
    model(x)[0][0, 29].sum().backward()
    assert x.grad is not None
    assert x.grad[0].abs().amax(-1).nonzero().flatten().tolist() == list(range(15, 30))


@pytest.mark.parametrize("name", ["sashimi_lm", "sashimi_lm_s4d", "wavenet_lm"])
def test_registered_models_are_of_one_size_and_saved_whole(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        sizes = {
            n: sum(p.numel() for p in ssm_modal.create_model(n).parameters()) for n in (name, "sashimi_lm")
        }
    assert 400_000 < sizes[name] < 450_000
    assert abs(sizes[name] / sizes["sashimi_lm"] - 1) < 0.03
    torch.manual_seed(7)
    model = ssm_modal.create_model(name, d_model=8, n_layers=2, vocab_size=20)
    model.save_pretrained(tmp_path)
    again = ssm_modal.load_pretrained(tmp_path)
    ids = torch.randint(20, (2, 30))
    assert torch.equal(again(ids)[0], model.eval()(ids)[0])
    backbone = ssm_modal.load_pretrained(tmp_path, part="backbone")
    assert type(backbone) is type(model.backbone)


def test_a_models_loss_by_segments_has_the_gradients_of_the_whole() -> None:
    """Packed recordings of unequal length cut anywhere, as waveforms of a million samples are trained."""
    torch.manual_seed(8)
    for name in ("sashimi_lm", "wavenet_lm"):
        model: Any = ssm_modal.create_model(name, vocab_size=11, d_model=8, n_layers=2).double()
        seqs = Sequences.from_lengths((13, 0, 30, 4))
        ids, labels = torch.randint(11, (2, 1, 47)).unbind()
        whole, count = long_token_loss(model, ids, labels, seqs=seqs)
        wanted = torch.autograd.grad(whole, list(model.parameters()))
        loss, _ = long_token_loss(model, ids, labels, segment=9, seqs=seqs)
        got = torch.autograd.grad(loss, list(model.parameters()))
        assert int(count) == 47
        torch.testing.assert_close(loss, whole)
        for g, w in zip(got, wanted):
            torch.testing.assert_close(g, w)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    for model in (unet((2, 2), n_layers=2), wavenet()):
        x = torch.randn(1, 11, 4, dtype=torch.float64)
        model(x)[0].square().sum().backward()
        wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        model.gradient_checkpointing = True
        assert model.gradient_checkpointing
        model(x)[0].square().sum().backward()
        for p, w in zip(model.parameters(), wanted):
            torch.testing.assert_close(p.grad, w)


def test_bad_configs_and_states_are_named() -> None:
    for fields, message in (
        ({"pool": ()}, "pool is empty"),
        ({"pool": (4, 1)}, r"pool\[1\] is 1, expected 2 or more"),
        ({"mixer": (S4D,) * 4}, "mixer has 4 entries, expected 1 to 3"),
        ({"n_layers": ()}, "n_layers has 0 entries, expected 1 to 3"),
        ({"down_layers": -1}, "down_layers is -1"),
        (
            {"mixer": AttentionConfig(n_heads=2, causal=False)},
            "stage 0: the mixer of layer 0 has causal=False",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            SashimiConfig(**{"d_model": 4, "n_layers": 1, **fields})
    with pytest.raises(ConfigError, match=r"dropout is 1\.0, expected 0 or more and below 1"):
        WaveNetConfig(d_model=4, dropout=1.0)
    small, large = unet((2,)), unet((2, 2))
    with pytest.raises(StateError, match="state has 2 stages and 1 pooling factors, expected 3 and 2"):
        large(torch.zeros(1, 3, 4), small.init_state(1))
    with pytest.raises(StateError, match="state has 5 layers, expected 4"):
        wavenet(n_layers=4)(torch.zeros(1, 3, 4), wavenet().init_state(1))


def test_the_counter_stays_on_the_host_and_states_are_cast_without_it() -> None:
    state = unet((2, 2)).init_state(3).to("meta", dtype=torch.bfloat16)
    assert state.seen.device.type == "cpu"
    assert state.seen.dtype == torch.int64
    assert {t.device.type for t in (*state.down, *state.up)} == {"meta"}
    assert {t.dtype for t in state.down} == {torch.bfloat16}
