"""Every shipped config is parsed against the real signatures, and dry-run for two steps on the CPU."""

from __future__ import annotations

import csv
import gzip
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ssm_modal
from ssm_modal.cli.configs import shipped_configs
from ssm_modal.cli.main import main
from ssm_modal.tokenizers import ByteTokenizer

CONFIGS = shipped_configs()

# Small enough for two steps on a CPU; everything else is the config's own.
SMALL = {
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.precision": "32-true",
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 2,
    "trainer.accumulate_grad_batches": 1,
    "trainer.limit_val_batches": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
    "test_after_fit": "false",
    "model.overrides.d_model": 16,
    "model.overrides.n_layers": 1,
    "model.schedule.warmup_steps": 0,
    "data.batch_size": 2,
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))


def test_there_are_configs_and_each_says_what_it_is_for() -> None:
    assert "text/bytes.yaml" in CONFIGS
    for name, config in CONFIGS.items():
        assert config.read_text(encoding="utf-8").startswith("# "), f"{name} starts with no comment"
        content = read(name)
        # Each has a folder of its own.
        assert content["run_dir"].startswith("runs/"), name
    folders = [read(name)["run_dir"] for name in CONFIGS]
    assert len(set(folders)) == len(folders)


def recordings(init: dict[str, Any], root: Path) -> None:
    """Short WAV files where an audio config looks for them: a class a folder, or named as spoken digits."""
    from ssm_modal.io.wav import write_wav

    generator = torch.Generator().manual_seed(0)
    if init["source"] == "free_spoken_digits":
        files = [
            (f"audio/fsdd/recordings/{digit}_ann_{index}.wav", 8000)
            for digit in range(10)
            for index in (0, 5, 10)
        ]
        if init.get("left_out_speaker") is not None:
            speaker = init["left_out_speaker"]
            files += [(f"audio/fsdd/recordings/{digit}_{speaker}_0.wav", 8000) for digit in range(10)]
    else:
        # Another rate in the second folder: the config resamples.
        files = [
            (f"{init['path']}/{label}/{i}.wav", rate)
            for label, rate in (("cat", 16000), ("dog", 8000))
            for i in range(10)
        ]
    for name, rate in files:
        write_wav(root / name, 0.1 * torch.randn(600, generator=generator), rate)


def made_images(init: dict[str, Any], root: Path) -> None:
    """Noise where a config of images looks for it: MNIST's files, or two classes of PNGs."""
    from tests.datamodules.made_images import write_folder, write_mnist

    if init["source"] == "mnist":
        write_mnist(root / "vision" / "mnist", train=14, test=4)
    else:
        write_folder(root / init["path"], ("cat", "dog"), each=10, size=(70, 50))


def genomes(init: dict[str, Any], root: Path) -> None:
    """One small record a file of those that a config leaves out, and of one that it does not."""
    folder = root / init["path"].removeprefix("$SSM_MODAL_DATA/")
    folder.mkdir(parents=True)
    for name in [*(pattern.strip("*") for pattern in init["left_out_files"]), "kept"]:
        letters = "".join(random.Random(name).choices("ACGT", k=400))
        (folder / f"{name}.fa").write_text(f">{name}\n{letters}\n")


def species(init: dict[str, Any], root: Path) -> None:
    """A small record for each species."""
    folder = root / init["path"].removeprefix("$SSM_MODAL_DATA/")
    folder.mkdir(parents=True)
    for name in init["classes"].values():
        letters = "".join(random.Random(name).choices("ACGT", k=400))
        with gzip.open(folder / name, "wt") as file:
            file.write(f">{name}\n{letters}\n")


def labelled_sequences(init: dict[str, Any], root: Path) -> None:
    """The three CSV files of a task of GUE."""
    folder = root / init["path"].removeprefix("$SSM_MODAL_DATA/")
    folder.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        rows = [f"{''.join(random.Random(i).choices('ACGT', k=30))},{i % 2}" for i in range(8)]
        (folder / f"{split}.csv").write_text("\n".join(["sequence,label", *rows]) + "\n")


def pretrained(name: str, root: Path) -> None:
    """A small model with its tokenizer where a config looks for a published one."""
    pytest.importorskip("peft")
    model = ssm_modal.create_model("mamba_lm", vocab_size=256, d_model=16, n_layers=1)
    model.save_pretrained(root / name)
    ByteTokenizer().save(root / name / "tokenizer.json")


@pytest.mark.parametrize("name", list(CONFIGS))
def test_dry_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("SSM_MODAL_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {**SMALL, "run_dir": tmp_path / "run"}
    content = read(name)
    if "pretrained" in content["model"]["init_args"]:
        pretrained(content["model"]["init_args"]["pretrained"], tmp_path)
        del options["model.overrides.d_model"], options["model.overrides.n_layers"]
    if content["data"]["class_path"].endswith("TextDataModule"):
        path = tmp_path / content["data"]["init_args"]["path"].removeprefix("$SSM_MODAL_DATA/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("It was the best of times, it was the worst of times, " * 200)
        options["data.cache_dir"] = tmp_path / "cache"
        if "segment" in content["model"]["init_args"]:  # a window longer than this text, by segments
            options |= {"data.length": 600, "model.segment": 250}
    if content["data"]["class_path"].endswith("ImageDataModule"):
        made_images(content["data"]["init_args"], tmp_path)
        options |= {"data.num_workers": 0, "data.pin_memory": "false", "data.eval_batch_size": 2}
        if content["data"]["init_args"]["source"] == "mnist":
            options["data.val_images"] = 4
    if content["data"]["class_path"].endswith("AudioDataModule"):
        del options["data.batch_size"]
        options |= {"data.batch_samples": 2000, "data.num_workers": 0}
        recordings(content["data"]["init_args"], tmp_path)
    if content["data"]["class_path"].endswith("DNADataModule"):
        genomes(content["data"]["init_args"], tmp_path)
        options |= {"data.length": 32, "data.length_schedule": "{16: 0, 32: 1}", "data.eval_length": 32}
        options |= {"data.num_workers": 0, "data.cache_dir": tmp_path / "cache"}
    if content["data"]["class_path"].endswith("SpeciesDataModule"):
        del options["data.batch_size"]
        options |= {"data.batch_tokens": 64, "data.num_workers": 0, "data.cache_dir": tmp_path / "cache"}
        options |= {f"data.{one}": "[16, 32]" for one in ("lengths", "test_lengths", "val_lengths")}
        species(content["data"]["init_args"], tmp_path)
    if content["data"]["class_path"].endswith("DNAClassificationDataModule"):
        del options["data.batch_size"]
        options["data.batch_tokens"] = 100
        labelled_sequences(content["data"]["init_args"], tmp_path)
    if content["model"]["init_args"].get("model") == "waveform_cnn":  # small as it is
        options = {k: v for k, v in options.items() if not k.startswith("model.overrides.")}
    args = [f"--{key}={value}" for key, value in options.items()]
    assert main(["fit", "--config", name, *args]) == 0, capsys.readouterr().err
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
    if "pretrained" in content["model"]["init_args"]:
        assert all("lora_" in key for key in saved["state_dict"])
        return
    config = ssm_modal.load_pretrained(tmp_path / "run").config
    if "model.overrides.d_model" in options:
        assert getattr(config, "backbone", config).d_model == 16


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("text/tinyshakespeare")])
def test_tinyshakespeare_models_have_at_most_10_7_million_parameters(name: str) -> None:
    init = read(name)["model"]["init_args"]
    with torch.device("meta"):
        model = ssm_modal.create_model(init["model"], **init["overrides"])
    size = sum(p.numel() for p in model.parameters())
    assert 10.4e6 < size <= 10.7e6


@pytest.mark.parametrize("name", [n for n in CONFIGS if "mnist" in n])
def test_mnist_models_have_at_most_a_million_parameters_and_nothing_spatial(name: str) -> None:
    content = read(name)
    init = content["model"]["init_args"]
    with torch.device("meta"):
        model = ssm_modal.create_model(init["model"], **init["overrides"])
    size = sum(p.numel() for p in model.parameters())
    assert 0.7e6 < size <= 1e6
    if "patches" not in name:
        assert content["data"]["init_args"]["layout"] == "pixels"
        assert (model.config.input.type, model.config.input.channels) == ("vectors", 1)
        assert ("permutation_seed" in content["data"]["init_args"]) == ("psmnist" in name)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("audio/")])
def test_audio_classifiers_have_at_most_500_thousand_parameters(name: str) -> None:
    init = read(name)["model"]["init_args"]
    with torch.device("meta"):
        model = ssm_modal.create_model(init["model"], **init["overrides"])
    assert sum(p.numel() for p in model.parameters()) <= 500_000


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith(("genomics/gue", "genomics/bacteria"))])
def test_genomic_models_have_at_most_two_or_ten_million_parameters(name: str) -> None:
    init = read(name)["model"]["init_args"]
    with torch.device("meta"):
        model = ssm_modal.create_model(init["model"], **init["overrides"])
    assert sum(p.numel() for p in model.parameters()) <= (2e6 if "/gue" in name else 10e6)
