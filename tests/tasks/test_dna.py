"""Tasks of DNA: masked modelling, the test by length of context against a hand count, length warm-up across a
resume, weights to start from, and Matthews' correlation coefficient with its interval."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning")
pytest.importorskip("Bio")

from torchmetrics.functional.classification import multiclass_matthews_corrcoef

import ssm_modal
from ssm_modal.cli.main import main
from ssm_modal.datamodules.dna import DNADataModule
from ssm_modal.datamodules.dna_labelled import DNAClassificationDataModule
from ssm_modal.datamodules.dna_plan import Stage, training_stages
from ssm_modal.errors import CheckpointError, ConfigError
from ssm_modal.tasks import Classification, DNALanguageModelling, MaskedLanguageModelling
from ssm_modal.tasks.matthews import mcc, mcc_interval
from tests.tasks.test_base import trainer
from tests.tasks.tiny import assert_same, load, weights

TINY: dict[str, Any] = {"d_model": 8, "n_layers": 1, "d_state": 4, "embedding_std": 1.0}


def draw(n: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("ACGT", k=n))


@pytest.fixture
def genomes(tmp_path: Path) -> Path:
    """Two files of one record each, 200 bases (an N in its last fifth) and 100."""
    data = tmp_path / "genomes"
    data.mkdir()
    long = list(draw(200, 1))
    long[170] = "N"
    (data / "a.fa").write_text(f">chr1\n{''.join(long)}\n")
    (data / "b.fa").write_text(f">chr1\n{draw(100, 2)}\n")
    return data


def module(folder: Path, **options: Any) -> DNADataModule:
    settings: dict[str, Any] = {"length": 16, "batch_size": 2, "val_gap": 17, "seed": 1}
    settings["cache_dir"] = str(folder.parent / "cache")
    return DNADataModule(**{"path": str(folder), **settings, **options})


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- masked modelling


@pytest.mark.parametrize("model", ["caduceus_ps", "caduceus_ph"])
def test_masked_loss_is_over_chosen_places_alone(genomes: Path, tmp_path: Path, model: str) -> None:
    task = MaskedLanguageModelling(model, TINY)
    data = module(genomes, objective="masked", mask_rate=0.4)
    found = trainer(tmp_path / "run").validate(task, data, verbose=False)[0]
    nats, right, count = 0.0, 0, 0
    task.eval()
    for batch in data.val_dataloader():
        with torch.no_grad():
            logs = task.model(batch["ids"])[0].log_softmax(-1)
        for row, labels in enumerate(batch["labels"].tolist()):
            for place, label in enumerate(labels):
                if label != -100:
                    nats -= float(logs[row, place, label])
                    right += int(logs[row, place].argmax()) == label
                    count += 1
    assert count > 10
    assert found["val/loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["val/nats_per_base"] == pytest.approx(nats / count, rel=1e-5)
    assert found["val/perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found["val/accuracy"] == pytest.approx(right / count)
    batch = next(iter(data.val_dataloader()))
    predicted = task.predict_step(batch, 0)
    chosen = batch["labels"] != -100
    with torch.no_grad():
        logits = task.model(batch["ids"])[0]
    expected = F.cross_entropy(logits[chosen], batch["labels"][chosen], reduction="none")
    assert torch.allclose(predicted["nats"][chosen], expected, rtol=1e-5)
    assert not predicted["nats"][~chosen].any()


def test_nats_a_base_of_kmers_and_bad_pairings(genomes: Path, tmp_path: Path) -> None:
    kmers = {"ssm_modal_tokenizer": "kmer", "k": 2, "overlapping": False}
    strands = {"type": "strands", "kmer": 2}
    task = MaskedLanguageModelling("caduceus_ps", {**TINY, "vocab_size": 26, "strands": strands})
    data = module(genomes, objective="masked", tokenizer=kmers, val_gap=32)
    found = trainer(tmp_path / "run").validate(task, data, verbose=False)[0]
    assert found["val/nats_per_base"] == pytest.approx(found["val/loss"] / 2)
    with pytest.raises(ValueError, match="objective is 'causal', but the model predicts what is masked"):
        trainer(tmp_path / "run").fit(MaskedLanguageModelling("caduceus_ps", TINY), module(genomes))
    masked = module(genomes, objective="masked")
    with pytest.raises(ValueError, match="objective is 'masked', but the model predicts the next token"):
        trainer(tmp_path / "run").fit(DNALanguageModelling("dna_lm", TINY), masked)
    with pytest.raises(ConfigError, match="model is 'dna_lm', a CausalLM; expected a masked one"):
        MaskedLanguageModelling("dna_lm", TINY)
    with pytest.raises(ValueError, match="expected a causal one, such as dna_lm"):
        DNALanguageModelling("caduceus_ps", TINY)


# ---------------------------------------------------------------- by length of context


@pytest.mark.parametrize("segment", [None, 3])
def test_context_scores_every_base_once_at_each_length(
    genomes: Path, tmp_path: Path, segment: int | None
) -> None:
    task = DNALanguageModelling(
        "dna_lm", TINY, context_lengths=[4, 64], context_tokens=8, segment=segment
    ).eval()
    data = module(genomes)
    found = trainer(tmp_path / "run").test(task, data, verbose=False)[0]
    rows = {int(row["length"]): row for row in table(tmp_path / "run" / "context.csv")}
    records = table(tmp_path / "run" / "context_records.csv")
    places = table(tmp_path / "run" / "context_places.csv")
    assert sorted(rows) == [4, 64]
    for length, windows in ((4, 10 + 5), (64, 2)):
        by_record = []
        known: dict[int, list[float]] = {}
        for record, (start, end) in enumerate(((160, 200), (80, 100))):
            tokens = data.tokenizer.encode_letters(data.genome.read(record, start, end))
            nats = []
            # Every base behind the first is the last of a stretch of at most `length` known ones.
            for place in range(1, len(tokens)):
                begin = (place - 1) // length * length
                with torch.no_grad():
                    logits = task.model(tokens[None, begin:place])[0][0, -1]
                if tokens[place] < 4:
                    nats.append(float(F.cross_entropy(logits, tokens[place])))
                    known.setdefault(place - begin, []).append(nats[-1])
            by_record.append(nats)
        assert [len(nats) for nats in by_record] == [38, 19]  # 39 less the N, 19
        mean = sum(map(sum, by_record)) / 57
        assert found[f"test/nats_per_base_{length}"] == pytest.approx(mean, rel=1e-5)
        assert rows[length]["bases"] == "57"
        assert int(rows[length]["windows"]) == windows
        assert float(rows[length]["nats_per_base"]) == pytest.approx(mean, abs=2e-6)
        for row, name, nats in zip((r for r in records if r["length"] == str(length)), "ab", by_record):
            assert (row["file"], row["record"], int(row["bases"])) == (f"{name}.fa", "chr1", len(nats))
            assert float(row["nats_per_base"]) == pytest.approx(sum(nats) / len(nats), abs=2e-6)
        for row in (r for r in places if r["length"] == str(length)):
            own = [n for k, found in known.items() if int(row["from"]) <= k <= int(row["to"]) for n in found]
            assert int(row["bases"]) == len(own)
            if own:
                assert float(row["nats_per_base"]) == pytest.approx(sum(own) / len(own), abs=2e-6)


# ---------------------------------------------------------------- length warm-up


def test_stages_hold_the_same_tokens() -> None:
    assert training_stages(64, 2, {}) == (Stage(0, 64, 2),)
    stages = training_stages(1 << 20, 1, {1024: 0, 32768: 500, 1 << 20: 900})
    assert stages == (Stage(0, 1024, 1024), Stage(500, 32768, 32), Stage(900, 1 << 20, 1))
    for schedule, problem in (
        ({8: 1, 64: 2}, "begins with batch 1, expected 0"),
        ({8: 0, 32: 2}, "ends with 32, expected length, which is 64"),
        ({8: 0, 48: 2, 64: 3}, "holds the length 48, which does not divide the 128 tokens"),
        ({8: 0, 64: 0}, "goes from 8: 0 to 64: 0, expected"),
        ({32: 0, 8: 3, 64: 5}, "goes from 32: 0 to 8: 3"),
        ({0: 0, 64: 3}, "holds the length 0"),
        ({8: -1, 64: 3}, "holds the beginning -1"),
    ):
        with pytest.raises(ValueError, match=problem):
            training_stages(64, 2, schedule)


def test_a_warm_up_goes_on_in_its_stage(
    genomes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Six batches in one run and in two pieces, the second from inside the second stage: the same weights."""
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    data = module(genomes, length_schedule={4: 0, 8: 2, 16: 4}, reverse_complement=True)
    shapes = [tuple(data.batches("train").make_training(i, 0, 1)["ids"].shape) for i in range(6)]
    assert shapes == [(8, 4), (8, 4), (4, 8), (4, 8), (2, 16), (2, 16)]
    starts = [data.batches("train").make_training(i, 0, 1)["starts"].tolist() for i in (0, 2)]
    assert starts[0][:4] != starts[1]  # each stage draws its own places

    def run(name: str, steps: int, *more: str) -> None:
        settings = {
            "run_dir": tmp_path / name,
            "trainer.accelerator": "cpu",
            "trainer.max_steps": steps,
            "trainer.val_check_interval": 3,
            "trainer.log_every_n_steps": 1,
            "trainer.enable_progress_bar": "false",
            "checkpoint.every_n_steps": 3,
            "test_after_fit": "false",
            "model": "ssm_modal.tasks.MaskedLanguageModelling",
            "model.model": "caduceus_ps",
            **{f"model.overrides.{key}": value for key, value in TINY.items()},
            "model.overrides.dropout": 0.2,
            "model.optimizer.lr": 0.01,
            "model.schedule.kind": "constant",  # the first piece ends at another step
            "data": "ssm_modal.datamodules.dna.DNADataModule",
            "data.path": genomes,
            "data.objective": "masked",
            "data.length": 16,
            "data.batch_size": 2,
            "data.val_gap": 17,
            "data.length_schedule": "{4: 0, 8: 2, 16: 4}",
            "data.reverse_complement": "true",
            "data.cache_dir": tmp_path / "cache",
        }
        args = [f"--{key}={value}" for key, value in settings.items()]
        assert main(["fit", *args, *more]) == 0, capsys.readouterr().err

    run("whole", 6)
    run("pieces", 3)
    assert load(tmp_path / "pieces")["global_step"] == 3
    run("pieces", 6, "--ckpt_path=last")
    assert_same(weights(tmp_path / "pieces"), weights(tmp_path / "whole"))


# ---------------------------------------------------------------- weights to start from


def test_a_pretrained_encoder_under_a_new_head(tmp_path: Path) -> None:
    torch.manual_seed(3)
    source = ssm_modal.create_model("caduceus_ps", **TINY)
    source.save_pretrained(tmp_path / "lm")
    path = str(tmp_path / "lm")
    for name in ("caduceus_ps_classifier", "caduceus_ph_classifier", "dna_classifier"):
        task = Classification(name, TINY, init_from=path, init_part="encoder")
        embedding = task.model.token_embedding
        assert torch.equal(embedding.weight, source.embedding.weight)  # type: ignore[union-attr, arg-type]
        for key, value in task.model.backbone.state_dict().items():
            assert torch.equal(value, source.backbone.state_dict()[key]), key
    with pytest.raises(
        CheckpointError, match=r"\(backbone\) does not fit .*in_proj\.weight \(32, 8\), expected \(48, 12\)"
    ):
        Classification("dna_classifier", {**TINY, "d_model": 12}, init_from=path, init_part="backbone")
    with pytest.raises(CheckpointError, match=r"\(token embedding\) .*\(9, 8\), expected \(7, 8\)"):
        Classification("dna_classifier", {**TINY, "vocab_size": 7}, init_from=path, init_part="encoder")
    with pytest.raises(ValueError, match="the model is a SequenceCNN without backbone"):
        Classification("dna_cnn", {"d_model": 8}, init_from=path, init_part="backbone")
    audio = {"d_model": 8, "n_layers": 1, "d_state": 4}
    with pytest.raises(ValueError, match="without token embedding"):
        Classification("audio_classifier", audio, init_from=path, init_part="encoder")


# ---------------------------------------------------------------- Matthews' correlation coefficient


def test_mcc_by_hand() -> None:
    tp, fn, fp, tn = 90, 10, 30, 70
    matrix = torch.tensor([[tn, fp], [fn, tp]])
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = (tp * tn - fp * fn) / math.sqrt(product)
    assert mcc(matrix) == pytest.approx(expected, abs=1e-6)
    assert mcc(torch.tensor([[5, 0], [0, 7]])) == pytest.approx(1.0)
    assert mcc(torch.tensor([[0, 5], [7, 0]])) == pytest.approx(-1.0)
    assert mcc(torch.tensor([[5, 0], [7, 0]])) == mcc(torch.zeros(2, 2, dtype=torch.int64)) == 0.0
    # Three classes (Gorodkin 2004): (c s - sum t p) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)).
    three = torch.tensor([[4, 1, 0], [0, 3, 2], [1, 0, 9]])
    true, predicted = three.sum(1), three.sum(0)
    s, c = 20, 16
    top = c * s - int((true * predicted).sum())
    bottom = math.sqrt((s * s - int((predicted**2).sum())) * (s * s - int((true**2).sum())))
    assert mcc(three) == pytest.approx(top / bottom, abs=1e-6)
    assert mcc(torch.stack([matrix, matrix.T])).tolist() == pytest.approx([expected, expected])
    cells = torch.repeat_interleave(torch.arange(9), three.flatten())
    theirs = multiclass_matthews_corrcoef(cells % 3, cells // 3, num_classes=3)
    assert mcc(three) == pytest.approx(float(theirs), abs=1e-6)


def test_the_interval_is_that_of_the_bootstrap() -> None:
    matrix = torch.tensor([[70, 30], [10, 90]])
    low, high = mcc_interval(matrix, 400)
    assert (low, high) == mcc_interval(matrix, 400)
    assert low < mcc(matrix) < high
    # Sequences drawn one by one give the same interval but for chance.
    generator = torch.Generator().manual_seed(1)
    true = torch.tensor([0] * 100 + [1] * 100)
    said = torch.tensor([0] * 70 + [1] * 30 + [0] * 10 + [1] * 90)
    values = []
    for _ in range(400):
        rows = torch.randint(0, 200, (200,), generator=generator)
        own = torch.zeros(2, 2, dtype=torch.int64)
        own.index_put_((true[rows], said[rows]), torch.ones(200, dtype=torch.int64), accumulate=True)
        values.append(float(mcc(own)))
    wanted = torch.quantile(torch.tensor(values), torch.tensor([0.025, 0.975]))
    assert [low, high] == pytest.approx(wanted.tolist(), abs=0.03)


def test_sequences_that_stand_in_training_are_left_out_of_a_second_score(tmp_path: Path) -> None:
    folder = tmp_path / "task"
    folder.mkdir()
    train = [(draw(12, i), i % 2) for i in range(6)]
    backwards = train[1][0][::-1].translate(str.maketrans("ACGT", "TGCA"))
    test = [(train[0][0].lower(), 0), (backwards, 1), *((draw(12, 50 + i), i % 2) for i in range(7))]
    for name, rows in (("train", train), ("dev", train), ("test", test)):
        lines = [f"{sequence},{label}" for sequence, label in rows]
        (folder / f"{name}.csv").write_text("\n".join(["sequence,label", *lines]) + "\n")
    data = DNAClassificationDataModule(str(folder), batch_tokens=30, seed=1)
    assert data.in_training("test").tolist() == [True, True] + [False] * 7
    assert data.in_training("validation").all()
    assert "in_training" not in data.batches("train").make_training(0, 0, 1)
    marks = [mark for batch in data.test_dataloader() for mark in batch["in_training"].tolist()]
    assert marks == [True, True] + [False] * 7
    task = Classification("caduceus_ps_classifier", TINY, bootstrap=50)
    found = trainer(tmp_path / "run").test(task, data, verbose=False)[0]
    with torch.no_grad():
        ids = torch.stack([data.tokenizer.encode_ids(sequence) for sequence, _ in test])
        predicted = task.eval().model(ids)[0].argmax(-1)
    matrices = torch.zeros(2, 2, 2, dtype=torch.int64)
    for place, ((_, label), said) in enumerate(zip(test, predicted.tolist())):
        matrices[int(place >= 2), label, said] += 1
    assert found["test/mcc"] == pytest.approx(float(mcc(matrices.sum(0))))
    assert (found["test/mcc_low"], found["test/mcc_high"]) == pytest.approx(
        mcc_interval(matrices.sum(0), 50), abs=1e-6
    )
    assert found["test/sequences_new"] == 7
    assert found["test/mcc_new"] == pytest.approx(float(mcc(matrices[1])))
    assert found["test/accuracy_new"] == pytest.approx(int(matrices[1].diagonal().sum()) / 7)
    validated = trainer(tmp_path / "run").validate(task, data, verbose=False)[0]
    assert "val/mcc" in validated
    assert "val/mcc_low" not in validated
    assert validated["val/sequences_new"] == 0
    assert math.isnan(validated["val/mcc_new"])
