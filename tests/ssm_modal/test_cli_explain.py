"""`ssm-modal explain` on saved models and checkpoints: arrays, tables and pictures of text, audio and DNA."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ssm_modal
from ssm_modal.cli import explain_inputs
from ssm_modal.cli.main import main
from ssm_modal.tokenizers import NucleotideTokenizer

pytest.importorskip("matplotlib")


def saved(folder: Path, name: str = "ids_classifier", **overrides: Any) -> Path:
    torch.manual_seed(0)
    small = {"d_model": 8, "n_layers": 2, "d_state": 4, **overrides}
    ssm_modal.create_model(name, **small).save_pretrained(folder)
    return folder


def checkpoint(file: Path, name: str, state: dict[str, Any], module: str, **overrides: Any) -> Path:
    """What a training run leaves, with the state of its data module."""
    torch.manual_seed(0)
    model = ssm_modal.create_model(name, **{"d_model": 8, "n_layers": 2, "d_state": 4, **overrides})
    content = {
        "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
        "hyper_parameters": {"model_config": model.config.to_dict()},  # type: ignore[union-attr, operator]
        module: state,
    }
    torch.save(content, file)
    return file


def explain(out: Path, *options: object) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    assert main(["explain", "--device", "cpu", "--out", str(out), *map(str, options)]) == 0
    assert (out / "attribution.png").read_bytes().startswith(b"\x89PNG")
    with (out / "attribution.csv").open(encoding="utf-8") as file:
        return load_file(out / "attribution.safetensors"), list(csv.DictReader(file))


def test_text_by_both_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "model")
    text = "a $ b\n½"
    options = ["--model", model, "--text", text, "--tokenizer", "byte"]
    arrays, rows = explain(tmp_path / "one", *options, "--target", "1")
    assert [row["label"] for row in rows] == ["a", " ", "$", " ", "b", "↵", "<c2>", "<bd>"]
    assert [float(row["relevance"]) for row in rows] == pytest.approx(
        arrays["relevance"][0].tolist(), rel=1e-6
    )
    ids = torch.tensor([list(text.encode())])
    right = ssm_modal.attribute(ssm_modal.load_pretrained(model), ids, 1)
    torch.testing.assert_close(arrays["relevance"], right.relevance)
    assert "gradient x input" in capsys.readouterr().out
    hidden = ["--method", "hidden_attention", "--layer", "0", "--position", "3"]
    arrays, rows = explain(tmp_path / "two", *options, *hidden)
    assert "hidden attention of step 3, layer 0" in capsys.readouterr().out
    right = ssm_modal.attribute(
        ssm_modal.load_pretrained(model), ids, method="hidden_attention", layer=0, position=3
    )
    torch.testing.assert_close(arrays["relevance"], right.relevance)
    assert set(rows[0]) == {"position", "label", "relevance", "forwards", "backwards"}


def test_a_recording_at_the_rate_and_with_the_classes_of_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("soundfile")
    from ssm_modal.io.wav import write_wav

    state = {"classes": ["no", "yes"], "sample_rate": 4000, "input": "waveform"}
    model = checkpoint(tmp_path / "run.ckpt", "audio_classifier", state, "AudioDataModule", n_classes=2)
    write_wav(tmp_path / "a.wav", torch.rand(400) - 0.5, 4000)
    options = ["--model", model, "--input", tmp_path / "a.wav"]
    arrays, rows = explain(tmp_path / "out", *options, "--target", "yes")
    assert arrays["relevance"].shape == (1, 400)
    assert arrays["target"].tolist() == [1]
    assert "yes" in capsys.readouterr().out
    # Steps of the layers stand at every 16th sample.
    _, rows = explain(tmp_path / "hidden", *options, "--method", "hidden_attention", "--layer", "mean")
    assert [row["position"] for row in rows][:3] == ["0", "16", "32"]
    assert len(rows) == 25
    assert main(["explain", "--model", str(model), "--text", "a", "--out", str(tmp_path / "no")]) == 1
    assert "--text is 'a', but the model reads audio: leave it out" in capsys.readouterr().err
    folder = saved(tmp_path / "model", "audio_classifier")
    wav = str(tmp_path / "a.wav")
    assert main(["explain", "--model", str(folder), "--input", wav, "--out", str(tmp_path / "no")]) == 1
    assert "give it with --sample-rate (a.wav has 4000 Hz)" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_region_of_a_genome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("Bio")
    monkeypatch.setenv("SSM_MODAL_CACHE", str(tmp_path / "cache"))
    state = {"classes": ["0", "1"], "tokenizer": json.dumps(NucleotideTokenizer().to_config())}
    model = checkpoint(
        tmp_path / "run.ckpt", "ids_classifier", state, "DNAClassificationDataModule", vocab_size=9
    )
    (tmp_path / "g.fa").write_text(">one\nACGTACGT\n>two\nTTTTCCAAGG\n")
    options = ["--model", model, "--input", tmp_path / "g.fa"]
    arrays, rows = explain(tmp_path / "out", *options, "--region", "two:4-8")
    assert [row["label"] for row in rows] == list("TCCAA")
    assert arrays["relevance"].shape == (1, 5)
    starts: list[int] = []
    monkeypatch.setattr(explain_inputs, "draw_tokens", lambda *_, start: starts.append(start), raising=True)
    for region in ("two:4-8", "two", "two:4-8(-)"):
        explain(tmp_path / "drawn", *options, "--region", region)
    assert starts == [4, 1, 1], "bases are counted from 1, as in --region"
    assert main(["explain", *map(str, options), "--out", str(tmp_path / "no")]) == 1
    assert "holds 2 records (one, two, ...); name one" in capsys.readouterr().err
    assert main(["explain", "--model", str(model), "--text", "ACX", "--out", str(tmp_path / "no")]) == 1
    assert "--text: letter 'X' at base 3 is no nucleotide" in capsys.readouterr().err
    lm = saved(tmp_path / "lm", "dna_lm")
    NucleotideTokenizer().save(lm / "tokenizer.json")
    capsys.readouterr()
    explain(tmp_path / "next", "--model", lm, "--text", "ACGT", "--target", "G")
    assert "G (" in capsys.readouterr().out
    _, rows = explain(tmp_path / "bases", "--model", model, "--text", "acgtn")
    assert [row["label"] for row in rows] == list("ACGTN")


def test_what_a_language_model_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "model", "mamba_lm")
    options = ["--model", model, "--text", "abcdef", "--tokenizer", "byte", "--target", "z"]
    arrays, rows = explain(tmp_path / "out", *options, "--position", "2")
    assert arrays["target"].tolist() == [ord("z")]
    assert [float(row["relevance"]) != 0 for row in rows] == [True] * 3 + [False] * 3
    assert "explained: z" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "either --input FILE or --text TEXT"),
        (("--text", "a", "--input", "b"), "either --input FILE or --text TEXT"),
        (("--text", "a", "--target", "cat"), "--target is 'cat', expected a class or its number"),
        (("--text", "a", "--layer", "top"), "--layer is 'top', expected a number or \"mean\""),
        (("--text", "a", "--region", "x:1-2"), "--region is 'x:1-2', but the model reads text"),
        (("--text", ""), "the input is empty"),
    ],
)
def test_what_does_not_fit_is_named(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path / "model")
    command = ["explain", "--model", str(model), "--tokenizer", "byte", "--out", str(tmp_path / "out")]
    assert main([*command, *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["images", "pixels"])
def test_an_image_as_its_run_prepared_it(layout: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from PIL import Image

    state = {
        "classes": ["a", "b"],
        "image_size": [4, 6],
        "channels": 1,
        "mean": [0.5],
        "std": [0.25],
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "layout": layout,
        "permutation_seed": 3 if layout == "pixels" else None,
    }
    own = {"img_size": [4, 6], "patch_size": 2} if layout == "images" else {}
    name = "vim_mini" if layout == "images" else "pixels_classifier"
    model = checkpoint(tmp_path / "run.ckpt", name, state, "ImageDataModule", n_classes=2, **own)
    pixels = torch.arange(24, dtype=torch.uint8).view(4, 6) * 10
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    options = ["--model", model, "--input", tmp_path / "a.png"]
    arrays, rows = explain(tmp_path / "out", *options, "--target", "b")
    assert arrays["relevance"].shape == (1, 4, 6)
    assert (rows[-1]["row"], rows[-1]["column"]) == ("3", "5")
    given = ((pixels.float() / 255 - 0.5) / 0.25)[None]
    loaded = ssm_modal.load_pretrained(model)
    if layout == "images":
        right = ssm_modal.attribute(loaded, given[None], 1).relevance
    else:
        order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
        right = torch.zeros(1, 24)
        right[:, order] = ssm_modal.attribute(loaded, given.flatten()[order].view(1, 24, 1), 1).relevance
        right = right.view(1, 4, 6)
    torch.testing.assert_close(arrays["relevance"], right, rtol=1e-4, atol=1e-6)
    arrays, rows = explain(tmp_path / "hidden", *options, "--method", "hidden_attention")
    assert arrays["relevance"].shape == ((1, 2, 3) if layout == "images" else (1, 4, 6))
