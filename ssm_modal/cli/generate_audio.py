"""`ssm-modal generate` of a model of waveforms: WAV files, each whole, and a table of them."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from ssm_modal.generation import GenerationConfig
from ssm_modal.generation.waveforms import GeneratedWaveform, generate_waveforms
from ssm_modal.io.atomic import atomic_write
from ssm_modal.io.text import output_folder
from ssm_modal.io.wav import write_wav
from ssm_modal.models import CausalLM
from ssm_modal.tokenizers import MuLawTokenizer

TABLE = "generated.csv"
SETTINGS = "generated.json"
COLUMNS = ("path", "label", "seed", "samples", "finish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of models of waveforms; their default is None, so that a given one is known."""
    group = parser.add_argument_group("a model of waveforms (it writes WAV files)")
    add = group.add_argument
    add("--out", metavar="FOLDER", help="where the files go: LABEL/LABEL_0000.wav, ..., generated.csv")
    add("--label", action="append", metavar="NAME", help="a class; again for more; default: every class")
    add("--number", type=int, metavar="N", help="recordings of each label (1)")
    add("--max-seconds", type=float, metavar="S", help="where a recording without an end is cut (5)")
    add("--batch-size", type=int, metavar="N", help="recordings made at once (256)")


@dataclass(frozen=True)
class Job:
    """The recordings asked for: of each label, `number`; recording i of all draws from seed + i."""

    labels: tuple[str | None, ...]
    number: int
    max_seconds: float
    batch_size: int

    @classmethod
    def read(cls, args: argparse.Namespace, tokenizer: MuLawTokenizer) -> Job:
        """From the options; ValueError for one that does not fit."""
        labels: tuple[str | None, ...] = tuple(args.label or ()) or tokenizer.classes or (None,)
        if len(set(labels)) != len(labels):
            raise ValueError(f"--label is given twice for one class: {', '.join(map(str, labels))}")
        for label in labels:
            tokenizer.begin_id_of(label)
        number = 1 if args.number is None else args.number
        seconds = 5.0 if args.max_seconds is None else args.max_seconds
        batch = 256 if args.batch_size is None else args.batch_size
        for name, value in (("--number", number), ("--batch-size", batch)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        if not 0 < seconds < float("inf"):
            raise ValueError(f"--max-seconds is {seconds}, expected more than 0")
        return cls(labels, number, seconds, batch)

    def rows(self) -> list[tuple[str | None, str]]:
        """Label and path below the folder of each recording, in their order."""
        out: list[tuple[str | None, str]] = []
        for label in self.labels:
            name = None if label is None else quote(label, safe=" ()'+,=@").replace(".", "%2E")
            for i in range(self.number):
                out.append((label, f"{i:04d}.wav" if name is None else f"{name}/{name}_{i:04d}.wav"))
        return out


def run(
    args: argparse.Namespace, model: CausalLM, tokenizer: MuLawTokenizer, config: GenerationConfig
) -> int:
    """Write what the options ask for; goes on where an earlier run with the same options stopped."""
    if args.out is None:
        raise ValueError("--out is missing, expected the folder that the WAV files go to")
    if tokenizer.sample_rate is None:
        raise ValueError("the tokenizer of the model knows no sample_rate, expected one for WAV files")
    job = Job.read(args, tokenizer)
    most = max(1, round(job.max_seconds * tokenizer.sample_rate))
    folder = output_folder(args.out)
    settings = {
        "weights": _fingerprint(model),
        "labels": list(job.labels),
        "number": job.number,
        "max_samples": most,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "min_p": config.min_p,
        "repetition_penalty": config.repetition_penalty,
        "seed": config.seed,
    }
    seed = _agree(folder, settings)
    rows, done = job.rows(), _read_table(folder / TABLE)
    started, made, before = time.monotonic(), 0, len(done)
    for first in range(0, len(rows), job.batch_size):
        batch = rows[first : first + job.batch_size]
        if all(path in done and (folder / path).is_file() for _, path in batch):
            continue
        own = replace(config, seed=seed + first, max_new_tokens=most)
        waves = generate_waveforms(model, tokenizer, [label for label, _ in batch], own)
        for i, ((label, path), one) in enumerate(zip(batch, waves)):
            _write(folder / path, one, tokenizer.sample_rate)
            length = one.waveform.shape[0]
            done[path] = [path, label or "", str(seed + first + i), str(length), one.finish]
        made += len(batch)
        _write_table(folder / TABLE, [done[path] for _, path in rows if path in done])
        print(f"{first + len(batch)} of {len(rows)} recordings", file=sys.stderr)
    wall = time.monotonic() - started
    cut = sum(done[path][4] == "length" for _, path in rows)
    print(
        f"{len(rows)} recordings in {folder} ({made} made now in {wall:.0f} s, {min(before, len(rows))} were "
        f"there), {cut} without an end cut at {most} samples; seed {seed}"
    )
    return 0


def _write(path: Path, one: GeneratedWaveform, sample_rate: int) -> None:
    # A recording that ends before its first sample is one sample of silence: no reader takes a file of none.
    waveform = one.waveform if one.waveform.shape[0] else torch.zeros(1)
    write_wav(path, waveform, sample_rate)


def _agree(folder: Path, settings: dict[str, Any]) -> int:
    """The seed of the job; ValueError where `folder` holds one of other settings."""
    file = folder / SETTINGS
    if file.is_file():
        there = json.loads(file.read_text(encoding="utf-8"))
        if settings["seed"] is None:
            settings["seed"] = there.get("seed")
        wrong = [f"{k} was {there.get(k)!r} and is {v!r}" for k, v in settings.items() if there.get(k) != v]
        if wrong:
            raise ValueError(
                f"--out {folder} holds recordings made with other settings ({'; '.join(wrong)}); give "
                "another folder, or the same settings to go on with them"
            )
    elif settings["seed"] is None:
        settings["seed"] = int(torch.randint(1 << 31, ()))
    atomic_write(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    return int(settings["seed"])


def _fingerprint(model: CausalLM) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_table(file: Path) -> dict[str, list[str]]:
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as text:
        rows = list(csv.reader(text))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise ValueError(f"{file} is no table of this command, expected the columns {','.join(COLUMNS)}")
    return {row[0]: row for row in rows[1:]}


def _write_table(file: Path, rows: list[list[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *rows])
    atomic_write(file, text.getvalue())
