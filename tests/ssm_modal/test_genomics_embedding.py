"""Embeddings by segments, windows and strands against the whole sequence at once, and files written whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("Bio")

import ssm_modal
from ssm_modal.genomics import EmbeddingConfig, HiddenStates, Place, StreamConfig, embed, whole_record
from ssm_modal.genomics.streaming import windows
from ssm_modal.io.genome import Genome, open_genome
from ssm_modal.io.nucleotides import GenomeError
from ssm_modal.tokenizers import KmerTokenizer, NucleotideTokenizer

TOKENS = NucleotideTokenizer()


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    generator = torch.Generator().manual_seed(0)
    texts = [
        "".join("ACGT"[i] for i in torch.randint(4, (n,), generator=generator).tolist()) for n in (53, 20)
    ]
    (tmp_path / "g.fa").write_text(f">a/b\n{texts[0]}\n>c\n{texts[1]}N\n")
    return open_genome([tmp_path / "g.fa"], tmp_path / "cache")


@pytest.fixture(scope="module")
def causal() -> Any:
    torch.manual_seed(0)
    return ssm_modal.create_model("mamba_lm", vocab_size=9, d_model=8, n_layers=2, d_state=4).eval()


def vectors(model: Any, genome: Genome, record: int, strand: str = "+", layer: int | None = None) -> Tensor:
    """Of a whole record in one piece; with strand "-" back in the order of the plus strand."""
    ids = TOKENS.encode_letters(genome.read(record, strand=strand))[None]
    with torch.inference_mode():
        if layer is None:
            found = model.hidden(ids)[0][0]
        else:
            branch, residual = model.embedding(ids), None
            for block in model.backbone.layers[:layer]:
                branch, residual, _ = block(branch, residual)
            found = (branch if residual is None else branch + residual)[0]
    return found.flip(0) if strand == "-" else found


def made(
    target: Path, genome: Genome, model: Any, layer: int | None = None, **settings: Any
) -> dict[str, Tensor]:
    config = EmbeddingConfig(**{"stream": StreamConfig(segment=7), **settings})
    places = [whole_record(genome, i) for i in range(2)]
    embed(places, genome, TOKENS, HiddenStates(model, layer), config, target, {"of": "test"})
    assert sorted(p.name for p in target.parent.iterdir() if p.name.startswith(".")) == []
    return load_file(target)


@pytest.mark.parametrize("layer", [None, 0, 1, 2])
def test_positions_are_the_layer_of_the_whole_sequence(
    tmp_path: Path, genome: Genome, causal: Any, layer: int | None
) -> None:
    found = made(tmp_path / "out" / "e.safetensors", genome, causal, layer, by="position")
    for record, name in enumerate(("a/b", "c")):
        torch.testing.assert_close(found[name], vectors(causal, genome, record, layer=layer))


@pytest.mark.parametrize("pool", ["mean", "max", "last"])
def test_pools_over_windows_and_records(tmp_path: Path, genome: Genome, causal: Any, pool: str) -> None:
    def pooled(x: Tensor, other: bool = False) -> Tensor:
        return {"mean": x.mean(0), "max": x.amax(0), "last": x[0] if other else x[-1]}[pool]

    out = tmp_path / "out"
    own = vectors(causal, genome, 0)
    found = made(out / "w.safetensors", genome, causal, by="window", bin=10, pool=pool)
    torch.testing.assert_close(found["a/b"], torch.stack([pooled(x) for x in own.split(10)]))
    whole = made(out / "r.safetensors", genome, causal, pool=pool)["embeddings"]
    torch.testing.assert_close(whole, torch.stack([pooled(own), pooled(vectors(causal, genome, 1))]))
    if pool == "max":
        with pytest.raises(ValueError, match="with both strands, which are averaged"):
            EmbeddingConfig(pool="max", both_strands=True)
        return
    turned = vectors(causal, genome, 0, "-")
    both = made(out / "b.safetensors", genome, causal, by="window", bin=10, pool=pool, both_strands=True)
    wanted = [(pooled(x) + pooled(y, True)) / 2 for x, y in zip(own.split(10), turned.split(10))]
    torch.testing.assert_close(both["a/b"], torch.stack(wanted))


def test_both_strands_of_a_place_have_one_embedding(tmp_path: Path, genome: Genome, causal: Any) -> None:
    config = EmbeddingConfig(by="position", both_strands=True, stream=StreamConfig(segment=6))
    places = [Place("plus", 0, 3, 40, "+"), Place("minus", 0, 3, 40, "-")]
    embed(places, genome, TOKENS, HiddenStates(causal), config, tmp_path / "e.safetensors", {})
    found = load_file(tmp_path / "e.safetensors")
    torch.testing.assert_close(found["minus"], found["plus"].flip(0))


def test_windows_cover_everything_once() -> None:
    for tokens in (0, 1, 9, 10, 11, 23, 40):
        covered = [t for _, _, first, last in windows(tokens, 10, 4) for t in range(first, last)]
        assert covered == list(range(tokens))
        for begin, end, first, last in windows(tokens, 10, 4):
            assert end - begin == min(10, tokens)
            assert begin <= first <= last <= end
            # Two tokens of the four that are shared stand beside what counts.
            assert begin == 0 or first - begin >= 2
            assert end == tokens or end - last >= 2


def test_hdf5_and_half_precision(tmp_path: Path, genome: Genome, causal: Any) -> None:
    h5py = pytest.importorskip("h5py")
    own = vectors(causal, genome, 0)
    config = EmbeddingConfig(by="position", dtype="float16")
    places = [whole_record(genome, i) for i in range(2)]
    for name in ("e.h5", "e.safetensors"):
        embed(places, genome, TOKENS, HiddenStates(causal), config, tmp_path / name, {"layer": 3})
    with h5py.File(tmp_path / "e.h5") as file:
        assert file["a%2Fb"].dtype == "float16"
        torch.testing.assert_close(torch.from_numpy(file["a%2Fb"][:]), own.half())
        assert json.loads(file.attrs["settings"]) == {"layer": 3}
    with safe_open(tmp_path / "e.safetensors", "pt") as file:
        torch.testing.assert_close(file.get_tensor("a/b"), own.half())
        assert json.loads(file.metadata()["records"])[1] == {
            "name": "c", "contig": "c", "start": 0, "end": 21, "strand": "+", "tokens": 21, "rows": 21
        }  # fmt: skip
    with pytest.raises(ValueError, match=r"expected a name that ends in .safetensors, .h5 or .hdf5"):
        embed(places, genome, TOKENS, HiddenStates(causal), config, tmp_path / "e.npy", {})


class _Stops(HiddenStates):
    """Breaks in the middle of the second sequence."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.calls = 0

    def stream(self, read: Any, tokens: int, config: StreamConfig) -> Any:
        for first, found in super().stream(read, tokens, config):
            self.calls += 1
            if tokens == 21 and first > 0:
                raise KeyboardInterrupt
            yield first, found


def test_a_stopped_job_goes_on_behind_the_last_whole_sequence(
    tmp_path: Path, genome: Genome, causal: Any
) -> None:
    config = EmbeddingConfig(pool="mean", stream=StreamConfig(segment=7))
    places = [whole_record(genome, i) for i in range(2)]
    target = tmp_path / "out" / "e.safetensors"
    with pytest.raises(KeyboardInterrupt):
        embed(places, genome, TOKENS, _Stops(causal), config, target, {"a": 1})
    assert not target.exists()
    again = _Stops(causal)
    again.stream = lambda *a: _count(again, HiddenStates(causal).stream(*a))  # type: ignore[method-assign]
    assert embed(places, genome, TOKENS, again, config, target, {"a": 1}) == ()
    assert again.calls == 3  # 21 tokens in segments of 7: the first sequence was kept
    wanted = torch.stack([vectors(causal, genome, i).mean(0) for i in range(2)])
    torch.testing.assert_close(load_file(target)["embeddings"], wanted)
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def _count(counter: _Stops, pieces: Any) -> Any:
    for piece in pieces:
        counter.calls += 1
        yield piece


def test_places_that_cannot_be_embedded(tmp_path: Path, genome: Genome, causal: Any) -> None:
    kmers = KmerTokenizer(4)
    config = EmbeddingConfig(both_strands=True)
    for place, problem in (
        (Place("short", 0, 0, 3), "'short': 3 bases are less than a token's 4"),
        (Place("odd", 0, 0, 13), "'odd': 13 bases are no multiple of 4"),
    ):
        with pytest.raises(GenomeError, match=problem):
            embed([place], genome, kmers, HiddenStates(causal), config, tmp_path / "e.h5", {})
    twice = [Place("x", 0, 0, 9), Place("x", 0, 9, 18)]
    with pytest.raises(ValueError, match="the name 'x' several times"):
        embed(twice, genome, TOKENS, HiddenStates(causal), config, tmp_path / "e.safetensors", {})
    with pytest.raises(ValueError, match=r"layer is 3, expected 0 \(the embedding\) to 2"):
        HiddenStates(causal, 3)
    with pytest.raises(ValueError, match="mean_of_strands is True, but a CausalLM"):
        HiddenStates(causal, mean_of_strands=True)


@pytest.fixture(scope="module", params=["caduceus_ph", "caduceus_ps"])
def masked(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return ssm_modal.create_model(request.param, d_model=8, n_layers=2, d_state=4).eval()


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_models_of_the_whole_sequence_go_by_windows(
    tmp_path: Path, genome: Genome, masked: Any, layer: int | None
) -> None:
    hidden = HiddenStates(masked, layer)
    with torch.inference_mode():
        whole = hidden(TOKENS.encode_letters(genome.read(0))[None])[0][0]
        part = hidden(TOKENS.encode_letters(genome.read(0, 23, 53))[None])[0][0]
    assert whole.shape[1] == hidden.width() == (16 if hidden.equivariant else 8)
    config = EmbeddingConfig(by="position", stream=StreamConfig(window=30, overlap=10))
    places = [whole_record(genome, i) for i in range(2)]
    embed(places, genome, TOKENS, hidden, config, tmp_path / "e.safetensors", {})
    found = load_file(tmp_path / "e.safetensors")
    # Windows begin at 0, 20 and, moved back to the end, 23: the last counts from (23 + 50) // 2 on.
    torch.testing.assert_close(found["a/b"][36:], part[13:])
    wide = EmbeddingConfig(by="position", stream=StreamConfig(window=60, overlap=0))
    embed(places, genome, TOKENS, hidden, wide, tmp_path / "w.safetensors", {})
    torch.testing.assert_close(load_file(tmp_path / "w.safetensors")["a/b"], whole)


def test_the_mean_over_strands_is_invariant(tmp_path: Path, genome: Genome, masked: Any) -> None:
    config = EmbeddingConfig(both_strands=True)
    places = [Place("plus", 0, 3, 40, "+"), Place("minus", 0, 3, 40, "-")]
    embed(places, genome, TOKENS, HiddenStates(masked), config, tmp_path / "e.safetensors", {})
    plus, minus = load_file(tmp_path / "e.safetensors")["embeddings"]
    assert plus.shape == (8,)
    torch.testing.assert_close(plus, minus)
    embed(places, genome, TOKENS, HiddenStates(masked), EmbeddingConfig(), tmp_path / "s.safetensors", {})
    plus, minus = load_file(tmp_path / "s.safetensors")["embeddings"]
    if masked.strands is None:
        assert not torch.allclose(plus, minus, atol=1e-3)
    else:
        torch.testing.assert_close(minus, plus.roll(8))


def test_a_journal_without_its_matrices_is_not_gone_on_with(
    tmp_path: Path, genome: Genome, causal: Any
) -> None:
    """As a kill leaves it between the output's rename and the removal of the journal."""
    places = [whole_record(genome, i) for i in range(2)]
    target = tmp_path / "e.safetensors"
    (tmp_path / ".e.safetensors.progress").write_text('{"a": 1}\n["0", true]\n["1", true]\n')
    embed(places, genome, TOKENS, HiddenStates(causal), EmbeddingConfig(), target, {"a": 1})
    assert not (load_file(target)["embeddings"] == 0).all(1).any()
