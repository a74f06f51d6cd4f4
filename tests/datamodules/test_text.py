"""The text data module: every token predicted once and in its place, and who draws what."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

import lightning.pytorch as pl

from ssm_modal.datamodules.text import TextBatches, TextDataModule
from ssm_modal.io.text import TextFileError
from ssm_modal.tokenizers import load_tokenizer

TEXT = "".join(f"{i:04d}" for i in range(250))


def module(tmp_path: Path, **options: object) -> TextDataModule:
    file = tmp_path / "text.txt"
    if not file.exists():
        file.write_text(TEXT)
    settings: dict[str, object] = {
        "length": 16,
        "batch_size": 4,
        "seed": 1,
        "cache_dir": str(tmp_path / "cache"),
    }
    return TextDataModule(**{"path": str(file), **settings, **options})  # type: ignore[arg-type]


def documents(tmp_path: Path, texts: list[str]) -> str:
    folder = tmp_path / "documents"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text)
    return str(folder)


def test_first_nine_tenths_train_and_the_rest_validates(tmp_path: Path) -> None:
    data = module(tmp_path)
    assert bytes(data.stream("train").tolist()).decode() == TEXT[:900]
    assert bytes(data.stream("validation").tolist()).decode() == TEXT[900:]
    assert data.stream("test").tolist() == data.stream("validation").tolist()
    assert data.vocab_size == 256


def test_the_last_part_of_each_file_validates(tmp_path: Path) -> None:
    path = documents(tmp_path, ["a" * 10 + "b" * 10, "c" * 5 + "d" * 5])
    data = module(tmp_path, path=path, val_fraction=0.5, length=4)
    assert bytes(data.stream("train").tolist()) == b"a" * 10 + b"c" * 5
    assert bytes(data.stream("validation").tolist()) == b"b" * 10 + b"d" * 5


@pytest.mark.parametrize("layout", ["windows", "packed"])
@pytest.mark.parametrize("eval_length", [1, 7, 33, 99, 100, 1000])
def test_validation_predicts_every_token_once(tmp_path: Path, layout: str, eval_length: int) -> None:
    data = module(tmp_path, layout=layout, eval_length=eval_length, eval_batch_size=3)
    stream = data.stream("validation").to(torch.int64)
    loader = data.val_dataloader()
    predicted = []
    for batch in loader:
        assert batch["ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["ids"].shape == batch["labels"].shape
        if layout == "packed":
            assert batch["ids"].shape[0] == 1
            borders = batch["cu_seqlens"].tolist()
            assert (borders[0], borders[-1]) == (0, batch["ids"].shape[1])
            assert all(b - a <= eval_length for a, b in pairwise(borders))
        else:
            assert batch["ids"].shape[1] == eval_length
        for ids, labels in zip(batch["ids"], batch["labels"]):
            keep = labels != -100
            # Whatever stands filled up stands at the end.
            assert keep.tolist() == sorted(keep.tolist(), reverse=True)
            predicted += list(zip(ids[keep].tolist(), labels[keep].tolist()))
    assert predicted == list(zip(stream[:-1].tolist(), stream[1:].tolist()))
    assert len(loader) == math.ceil(math.ceil(99 / eval_length) / 3)


def test_bytes_per_token(tmp_path: Path) -> None:
    path = documents(tmp_path, ["aaaa€€", "ää"])
    assert module(tmp_path, path=path, val_path=path).bytes_per_token("validation") == 1.0
    assert (
        module(tmp_path, path=path, val_path=path, tokenizer="char").bytes_per_token("validation") == 14 / 8
    )
    # 14 bytes and two ends of text, which stand for none.
    data = module(tmp_path, path=path, val_path=path, tokenizer="byte+eos")
    assert data.bytes_per_token("validation") == 14 / 16


def test_training_windows_are_the_text_and_reach_all_of_it(tmp_path: Path) -> None:
    # 1,000 distinct characters in rising order: an id is its token's place.
    file = tmp_path / "distinct.txt"
    file.write_text("".join(chr(0x4E00 + i) for i in range(1000)))
    batches = module(tmp_path, path=str(file), tokenizer="char").batches("train")
    starts: Counter[int] = Counter()
    for index in range(4000):
        batch = batches.make_training(index, 0, 1)
        first = batch["ids"][:, :1]
        assert torch.equal(batch["ids"], first + torch.arange(16))
        assert torch.equal(batch["labels"], first + torch.arange(1, 17))
        starts.update(first.flatten().tolist())
    # 900 tokens leave the places 0 ... 883, each drawn about 18 times.
    assert set(starts) == set(range(884))
    mean = 16_000 / 884
    chi2 = sum((starts[i] - mean) ** 2 / mean for i in range(884))
    assert 700 < chi2 < 1080  # 883 degrees of freedom, about 4.5 standard deviations to either side


@pytest.mark.parametrize("layout", ["windows", "packed"])
def test_two_processes_draw_what_one_draws_on_twice_the_batch(tmp_path: Path, layout: str) -> None:
    two = module(tmp_path, layout=layout).batches("train")
    one = module(tmp_path, layout=layout, batch_size=8).batches("train")
    axis = 0 if layout == "windows" else 1
    for index in (0, 1, 1000, 10**12):
        halves = [two.make_training(index, rank, 2) for rank in range(2)]
        whole = one.make_training(index, 0, 1)
        for key in ("ids", "labels"):
            assert torch.equal(torch.cat([half[key] for half in halves], axis), whole[key])
        if layout == "packed":
            joined = torch.cat([halves[0]["cu_seqlens"], halves[1]["cu_seqlens"][1:] + 64])
            assert torch.equal(joined, whole["cu_seqlens"])


def test_seed_decides_the_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(seed: int | None, index: int = 3) -> list[int]:
        return (
            module(tmp_path, seed=seed).batches("train").make_training(index, 0, 1)["ids"].flatten().tolist()
        )

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1) != draw(1, index=4)
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert draw(None) == draw(2)


def test_packed_borders_stand_at_documents(tmp_path: Path) -> None:
    path = documents(tmp_path, ["abcdef", "ghi", "jklmnopqrst"])
    data = module(tmp_path, path=path, val_path=path, layout="packed", length=8, eval_batch_size=2)
    first, second = list(data.val_dataloader())
    assert bytes(first["ids"][0].tolist()) == b"abcdefghijklmnop"
    # Windows of 8 begin at 0 and 8, documents at 6 and 9.
    assert first["cu_seqlens"].tolist() == [0, 6, 8, 9, 16]
    labels = "bcdef.hi.klmnopq"
    assert first["labels"][0].tolist() == [-100 if c == "." else ord(c) for c in labels]
    assert bytes(second["ids"][0].tolist()) == b"qrs"
    assert bytes(second["labels"][0].tolist()) == b"rst"
    assert second["cu_seqlens"].tolist() == [0, 3]


def test_documents_end_with_the_end_of_text_id(tmp_path: Path) -> None:
    path = documents(tmp_path, ["abc", "de"])
    data = module(tmp_path, path=path, val_path=path, tokenizer="byte+eos", layout="packed", length=3)
    (batch,) = list(data.val_dataloader())
    assert data.stream("train").to(torch.int64).tolist() == [97, 98, 99, 256, 100, 101, 256]
    assert batch["ids"].tolist() == [[97, 98, 99, 256, 100, 101]]
    # The end is predicted, but not from the end the next document's first token.
    assert batch["labels"].tolist() == [[98, 99, 256, -100, 101, 256]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 6]


def test_characters_of_all_texts_make_the_vocabulary(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("xyz9876")
    data = module(tmp_path, tokenizer="char", val_path=str(other))
    assert data.vocab_size == 13
    assert data.tokenizer.decode(data.stream("train")[:12].to(torch.int64)) == TEXT[:12]
    assert data.stream("train").shape == (1000,)  # with val_path nothing is cut off
    assert data.tokenizer.decode(data.stream("validation").to(torch.int64)) == "xyz9876"


def test_workers_and_resumed_runs_get_the_same_batches(tmp_path: Path) -> None:
    class FakeTrainer:
        """What the loader asks a trainer for."""

        global_rank, world_size = 1, 2

        class fit_loop:
            class epoch_loop:
                class batch_progress:
                    class total:
                        processed = 5

    data = module(tmp_path)
    data.trainer = FakeTrainer()  # type: ignore[assignment]
    expected = [data.batches("train").make_training(index, 1, 2) for index in (5, 6, 7)]
    for workers in (0, 2):
        data.num_workers = workers
        for want, got in zip(expected, data.train_dataloader()):
            assert torch.equal(want["ids"], got["ids"])


def test_batches_travel_without_the_mapped_ids(tmp_path: Path) -> None:
    batches = module(tmp_path).batches("train")
    want = batches.make_training(0, 0, 1)
    sent = pickle.dumps(batches)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert isinstance(again, TextBatches)
    assert torch.equal(again.make_training(0, 0, 1)["ids"], want["ids"])


class Recorder(pl.LightningModule):
    """Trains one number and keeps the ids it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.seen.append(batch["ids"].clone())
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, steps: int) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_a_run_writes_its_tokenizer_and_resumes_with_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model, data = Recorder(), module(tmp_path, tokenizer="char")
    first = trainer(run, 3)
    first.fit(model, data)
    assert load_tokenizer(run).to_config() == data.tokenizer.to_config()
    checkpoint = run / "last.ckpt"
    first.save_checkpoint(checkpoint)
    stored = torch.load(checkpoint, weights_only=True)["TextDataModule"]
    assert json.loads(stored["tokenizer"]) == data.tokenizer.to_config()

    resumed = Recorder()
    trainer(run, 5).fit(resumed, module(tmp_path, tokenizer="char"), ckpt_path=checkpoint)
    batches = data.batches("train")
    assert [s.tolist() for s in model.seen + resumed.seen] == [
        batches.make_training(index, 0, 1)["ids"].tolist() for index in range(5)
    ]
    # Another tokenizer neither overwrites the first nor takes over its checkpoint.
    with pytest.raises(ValueError, match="holds another tokenizer than this run's"):
        trainer(run, 6).fit(Recorder(), module(tmp_path, tokenizer="byte"))
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        trainer(tmp_path / "new", 6).fit(Recorder(), module(tmp_path, tokenizer="byte"), ckpt_path=checkpoint)
    assert load_tokenizer(run).vocab_size == 10


def test_bad_arguments_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, word in (
        ({"length": 0}, "length is 0, expected a whole number of 1 or more"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"eval_length": 0}, "eval_length is 0"),
        ({"eval_batch_size": -1}, "eval_batch_size is -1"),
        ({"layout": "rows"}, "layout is 'rows'"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"num_workers": -1}, "num_workers is -1"),
    ):
        with pytest.raises(ValueError, match=word):
            module(tmp_path, **options)
    with pytest.raises(ValueError, match=r"the train split of '.*' holds 900 tokens, expected at least 901"):
        module(tmp_path, length=900).batches("train")
    assert module(tmp_path, length=899).batches("train").make_training(0, 0, 1)["ids"].shape == (4, 899)
    with pytest.raises(ValueError, match="there is no validation split: val_fraction is 0"):
        module(tmp_path, val_fraction=0.0).batches("validation")
    assert module(tmp_path, val_fraction=0.0).val_dataloader() == []
    with pytest.raises(ValueError, match="split is 'valid'"):
        module(tmp_path).stream("valid")
    with pytest.raises(FileNotFoundError, match=r"val_path is '.*gone'"):
        module(tmp_path, val_path=str(tmp_path / "gone")).prepare_data()
    (tmp_path / "zero.txt").write_bytes(b"ab\0")
    with pytest.raises(TextFileError, match=r"zero\.txt: byte 2 is NUL"):
        module(tmp_path, path=str(tmp_path / "zero.txt")).prepare_data()
    monkeypatch.delenv("SSM_MODAL_DATA", raising=False)
    with pytest.raises(ValueError, match="the environment variable SSM_MODAL_DATA is not set"):
        module(tmp_path, path="$SSM_MODAL_DATA/text").prepare_data()
    monkeypatch.setenv("SSM_MODAL_DATA", str(tmp_path))
    assert module(tmp_path, path="${SSM_MODAL_DATA}/text.txt").stream("train").shape == (900,)


def test_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSM_MODAL_CACHE", str(tmp_path / "own"))
    module(tmp_path, cache_dir=None).prepare_data()
    assert len(os.listdir(tmp_path / "own" / "text")) == 1
    monkeypatch.delenv("SSM_MODAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    module(tmp_path, cache_dir=None).prepare_data()
    assert len(os.listdir(tmp_path / "xdg" / "ssm_modal" / "text")) == 1


def test_tinyshakespeare_splits_as_published() -> None:
    root = os.environ.get("SSM_MODAL_DATA")
    if root is None:
        pytest.skip("set SSM_MODAL_DATA to the folder that holds text/tinyshakespeare/input.txt")
    file = Path(root) / "text" / "tinyshakespeare" / "input.txt"
    text = file.read_text(encoding="utf-8")
    assert len(text) == 1_115_394
    from ssm_modal.tokenizers import CharTokenizer

    assert CharTokenizer.from_text(text).vocab_size == 65
