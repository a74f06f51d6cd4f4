"""Weights in 8 and 4 bits by bitsandbytes: values, experts, loading tensor by tensor, generating, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ssm_modal
from ssm_modal.checkpoints import room, save_pretrained
from ssm_modal.errors import CheckpointError
from ssm_modal.generation import GenerationConfig, generate
from ssm_modal.layers.moe import Experts
from ssm_modal.layers.quantized import (
    PackedWeight,
    QuantizedExperts,
    QuantizedLinear,
    is_quantized,
    packed_bytes,
)
from tests.ssm_modal.published import theirs

pytest.importorskip("bitsandbytes")
# Rounding of a weight drawn from a normal distribution, root mean square relative to its own: of 255 even
# steps up to the largest of 256 numbers, and of NF4 (QLoRA, arXiv 2305.14314, appendix E).
ERROR = {"int8": 0.008, "int4": 0.11}
JAMBA = {"hidden_size": 64, "intermediate_size": 128, "mamba_d_state": 4}


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_packed_weight_is_near_the_dense_one(kind: Any, dtype: torch.dtype) -> None:
    dense = torch.randn(3, 40, 256)
    weight = PackedWeight(kind, (3, 40, 256), dtype, "cpu")
    weight.put(dense[0], (0,))
    weight.put(dense[1, :16], (1, slice(0, 16)))
    weight.put(dense[1, 16:], (1, slice(16, 40)))
    weight.put(dense[2], (2,))
    assert weight.dense().dtype == dtype
    assert 0.3 * ERROR[kind] < error(weight.dense(), dense) < ERROR[kind]
    assert torch.equal(weight.dense(1), weight.dense()[1])
    assert torch.equal(weight.dense(torch.tensor([2, 0, 2])), weight.dense()[[2, 0, 2]])
    bits = 8 * packed_bytes((3, 40, 256), kind) / dense.numel()
    assert bits == {"int8": 8 + 32 / 256, "int4": 4 + 32 / 64}[kind]
    # Block by block: another row, or another part of a row, is not rounded by a large number here.
    spike = dense.clone()
    spike[0, 0, 0] = 1000
    other = PackedWeight(kind, (3, 40, 256), dtype, "cpu")
    other.put(spike)
    assert torch.equal(other.dense()[:, 1:], weight.dense()[:, 1:])


def test_a_cast_of_the_model_keeps_the_scales_wide() -> None:
    weight = PackedWeight("int4", (8, 64), torch.float32, "cpu")
    weight.put(torch.randn(8, 64))
    before = weight.dense()
    weight = weight.to(torch.bfloat16)
    assert (weight.absmax.dtype, weight.packed.dtype, weight.dtype) == (
        torch.float32,
        torch.uint8,
        torch.bfloat16,
    )
    assert torch.equal(weight.dense(), before.bfloat16())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [3, 9])
def test_experts_by_rows_and_by_expert_are_those_of_the_dense_weights(
    kind: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 rows are fewer than the 4 experts, 9 more; expert 1 has none."""
    dense = Experts(64, 128, 4)
    packed = []
    for weight in (dense.gate_up_proj, dense.out_proj):
        own = PackedWeight(kind, tuple(weight.shape), torch.float32, "cpu")
        own.put(weight.detach())
        weight.data = own.dense()
        packed.append(own)
    ends = torch.tensor([1, 1, 2, rows], dtype=torch.int32)
    x = torch.randn(rows, 64)
    with torch.no_grad():
        want = dense(x, ends)
        if rows == 3:  # nothing is read on the host, so that a CUDA graph can hold it
            monkeypatch.setattr(torch.Tensor, "tolist", None)
        torch.testing.assert_close(QuantizedExperts(*packed)(x, ends), want)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Jamba of transformers, in shards, so that gate, up and experts come one by one."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("jamba")
    theirs("jamba", JAMBA).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_loading_packs_projections_and_experts_and_nothing_else(folder: Path, kind: Any) -> None:
    dense = ssm_modal.load_pretrained(folder)
    model: Any = ssm_modal.load_pretrained(folder, quantize=kind)
    assert is_quantized(model)
    names = {n for n, m in model.named_modules() if isinstance(m, (QuantizedLinear, QuantizedExperts))}
    ends = {n.rpartition(".")[2] for n in names}
    assert ends == {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "experts"}
    tensors = dict(dense.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            whole = tensors.pop(name)
            assert error(module.dense(), whole) < 1.2 * ERROR[kind], name
            model.get_submodule(name)
    rest = {n: t for n, t in model.state_dict().items() if not n.endswith((".packed", ".absmax"))}
    assert rest.keys() == tensors.keys()
    assert all(torch.equal(rest[name], tensors[name]) for name in rest)
    # The same path generates, and says nearly the same.
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        a, b = model(ids)[0], dense(ids)[0]
    assert error(a, b) < {"int8": 0.05, "int4": 0.6}[kind]
    result = generate(model, [[3, 1, 4], [1]], GenerationConfig(max_new_tokens=4, temperature=0))
    again: list[int] = [3, 1, 4]
    for _ in range(4):
        with torch.no_grad():
            again.append(int(model(torch.tensor([again]))[0][0, -1].argmax()))
    assert result.tokens[0] == again[3:]
    assert model.init_state(2).batch_size == 2
    with pytest.raises(ValueError, match="weights are quantised"):
        model.save_pretrained(folder / "new")
    with pytest.raises(ValueError, match="weights are quantised"):
        save_pretrained(model, folder / "new", format="transformers")
    assert not (folder / "new").exists()


def test_loading_holds_the_packed_model_and_one_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of tensors made while loading, that are alive at once."""
    held: list[int] = []
    put = PackedWeight.put

    def watched(self: PackedWeight, weight: torch.Tensor, region: Any = ()) -> None:
        held.append(weight.numel())
        put(self, weight, region)

    monkeypatch.setattr(PackedWeight, "put", watched)
    model = ssm_modal.load_pretrained(folder, quantize="int4")
    # Never a whole stack of experts: gate and up of one expert at most.
    assert max(held) == max(2 * 64 * 64 * 2, 128 * 64, 64 * 128)
    dense = ssm_modal.load_pretrained(folder)
    size = lambda m: sum(p.numel() * p.element_size() for p in m.parameters())  # noqa: E731
    assert size(model) < 0.25 * size(dense)


def test_widths_that_no_block_divides_stay_dense(tmp_path: Path) -> None:
    model = ssm_modal.create_model("mamba_lm", vocab_size=9, d_model=48, n_layers=1)
    model.save_pretrained(tmp_path)
    assert not is_quantized(ssm_modal.load_pretrained(tmp_path, quantize="int8"))


def test_wrong_words_and_too_little_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="quantize is 'int5', expected None, 'int8' or 'int4'"):
        ssm_modal.load_pretrained(folder, quantize="int5")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="float64, which cannot be quantised"):
        ssm_modal.load_pretrained(folder, quantize="int8", dtype=torch.float64)
    dense = ssm_modal.load_pretrained(folder)
    small = sum(
        p.numel() * p.element_size() for p in ssm_modal.load_pretrained(folder, quantize="int4").parameters()
    )
    whole = sum(p.numel() * p.element_size() for p in dense.parameters())
    monkeypatch.setattr(room, "free_memory", lambda device: small + 10)
    with pytest.raises(
        CheckpointError, match=r"with quantize='int8' .* does not fit.*quantize='int4' .* fits"
    ):
        ssm_modal.load_pretrained(folder)
    assert is_quantized(ssm_modal.load_pretrained(folder, quantize="int4"))
    monkeypatch.setattr(room, "free_memory", lambda device: small - 10)
    with pytest.raises(CheckpointError, match=rf"needs {room._gib(small)} for its weights"):
        ssm_modal.load_pretrained(folder, quantize="int4")
    monkeypatch.setattr(room, "free_memory", lambda device: whole)
    ssm_modal.load_pretrained(folder)


def test_without_the_library_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    with pytest.raises(ImportError, match=r"pip install 'ssm-modal\[quant\]'"):
        ssm_modal.load_pretrained(folder, quantize="int8")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_on_a_gpu_one_row_and_many_agree(folder: Path, kind: Any) -> None:
    model: Any = ssm_modal.load_pretrained(folder, quantize=kind, device="cuda", dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            x = torch.randn(5, module.in_features, device="cuda", dtype=torch.bfloat16)
            assert error(module(x[:1]), module(x)[:1]) < 1e-2
    config = GenerationConfig(max_new_tokens=40, temperature=0)
    assert len(generate(model, [[3, 1, 4]], config).tokens[0]) == 40
