"""Recordings generated from mu-law ids: lengths of the model's own, WAV files through the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ssm_modal
from ssm_modal.cli.main import main
from ssm_modal.generation import GenerationConfig, generate_waveforms
from ssm_modal.models import CausalLM
from ssm_modal.tokenizers import ByteTokenizer, MuLawTokenizer, build_tokenizer, load_tokenizer

pytest.importorskip("soundfile")

from ssm_modal.io.audio import audio_info, read_audio
from ssm_modal.io.wav import write_wav

TOKENIZER = MuLawTokenizer(("no", "yes"), 8000)


def wave_model(vocab_size: int = 260) -> CausalLM:
    """Random, of the U-Net's shape; about one id in twenty ends a recording."""
    torch.manual_seed(0)
    model = ssm_modal.create_model(
        "sashimi_lm", vocab_size=vocab_size, d_model=8, n_layers=1, **{"backbone.pool": [2, 2], "d_state": 2}
    )
    assert isinstance(model, CausalLM)
    model.head.proj.weight.data[TOKENIZER.end_id] = 0.9  # type: ignore[union-attr]
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    wave_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save(tmp_path / "model" / "tokenizer.json")
    return tmp_path / "model"


def line(*options: object) -> int:
    return main(["generate", "--device", "cpu", *(str(o) for o in options)])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "generated.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_classes_have_begin_ids_of_their_own_behind_begin_and_end() -> None:
    assert TOKENIZER.vocab_size == 260
    assert TOKENIZER.begin_ids == (256, 258, 259)
    wave = torch.tensor([0.0, 1.0])
    assert TOKENIZER.encode_recording(wave, "yes").tolist() == [259, 128, 255, 257]
    assert TOKENIZER.encode_recording(wave).tolist() == [256, 128, 255, 257]
    assert TOKENIZER.decode([258, 128, 257]).tolist() == pytest.approx([0.0], abs=1e-3)
    with pytest.raises(ValueError, match="label is 'maybe', expected one of no, yes"):
        TOKENIZER.begin_id_of("maybe")
    with pytest.raises(ValueError, match="each name once"):
        MuLawTokenizer(("a", "a"))
    with pytest.raises(TypeError, match="classes is 'ab', expected a list"):
        MuLawTokenizer("ab")
    with pytest.raises(ValueError, match="sample_rate is 0"):
        MuLawTokenizer(sample_rate=0)


def test_a_tokenizer_file_brings_back_classes_and_rate(tmp_path: Path) -> None:
    again = load_tokenizer(TOKENIZER.save(tmp_path / "tokenizer.json"))
    assert isinstance(again, MuLawTokenizer)
    assert (again.classes, again.sample_rate) == (("no", "yes"), 8000)
    with pytest.raises(ValueError, match="tokenizer is that of waveforms"):
        build_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_recording_ends_where_the_model_ends_it_and_holds_samples_alone() -> None:
    model, config = wave_model(300), GenerationConfig(max_new_tokens=12, seed=5)
    labels = ["no", "yes", "no", "yes", None, "no"]
    made = generate_waveforms(model, TOKENIZER, labels, config)
    for i, (label, one) in enumerate(zip(labels, made)):
        # By the definition: draw from the softmax of the whole, begin ids and ids of no tokenizer left out.
        ids, generator = [TOKENIZER.begin_id_of(label)], torch.Generator().manual_seed(5 + i)
        while len(ids) <= 12:
            logits = model(torch.tensor([ids]))[0][0, -1].detach()
            logits[[256, *range(258, 300)]] = -torch.inf
            heights = logits.softmax(-1).double().cumsum(-1)
            uniform = torch.rand((), dtype=torch.float64, generator=generator)
            ids.append(int(torch.searchsorted(heights, uniform * heights[-1], right=True)))
            if ids[-1] == 257:
                break
        assert one.finish == ("end" if ids[-1] == 257 else "length")
        assert torch.equal(one.waveform, TOKENIZER.decode(ids))
    assert {one.finish for one in made} == {"end", "length"}
    with pytest.raises(ValueError, match="the tokenizer has 260 ids, but the model knows 258"):
        generate_waveforms(wave_model(258), TOKENIZER, ["no"], config)


def test_the_command_writes_wav_files_whatever_the_batch(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--model", saved, "--number", 3, "--max-seconds", 0.004, "--seed", 9, "--temperature", 0.9)
    assert line(*common, "--out", tmp_path / "a") == 0, capsys.readouterr().err
    rows = table(tmp_path / "a")
    assert [(r["path"], r["label"], r["seed"]) for r in rows] == [
        (f"{label}/{label}_000{i}.wav", label, str(9 + 3 * k + i))
        for k, label in enumerate(("no", "yes"))
        for i in range(3)
    ]
    assert "6 recordings" in capsys.readouterr().out
    config = GenerationConfig(max_new_tokens=32, seed=9, temperature=0.9)
    made = generate_waveforms(wave_model(), TOKENIZER, ["no"] * 3 + ["yes"] * 3, config)
    for row, one in zip(rows, made):
        file = tmp_path / "a" / row["path"]
        assert audio_info(file).sample_rate == 8000
        assert int(row["samples"]) == one.waveform.shape[0]
        assert row["finish"] == one.finish
        want = one.waveform if one.waveform.shape[0] else torch.zeros(1)
        torch.testing.assert_close(read_audio(file), want, atol=1.01 / 2**15, rtol=0)
    assert line(*common, "--out", tmp_path / "b", "--batch-size", 2) == 0
    for row in rows:
        assert (tmp_path / "a" / row["path"]).read_bytes() == (tmp_path / "b" / row["path"]).read_bytes()
    assert table(tmp_path / "b") == rows


def test_a_job_goes_on_where_it_stopped_and_refuses_other_settings(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    common = ("--model", saved, "--label", "yes", "--number", 4, "--max-seconds", 0.002, "--batch-size", 2)
    written = []

    def failing(path: Path, *arguments: Any) -> Path:
        if len(written) == 3:
            raise OSError("No space left on device")
        written.append(path)
        return write_wav(path, *arguments)

    monkeypatch.setattr("ssm_modal.cli.generate_audio.write_wav", failing)
    assert line(*common, "--out", out) == 1
    assert [row["path"] for row in table(out)] == ["yes/yes_0000.wav", "yes/yes_0001.wav"]
    monkeypatch.undo()
    first = (out / "yes/yes_0000.wav").stat().st_mtime_ns
    assert line(*common, "--out", out) == 0  # without a seed: the one it began with
    assert len(table(out)) == 4
    assert (out / "yes/yes_0000.wav").stat().st_mtime_ns == first
    seed = json.loads((out / "generated.json").read_text())["seed"]
    assert line(*common, "--out", tmp_path / "again", "--seed", seed) == 0
    assert table(tmp_path / "again") == table(out)
    capsys.readouterr()
    assert line(*common, "--out", out, "--temperature", 0.5) == 1
    assert "temperature was 1.0 and is 0.5" in capsys.readouterr().err


def test_a_recording_without_a_sample_is_kept(tmp_path: Path) -> None:
    """All 257 ids that may come are as likely; the end stands last, so it is drawn from 256/257 on."""
    model = wave_model()
    with torch.no_grad():
        model.backbone.stages[-1].norm.weight.zero_()  # type: ignore[union-attr, index]
    model.save_pretrained(tmp_path / "m")
    TOKENIZER.save(tmp_path / "m" / "tokenizer.json")
    draw = lambda seed: torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    seed = next(seed for seed in range(3000) if draw(seed) > 256.1 / 257)
    assert line("--model", tmp_path / "m", "--label", "no", "--seed", seed, "--out", tmp_path / "o") == 0
    (row,) = table(tmp_path / "o")
    assert (row["samples"], row["finish"]) == ("0", "end")
    assert read_audio(tmp_path / "o" / row["path"]).tolist() == [0.0]


def test_options_that_do_not_fit_are_named(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        ((), "--out is missing"),
        (
            ("--out", tmp_path, "--prompt", "a"),
            "--prompt: for models of texts, but --model is one of waveforms",
        ),
        (("--out", tmp_path, "--label", "maybe"), "label is 'maybe', expected one of no, yes"),
        (("--out", tmp_path, "--number", 0), "--number is 0, expected 1 or more"),
        (("--out", tmp_path, "--max-seconds", 0), "--max-seconds is 0.0, expected more than 0"),
        (("--out", tmp_path, "--label", "no", "--label", "no"), "--label is given twice"),
    ):
        assert line("--model", saved, *options) == 1
        assert message in capsys.readouterr().err
    text = ssm_modal.create_model("mamba_lm", vocab_size=256, d_model=8, n_layers=1)
    text.save_pretrained(tmp_path / "text")
    ByteTokenizer().save(tmp_path / "text" / "tokenizer.json")
    assert line("--model", tmp_path / "text", "--prompt", "a", "--number", 2) == 1
    assert "--number: for models of waveforms, but --model is one of texts" in capsys.readouterr().err
    MuLawTokenizer(("no", "yes")).save(saved / "tokenizer.json")
    assert line("--model", saved, "--out", tmp_path / "o") == 1
    assert "knows no sample_rate" in capsys.readouterr().err
