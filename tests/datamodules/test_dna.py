"""The data module of genomes: splits, windows, labels, masks, strands and resume."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("Bio")

import lightning.pytorch as pl

from ssm_modal.datamodules.dna import DNADataModule
from ssm_modal.datamodules.dna_masking import mask_tokens
from ssm_modal.datamodules.dna_plan import Places, Stretch
from ssm_modal.io.nucleotides import GenomeError, text_of
from ssm_modal.tokenizers import DNATokenizer, KmerTokenizer, NucleotideTokenizer, load_tokenizer

KMER: dict[str, Any] = {"ssm_modal_tokenizer": "kmer", "k": 3, "overlapping": False}
OVERLAPPING: dict[str, Any] = {**KMER, "overlapping": True}


def draw(n: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("ACGT", k=n))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files: records of 100 and 30 bases; of 200 (with an N at 150 and an R at 20), 12 and 5."""
    data = tmp_path / "data"
    data.mkdir()
    long = list(draw(200, 3))
    long[150], long[20] = "N", "R"
    (data / "a.fa").write_text(f">small\n{draw(30, 1)}\n>chr1\n{draw(100, 2)}\n")
    (data / "b.fa").write_text(f">chr1\n{''.join(long)}\n>twelve\n{draw(12, 4)}\n>five\nACGTA\n")
    return data


def module(folder: Path, **options: Any) -> DNADataModule:
    settings: dict[str, Any] = {"length": 8, "batch_size": 4, "seed": 1}
    settings["cache_dir"] = str(folder.parent / "cache")
    return DNADataModule(**{"path": str(folder), **settings, **options})


def test_the_last_part_of_each_longest_record_validates_behind_a_gap(folder: Path) -> None:
    data = module(folder)
    assert data.val_gap == 9
    assert data.stretches("train") == [
        Stretch(0, 0, 30),
        Stretch(1, 0, 71),
        Stretch(2, 0, 151),
        Stretch(3, 0, 12),
        Stretch(4, 0, 5),
    ]
    assert data.stretches("validation") == [Stretch(1, 80, 100), Stretch(2, 160, 200)]
    assert data.stretches("test") == data.stretches("validation")
    assert data.short_records == ("five",)
    wide = module(folder, val_gap=85, eval_length=20)
    assert wide.stretches("train")[1] == Stretch(2, 0, 75)
    assert len(wide.stretches("train")) == 4
    assert module(folder, eval_length=20, objective="masked").val_gap == 20
    with pytest.raises(ValueError, match="val_gap is 8, expected at least 9"):
        module(folder, val_gap=8)


def test_files_are_left_out_or_kept_for_the_test(folder: Path) -> None:
    (folder / "c.fa").write_text(f">c\n{draw(50, 9)}\n")
    data = module(folder, left_out_files=["a.*"], test_files=["c.fa"])
    assert [s.record for s in data.stretches("train")] == [2, 3, 4]
    assert [s.record for s in data.stretches("validation")] == [2]
    assert data.stretches("test") == [Stretch(5, 0, 50)]
    with pytest.raises(
        ValueError, match=r"left_out_files holds 'aa.fa', which fits no file; did you mean 'a.fa'"
    ):
        module(folder, left_out_files=["aa.fa"]).stretches("train")
    with pytest.raises(ValueError, match=r"'c.fa' is both"):
        module(folder, left_out_files=["c*"], test_files=["c.fa"]).stretches("train")
    with pytest.raises(TypeError, match="test_files is the string"):
        module(folder, test_files="c.fa")


def test_places_are_those_with_room_for_a_window() -> None:
    places = Places([Stretch(0, 3, 8), Stretch(4, 0, 2), Stretch(7, 10, 14)], 4)
    assert [places.place(i) for i in range(places.count)] == [(0, 3), (0, 4), (7, 10)]
    with pytest.raises(ValueError, match="number is 3, expected 0 to 2"):
        places.place(3)


@pytest.mark.parametrize("spec", ["nucleotide", KMER, OVERLAPPING])
def test_training_windows_are_the_genome_and_reach_all_of_it(folder: Path, spec: Any) -> None:
    data = module(folder, tokenizer=spec, length=3)
    batches, tokenizer = data.batches("train"), data.tokenizer
    need = tokenizer.bases_for(4)
    seen = set()
    for index in range(600):
        batch = batches.make_training(index, 0, 1)
        assert batch["ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["ids"].shape == batch["labels"].shape == (4, 3)
        rows = zip(batch["ids"], batch["labels"], batch["records"].tolist(), batch["starts"].tolist())
        for ids, labels, record, start in rows:
            expected = tokenizer.encode_letters(data.genome.read(record, start, start + need))
            assert torch.equal(ids, expected[:-1])
            known = expected[1:] < tokenizer.n_concrete
            assert labels.tolist() == torch.where(known, expected[1:], -100).tolist()
            seen.add((record, start))
    assert seen == {
        (s.record, start) for s in data.stretches("train") for start in range(s.start, s.end - need + 1)
    }


@pytest.mark.parametrize("spec", ["nucleotide", KMER, OVERLAPPING])
@pytest.mark.parametrize("eval_length", [1, 7, 8, 100])
def test_validation_predicts_every_token_but_the_first_of_a_stretch_once(
    folder: Path, spec: Any, eval_length: int
) -> None:
    # The gap is the longest window, so the tail is short here: 20 and 40 bases.
    data = module(folder, tokenizer=spec, eval_length=eval_length, eval_batch_size=3, test_files=["b.fa"])
    tokenizer = data.tokenizer
    given: dict[int, list[int]] = {}
    wanted: dict[int, list[int]] = {}
    for batch in data.test_dataloader():
        assert batch["ids"].shape[1] == eval_length
        for ids, labels, record in zip(batch["ids"], batch["labels"], batch["records"].tolist()):
            real = ids != tokenizer.pad_id
            assert (labels[~real] == -100).all()
            given.setdefault(record, []).extend(ids[real].tolist())
            wanted.setdefault(record, []).extend(labels[real].tolist())
    for record in (2, 3, 4):
        whole = data.genome.read(record)
        tokens = tokenizer.encode_letters(
            whole[: tokenizer.bases_for(tokenizer.tokens_in(len(whole)))]
        ).tolist()
        # "five" is one whole 3-mer, behind which there is nothing to predict.
        assert given.get(record, []) == tokens[:-1]
        assert wanted.get(record, []) == [t if t < tokenizer.n_concrete else -100 for t in tokens[1:]]


def test_reverse_complement_in_training_alone(folder: Path) -> None:
    plain, both = module(folder), module(folder, reverse_complement=True)
    tokenizer = NucleotideTokenizer()
    minus = 0
    for index in range(100):
        one = plain.batches("train").make_training(index, 0, 1)
        two = both.batches("train").make_training(index, 0, 1)
        assert torch.equal(one["starts"], two["starts"])
        for row, (record, start) in enumerate(zip(one["records"].tolist(), one["starts"].tolist())):
            window = plain.genome.read(record, start, start + 9)
            strands = [tokenizer.encode_letters(window)]
            strands.append(tokenizer.reverse_complement(strands[0]))
            got = two["ids"][row].tolist()
            assert got in [s[:-1].tolist() for s in strands]
            minus += got == strands[1][:-1].tolist() and got != strands[0][:-1].tolist()
    assert 160 < minus < 240
    for a, b in zip(plain.val_dataloader(), both.val_dataloader()):
        assert torch.equal(a["ids"], b["ids"])


@pytest.mark.parametrize("spec", ["nucleotide", KMER])
def test_masking_is_15_percent_of_80_10_10(spec: Any) -> None:
    tokenizer: DNATokenizer = NucleotideTokenizer() if spec == "nucleotide" else KmerTokenizer(3)
    ids = torch.randint(0, tokenizer.n_concrete, (200_000,))
    ids[::10] = tokenizer.n_id
    given, labels = mask_tokens(ids, tokenizer, torch.Generator().manual_seed(0))
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(given[~chosen], ids[~chosen])
    assert not chosen[::10].any()
    assert abs(chosen.sum() / 180_000 - 0.15) < 0.004
    masked = given[chosen] == tokenizer.mask_id
    assert abs(masked.float().mean() - 0.8) < 0.01
    changed = ~masked & (given[chosen] != ids[chosen])
    # A drawn token is by chance the right one.
    assert abs(changed.float().mean() - 0.1 * (1 - 1 / tokenizer.n_concrete)) < 0.01
    assert (given[chosen][changed] < tokenizer.n_concrete).all()
    # Neighbours have their own fates.
    pairs = chosen[1:] & chosen[:-1]
    both = (given[1:] == tokenizer.mask_id) & (given[:-1] == tokenizer.mask_id) & pairs
    assert abs(both.sum() / pairs.sum() - 0.64) < 0.03
    with pytest.raises(ValueError, match=r"rate is 0\.0"):
        mask_tokens(ids, tokenizer, torch.Generator(), 0.0)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_neighbours_of_masked_kmers_do_not_spell_out_the_answer(k: int) -> None:
    tokenizer = KmerTokenizer(k, overlapping=True)
    n = 3000
    rates, runs = [], 0
    for seed in range(20):
        ids = tokenizer.encode(draw(n + k - 1, seed))
        generator = torch.Generator().manual_seed(seed)
        given, labels = mask_tokens(torch.tensor(ids), tokenizer, generator)
        chosen = (labels != -100).tolist()
        rates.append(sum(chosen) / n)
        visible = {at + j for at in range(n) if not chosen[at] for j in range(k)}
        for at in range(n):
            if chosen[at]:
                assert any(at + j not in visible for j in range(k))
        for is_run, group in itertools.groupby(enumerate(chosen), lambda pair: pair[1]):
            places = [at for at, _ in group]
            if not is_run:
                continue
            runs += 1
            if places[0] > 0 and places[-1] < n - 1:
                assert len(places) >= 2 * k - 1
            masks = [int(given[at]) == tokenizer.mask_id for at in places]
            assert all(masks) or not any(masks)
            kept = [int(given[at]) == ids[at] for at in places]
            assert all(kept) or sum(kept) < len(kept)
    assert runs > 100
    assert abs(sum(rates) / 20 - 0.15) < 0.02


def test_masked_batches(folder: Path) -> None:
    data = module(folder, objective="masked", length=20, mask_rate=0.4)
    batches = data.batches("train")
    chosen = 0
    for index in range(50):
        batch = batches.make_training(index, 0, 1)
        for ids, labels, record, start in zip(
            *(batch[key] for key in ("ids", "labels", "records", "starts"))
        ):
            window = data.tokenizer.encode_letters(data.genome.read(int(record), int(start), int(start) + 20))
            seen = labels != -100
            chosen += int(seen.sum())
            assert torch.equal(labels[seen], window[seen])
            assert torch.equal(ids[~seen], window[~seen])
            assert (window[seen] != data.tokenizer.n_id).all()
    assert abs(chosen / 4000 - 0.4) < 0.05
    # 20 and 40 bases in windows of 20; the masks of validation are always the same.
    first, second = (list(data.val_dataloader()) for _ in range(2))
    assert [b["starts"].tolist() for b in first] == [[80, 160, 180]]
    assert all(torch.equal(a["ids"], b["ids"]) for a, b in zip(first, second))


def test_seed_processes_workers_and_resume(folder: Path) -> None:
    options: dict[str, Any] = {"reverse_complement": True, "objective": "masked", "tokenizer": OVERLAPPING}
    data = module(folder, **options)
    two = data.batches("train")
    one = module(folder, **options, batch_size=8).batches("train")
    for index in (0, 1, 10**12):
        halves = [two.make_training(index, rank, 2) for rank in range(2)]
        for key, whole in one.make_training(index, 0, 1).items():
            assert torch.equal(torch.cat([half[key] for half in halves]), whole)
    other = module(folder, **options, seed=2).batches("train").make_training(0, 0, 1)
    assert not torch.equal(other["starts"], two.make_training(0, 0, 1)["starts"])
    progress = SimpleNamespace(total=SimpleNamespace(processed=5))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(fit_loop=loop, global_rank=1, world_size=2)  # type: ignore[assignment]
    expected = [two.make_training(index, 1, 2) for index in (5, 6, 7)]
    for workers in (0, 2):
        data.num_workers = workers
        for want, got in zip(expected, data.train_dataloader()):
            assert all(torch.equal(want[key], got[key]) for key in want)
    assert data.genome.bases.shape == (347,)
    assert len(pickle.dumps(two)) < 5000
    again = pickle.loads(pickle.dumps(two)).make_training(3, 0, 1)
    assert torch.equal(again["ids"], two.make_training(3, 0, 1)["ids"])


class Recorder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.seen.append(batch["ids"])
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(run: Path, steps: int) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps,
        default_root_dir=run,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_with_the_batches_it_would_have_had(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.fa").write_text(">x\nAC-T\n")
    with pytest.raises(GenomeError, match=r"bad\.fa: record 'x', line 2: letter '-' at base 3"):
        module(folder).setup()
    run = tmp_path / "run"
    model, data = Recorder(), module(folder, skip_bad=True)
    first = trainer(run, 3)
    first.fit(model, data)
    first.save_checkpoint(run / "last.ckpt")
    assert load_tokenizer(run).to_config() == data.tokenizer.to_config()
    lines = (run / "left_out.csv").read_text().splitlines()
    assert lines[0] == "path,reason"
    assert len(lines) == 2
    assert "bad.fa" in lines[1]
    resumed = Recorder()
    trainer(run, 5).fit(resumed, module(folder, skip_bad=True), ckpt_path=run / "last.ckpt")
    expected = [data.batches("train").make_training(i, 0, 1)["ids"].tolist() for i in range(5)]
    assert [ids.tolist() for ids in model.seen + resumed.seen] == expected
    stored = torch.load(run / "last.ckpt", weights_only=True)["DNADataModule"]
    assert json.loads(stored["tokenizer"]) == {"ssm_modal_tokenizer": "nucleotide"}
    with pytest.raises(ValueError, match="trained with objective causal, got masked"):
        module(folder, objective="masked").load_state_dict(stored)
    with pytest.raises(ValueError, match="holds another tokenizer"):
        trainer(run, 6).fit(Recorder(), module(folder, skip_bad=True, tokenizer=KMER))


def test_bad_arguments_are_named(folder: Path) -> None:
    for options, problem in (
        ({"objective": "both"}, "objective is 'both'"),
        ({"length": 0}, "length is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"eval_length": 0}, "eval_length is 0"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"mask_rate": 1.0}, "mask_rate is 1.0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"tokenizer": "byte"}, "tokenizer is 'byte', one of text"),
    ):
        with pytest.raises(ValueError, match=problem):
            module(folder, **options)
    with pytest.raises(ValueError, match="split is 'dev'"):
        module(folder).stretches("dev")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        module(folder / "none").setup()
    with pytest.raises(GenomeError, match="longest stretch has 30 bases, a window of 300 tokens takes 301"):
        module(folder, length=300).batches("train")
    with pytest.raises(GenomeError, match="the validation split holds no window"):
        module(folder, val_fraction=0.0).batches("validation")
    assert module(folder, val_fraction=0.0).val_dataloader() == []
    assert text_of(module(folder).genome.fetch("five")) == "ACGTA"
