"""Images by the command line: from a folder to a trained classifier, pictures, predictions and features."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")

from safetensors import safe_open

import ssm_modal
from ssm_modal.cli.main import main
from ssm_modal.datamodules.images import ImageDataModule
from ssm_modal.tasks import Classification
from tests.datamodules.made_images import write_folder, write_mnist

SMALL = {
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 30,
    "trainer.val_check_interval": 15,
    "trainer.enable_progress_bar": "false",
    "checkpoint.every_n_steps": 15,
    "model.overrides.img_size": 16,
    "model.overrides.d_model": 16,
    "model.overrides.n_layers": 1,
    "model.overrides.d_state": 4,
    "model.schedule.warmup_steps": 2,
    "model.optimizer.lr": 0.01,
    "data.image_size": 16,
    "data.batch_size": 8,
    "data.val_fraction": 0.2,
    "data.test_fraction": 0.2,
}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(*args: object, **options: object) -> int:
    return main([*map(str, args), *(f"--{key.replace('__', '.')}={value}" for key, value in options.items())])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run over red cats and blue dogs, one of them broken."""
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "images", ("cat", "dog"), each=15)
    (root / "images" / "cat" / "bad.jpg").write_text("no image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["ssm-modal"])
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.chdir(root)
        args = [f"--{key}={value}" for key, value in SMALL.items()]
        assert (
            run("fit", "--config", "vision/image_folder.yaml", *args, "--skip-bad", run_dir=root / "run") == 0
        )
    return root


def test_a_folder_of_images_becomes_a_classifier_with_tables_and_pictures(trained: Path) -> None:
    out = trained / "run"
    assert [row["reason"][:25] for row in table(out / "left_out.csv")] == ["cannot be read as an imag"]
    assert json.loads((out / "results" / "test.json").read_text())["test/accuracy"] == 1.0
    confusion = table(out / "confusion.csv")
    assert [(row["label"], row["cat"], row["dog"]) for row in confusion] == [
        ("cat", "3", "0"),
        ("dog", "0", "3"),
    ]
    for picture in ("confusion.png", "examples.png", "relevance.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_predictions_of_a_folder_name_classes_and_probabilities(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    write_folder(tmp_path / "new", ("dog", "cat"), each=1)  # "dog" is red here: a cat by its colour
    config = trained / "run" / "config.yaml"
    options = {"data__init_args__path": tmp_path / "new", "data__init_args__predict": "all"}
    assert run("predict", "--config", config, data__init_args__source="unlabelled", **options) == 0
    rows = table(trained / "run" / "results" / "predictions.csv")
    assert [Path(row["file"]).name for row in rows] == ["cat0.png", "dog0.png"]
    assert [row["predicted"] for row in rows] == ["dog", "cat"]
    assert [row["predicted_2"] for row in rows] == ["cat", "dog"]
    for row in rows:
        assert float(row["probability"]) + float(row["probability_2"]) == pytest.approx(1, abs=1e-5)
        assert float(row["probability"]) > 0.5


def test_features_are_what_the_head_sees(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.safetensors"
    images, model_path = trained / "images", trained / "run"
    assert run("features", "--model", model_path, "--images", images, "--out", out) == 1
    assert "bad.jpg: cannot be read as an image" in capsys.readouterr().err
    assert not out.exists()
    for wrong in (tmp_path, tmp_path / "x.npy"):
        assert run("features", "--model", model_path, "--images", images, "--out", wrong) == 1
        assert f"--out is '{wrong}', expected a file that ends in .safetensors" in capsys.readouterr().err
    assert run("features", "--model", model_path, "--images", images, "--out", out, "--skip-bad") == 0
    assert [row["path"][-7:] for row in table(tmp_path / "x.safetensors.left_out.csv")] == ["bad.jpg"]
    with safe_open(out, "pt") as file:
        features, files = file.get_tensor("features"), json.loads(file.metadata()["files"])
    assert features.shape == (30, 16)
    model: Any = ssm_modal.load_pretrained(model_path)
    data = ImageDataModule(str(images), image_size=16, source="unlabelled", predict="all", skip_bad=True)
    assert data.predicted_files() == files
    whole = torch.cat([batch["images"] for batch in data.predict_dataloader()])
    with torch.no_grad():
        torch.testing.assert_close(model.head(features), model(whole))
    # A saved model does not know how its images were normalised.
    model.save_pretrained(tmp_path / "saved")
    args = (
        "features",
        "--model",
        tmp_path / "saved",
        "--images",
        images / "dog",
        "--out",
        tmp_path / "y.safetensors",
    )
    assert run(*args) == 1
    assert "give --mean and --std" in capsys.readouterr().err
    assert run(*args, "--mean", 0.485, 0.456, 0.406, "--std", 0.229, 0.224, 0.225) == 0
    with safe_open(tmp_path / "y.safetensors", "pt") as file:
        torch.testing.assert_close(file.get_tensor("features"), features[15:])


def test_pixels_to_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ssm-modal"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("SSM_MODAL_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    made = write_mnist(tmp_path / "vision" / "mnist", train=14, test=4)
    small = {key: value for key, value in SMALL.items() if "img_size" not in key and "fraction" not in key}
    small |= {
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "data.image_size": 28,
        "data.batch_size": 2,
    }
    small |= {
        "data.val_images": 4,
        "data.num_workers": 0,
        "trainer.precision": "32-true",
        "model.plots": "false",
    }
    small |= {"model.schedule.warmup_steps": 0, "data.pin_memory": "false", "data.eval_batch_size": 4}
    args = [f"--{key}={value}" for key, value in small.items()]
    assert run("fit", "--config", "vision/psmnist.yaml", *args, run_dir="run") == 0
    from PIL import Image

    Image.fromarray(made["t10k"][2].numpy()).save(tmp_path / "two.png")
    assert run("features", "--model", "run", "--images", tmp_path / "two.png", "--out", "z.safetensors") == 0
    model: Any = ssm_modal.load_pretrained("run")
    data = ImageDataModule(
        source="mnist", image_size=28, channels=1, layout="pixels", permutation_seed=92916, val_images=4
    )
    pixels = data.batches("test").make_evaluation(0, 0, 1)["pixels"][2:3]
    with torch.no_grad(), safe_open("z.safetensors", "pt") as file:
        torch.testing.assert_close(model.head.proj(file.get_tensor("features")), model(pixels)[0])


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (
            {"in_chans": 3},
            {},
            "gives images of 1 channels, but the model was built for 3; set data.init_args.channels",
        ),
        ({"img_size": 32}, {}, "gives images of 28 x 28 pixels, but the model was built for 32 x 32"),
        ({}, {"layout": "pixels"}, "the data gives 'pixels', but the model takes 'images'"),
        ({}, {}, None),
        ({"dynamic_img_size": True, "img_size": 32}, {}, None),
    ],
)
def test_a_model_that_was_built_for_other_images(
    tmp_path: Path, overrides: dict[str, Any], options: dict[str, Any], message: str | None
) -> None:
    write_mnist(tmp_path)
    task = Classification("vim_mini", {"d_model": 8, "n_layers": 1, **overrides})
    data = ImageDataModule(str(tmp_path), source="mnist", image_size=28, channels=1, val_images=2, **options)
    if message is None:
        task.check_data(data)
        return
    with pytest.raises(ValueError, match=message):
        task.check_data(data)


def test_a_model_of_pixels_takes_pixels_of_its_colours(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    task = Classification("pixels_classifier", {"d_model": 8, "n_layers": 1, "input.channels": 3})
    given: dict[str, Any] = {"source": "mnist", "image_size": 28, "channels": 1, "val_images": 2}
    with pytest.raises(ValueError, match="gives images of 1 channels, but the model was built for 3"):
        task.check_data(ImageDataModule(str(tmp_path), layout="pixels", **given))
    with pytest.raises(ValueError, match="the data gives 'images', but the model takes 'pixels'"):
        task.check_data(ImageDataModule(str(tmp_path), **given))
    with pytest.raises(ValueError, match="the data gives 'images', but the model takes 'strided_waveform'"):
        Classification("audio_classifier", {"n_classes": 10}).check_data(
            ImageDataModule(str(tmp_path), **given)
        )
    with pytest.raises(ValueError, match=r"x has shape \(2, 9, 1\), expected \(batch, length, 3\)"):
        task.model(torch.zeros(2, 9, 1))
    with pytest.raises(TypeError, match=r"VectorsInput: x has dtype torch\.int64, expected a floating one"):
        task.model(torch.zeros(2, 9, 3, dtype=torch.int64))
