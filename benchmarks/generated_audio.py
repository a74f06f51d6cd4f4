"""`python -m benchmarks.generated_audio`: what generated recordings are worth, beside real ones.

Two figures and a picture of a folder that `ssm-modal generate` wrote:

recognised    the share that a trained classifier takes for the class they were generated as.
too close     the share nearer to a training recording than the closest 1 % of the real test recordings are:
              a model that repeats what it was trained on has a large one.

Distance of two recordings: the root mean square difference of their log-mel spectrograms (`log_mel`: natural
logarithm of the power in 40 bands, windows of 32 ms every 10 ms), each brought to 32 frames by linear
interpolation along time. All go through the mu-law ids and back first, as the generated ones have.
The threshold is the k-th smallest distance of a test recording to its nearest training recording, k being 1 %
of their number, rounded down, at least 1.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import ssm_modal
from ssm_modal.checkpoints.locate import stored_data
from ssm_modal.cli.generate_audio import COLUMNS, TABLE
from ssm_modal.datamodules.audio import AudioDataModule
from ssm_modal.io.atomic import atomic_write
from ssm_modal.io.audio import audio_info, read_audio
from ssm_modal.io.log_mel import log_mel
from ssm_modal.models import SequenceClassifier
from ssm_modal.plots.figure import new_figure, png
from ssm_modal.plots.waveform import draw_waveform
from ssm_modal.tokenizers import MuLawTokenizer

FRAMES = 32


@dataclass(frozen=True)
class Generated:
    """A generated recording: its path below the folder, the class asked for, (n,) float32 samples."""

    path: str
    label: str
    waveform: Tensor


@dataclass(frozen=True)
class Score:
    """predicted: the classifier's class; distance: to the nearest training recording, its path `nearest`."""

    generated: Generated
    predicted: str
    probability: float
    distance: float
    nearest: str


def read_generated(folder: Path) -> tuple[list[Generated], int]:
    """The recordings that the table in `folder` lists, and their sample rate."""
    file = folder / TABLE
    with file.open(newline="", encoding="utf-8") as text:
        rows = list(csv.DictReader(text))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise ValueError(f"{file} is no table of `ssm-modal generate`, expected {','.join(COLUMNS)} and rows")
    rates = {audio_info(folder / row["path"]).sample_rate for row in rows}
    if len(rates) != 1:
        raise ValueError(f"{folder} holds recordings of {sorted(rates)} frames a second, expected one rate")
    found = [Generated(r["path"], r["label"], read_audio(folder / r["path"])) for r in rows]
    return found, rates.pop()


def shape_of(waveform: Tensor, sample_rate: int) -> Tensor:
    """The log-mel spectrogram of the mu-law rounded samples at 32 frames: (40 * 32,) float32."""
    tokenizer = MuLawTokenizer()
    rounded = tokenizer.decode(tokenizer.encode(waveform))
    return F.interpolate(log_mel(rounded, sample_rate)[None], size=FRAMES, mode="linear")[0].flatten()


def nearest(shapes: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of each row of `shapes` to its nearest row of `to`, and which that is: (n,) each."""
    rows = [torch.cdist(part, to, compute_mode="donot_use_mm_for_euclid_dist") for part in shapes.split(64)]
    smallest = torch.cat(rows).min(dim=1)
    return smallest.values / shapes.shape[1] ** 0.5, smallest.indices


def closeness_threshold(distances: Tensor, share: float = 0.01) -> float:
    """The k-th smallest of the test recordings' `distances`, k = floor(share * n), at least 1."""
    k = max(1, int(share * distances.numel()))
    return float(distances.kthvalue(k).values)


@torch.no_grad()
def classify(
    model: SequenceClassifier, waveforms: Sequence[Tensor], classes: Sequence[str]
) -> list[tuple[str, float]]:
    """The likeliest class of each recording, and its probability."""
    device = next(model.parameters()).device
    out = []
    for waveform in waveforms:
        probabilities = model(waveform[None].to(device))[0].softmax(-1)[0]
        best = int(probabilities.argmax())
        out.append((classes[best], float(probabilities[best])))
    return out


def score(
    generated: Sequence[Generated],
    sample_rate: int,
    data: AudioDataModule,
    model: SequenceClassifier,
) -> tuple[list[Score], dict[str, float]]:
    """Every recording's score and the figures, by name."""
    if model.config.n_classes != len(data.classes):
        raise ValueError(
            f"the classifier has {model.config.n_classes} classes, but the recordings {len(data.classes)}"
        )
    train, test = data.clips("train"), data.clips("test")
    if not train or not test:
        raise ValueError(
            f"{data.path} has {len(train)} training and {len(test)} test recordings, expected some"
        )

    def shapes(waveforms: Iterable[Tensor]) -> Tensor:
        return torch.stack([shape_of(waveform, sample_rate) for waveform in waveforms])

    known = shapes(clip.read() for clip in train)
    real, _ = nearest(shapes(clip.read() for clip in test), known)
    distances, places = nearest(shapes(g.waveform for g in generated), known)
    threshold = closeness_threshold(real)
    said = classify(model, [g.waveform for g in generated], data.classes)
    scores = [
        Score(g, name, probability, float(d), str(train[int(at)].recording.path))
        for g, (name, probability), d, at in zip(generated, said, distances, places)
    ]
    real_said = classify(model, [clip.read() for clip in test], data.classes)
    right = [name == clip.recording.label for (name, _), clip in zip(real_said, test)]
    figures = {
        "generated": float(len(scores)),
        "recognised": sum(s.predicted == s.generated.label for s in scores) / len(scores),
        "recognised_of_real_test": sum(right) / len(right),
        "threshold": threshold,
        "too_close": float((distances < threshold).double().mean()),
        "distance_median": float(distances.median()),
        "distance_median_of_real_test": float(real.median()),
    }
    for label in dict.fromkeys(g.label for g in generated):
        own = [s for s in scores if s.generated.label == label]
        figures[f"recognised_{label}"] = sum(s.predicted == label for s in own) / len(own)
    return scores, figures


def write_scores(folder: Path, scores: Sequence[Score], figures: dict[str, float]) -> list[Path]:
    """scores.csv, a row a recording, and figures.csv."""
    rows = [
        (
            s.generated.path,
            s.generated.label,
            s.predicted,
            f"{s.probability:.4f}",
            f"{s.distance:.5f}",
            s.nearest,
        )
        for s in scores
    ]
    header = ("path", "label", "predicted", "probability", "distance", "nearest")
    written = []
    for name, table in (
        ("scores.csv", [header, *rows]),
        ("figures.csv", [("figure", "value"), *((k, f"{v:.6g}") for k, v in figures.items())]),
    ):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table)
        written.append(atomic_write(folder / name, text.getvalue()))
    return written


def draw(file: Path, generated: Sequence[Generated], data: AudioDataModule, sample_rate: int) -> Path:
    """The first generated recording of each of ten labels beside the first real test one."""
    labels = list(dict.fromkeys(g.label for g in generated))[:10]
    figure = new_figure(11, 2.4 * len(labels))
    for row, label in zip(figure.subfigures(len(labels), 2, squeeze=False), labels):
        ours = next(g.waveform for g in generated if g.label == label)
        real = next((c.read() for c in data.clips("test") if label in ("", c.recording.label)), None)
        for panel, (kind, waveform) in zip(row, (("generated", ours), ("real", real))):
            if waveform is not None:
                draw_waveform(panel, waveform, sample_rate)
                panel.suptitle(f"{label} {kind}".strip(), fontsize=9)
    return atomic_write(file, png(figure, dpi=100))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generated_audio", description="Score a folder of generated recordings."
    )
    add = parser.add_argument
    add("--generated", type=Path, required=True, help="a folder that `ssm-modal generate --out` wrote")
    add("--classifier", required=True, help="a trained classifier: a run's folder or a .ckpt")
    add("--source", default="free_spoken_digits", help="as of AudioDataModule (default: %(default)s)")
    add("--path", help="the real recordings; default: where the preset stands below $SSM_MODAL_DATA")
    add("--out", type=Path, help="where scores.csv, figures.csv, examples.png go; default: --generated")
    add("--device", default="cpu", help="where the classifier runs (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        return run(arguments)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace) -> int:
    """Score what the options name. Raises ValueError or OSError for what does not fit or is not there."""
    model = ssm_modal.load_pretrained(arguments.classifier, device=arguments.device)
    if not isinstance(model, SequenceClassifier):
        raise ValueError(f"--classifier is a {type(model).__name__}, expected a SequenceClassifier")
    generated, sample_rate = read_generated(arguments.generated)
    data = AudioDataModule(arguments.path, arguments.source, sample_rate=sample_rate)
    trained_on = {"sample_rate": sample_rate, "classes": list(data.classes)}
    for name, kept in stored_data(arguments.classifier).items():
        if name in trained_on and kept != trained_on[name]:
            raise ValueError(
                f"--classifier was trained with {name} {kept}, but the recordings have {trained_on[name]}"
            )
    scores, figures = score(generated, sample_rate, data, model)
    out = arguments.out or arguments.generated
    written = write_scores(out, scores, figures)
    written.append(draw(out / "examples.png", generated, data, sample_rate))
    for name, value in figures.items():
        print(f"{name:<32}{value:.6g}")
    print(f"written: {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
