"""What `ssm-modal explain` reads: files of every modality as a model's input, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssm_modal.attribution import Attribution
from ssm_modal.cli.image_inputs import ImageInput, image_input
from ssm_modal.cli.language_model import find_tokenizer
from ssm_modal.io.audio import audio_info, read_audio
from ssm_modal.io.cache import cache_folder
from ssm_modal.io.genome import open_genome
from ssm_modal.io.nucleotides import LetterError, text_of
from ssm_modal.io.regions import parse_region
from ssm_modal.io.text import read_text
from ssm_modal.models import CausalLM, Model, SequenceClassifier, VisionMambaConfig
from ssm_modal.plots import draw_image_relevance, draw_tokens, draw_waveform_relevance, token_lines
from ssm_modal.tokenizers import ByteTokenizer, DNATokenizer, MuLawTokenizer, TextTokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

_SHOWN = {"\n": "↵", "\t": "⇥", "\r": "↤"}


def _as_it_is(found: Attribution) -> Attribution:
    return found


@dataclass(frozen=True)
class Explained:
    """An input of a model with a batch of one.

    draw: relevance into a figure of `size` (width, height) inches. labels: of each position, for the table.
    classes: what the logits are of. arrange: an attribution of the model's input to the order of what is
    drawn.
    """

    inputs: Tensor
    draw: Callable[[Figure | SubFigure, Tensor], None]
    size: tuple[float, float]
    labels: Sequence[str] | None = None
    classes: Sequence[str] = ()
    arrange: Callable[[Attribution], Attribution] = _as_it_is


def read_input(
    model: Model,
    data: Mapping[str, Any],
    place: str,
    *,
    file: Path | None,
    text: str | None,
    region: str | None,
    tokenizer: str | None,
    sample_rate: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Explained:
    """What the options mean as an input of `model`, whose checkpoint at `place` holds `data`.

    Raises ValueError for an option that the kind of input has no use for or that is missing, and what the
    readers raise for bad files.
    """
    # Classes that a language model's recordings have are not what it predicts.
    classes = () if isinstance(model, CausalLM) else tuple(data.get("classes", ()))
    if isinstance(model.config, VisionMambaConfig) or data.get("layout") == "pixels":
        _refuse("images", text=text, region=region, tokenizer=tokenizer, sample_rate=sample_rate)
        assert file is not None  # the command asks for either
        return _image(image_input(model, Path(place), mean, std), file, classes)
    _refuse("no images", mean=mean, std=std)
    kind = model.config.input.type if isinstance(model, SequenceClassifier) else "ids"
    mu_law = kind == "ids" and data.get("input") == "mu_law"
    if kind in ("waveform", "strided_waveform") or mu_law:
        _refuse("audio", region=region, tokenizer=tokenizer, text=text)
        assert file is not None  # the command asks for either
        return _audio(file, sample_rate or data.get("sample_rate"), mu_law, classes)
    if kind != "ids":
        raise ValueError(f"--model takes {kind!r}, expected a model of ids or waveforms")
    known = find_tokenizer(place, tokenizer)
    if isinstance(known, DNATokenizer):
        _refuse("DNA", sample_rate=sample_rate)
        return _dna(known, file, text, region, classes or _vocabulary(model, known))
    if isinstance(known, MuLawTokenizer):
        _refuse("audio", region=region, text=text)
        assert file is not None  # the command asks for either
        return _audio(file, sample_rate or known.sample_rate, True, classes)
    _refuse("text", sample_rate=sample_rate, region=region)
    shown = text if file is None else read_text(file)
    assert shown is not None
    ids = known.encode_ids(shown)
    labels = [_label(known, token) for token in ids.tolist()]
    return _tokens(ids, labels, 0, classes or _vocabulary(model, known))


def _refuse(kind: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is {value!r}, but the model reads {kind}: leave it out"
            )


def _audio(file: Path, sample_rate: int | None, mu_law: bool, classes: Sequence[str]) -> Explained:
    if sample_rate is None:
        rate = audio_info(file).sample_rate
        raise ValueError(
            f"the sample rate of the model is not kept with it; give it with --sample-rate ({file.name} has "
            f"{rate} Hz)"
        )
    wave = read_audio(file, sample_rate=sample_rate, resample=True, mono=True)
    return Explained(
        (MuLawTokenizer().encode(wave) if mu_law else wave).unsqueeze(0),
        lambda panel, relevance: draw_waveform_relevance(panel, wave, relevance, sample_rate),
        (9.0, 4.5),
        classes=classes,
    )


def _image(about: ImageInput, file: Path, classes: Sequence[str]) -> Explained:
    image = about.read(file)
    shown = about.preprocessing.undo(image)

    def arrange(found: Attribution) -> Attribution:
        if about.layout == "images":
            return found
        return replace(
            found,
            relevance=about.grid(found.relevance),
            forwards=None if found.forwards is None else about.grid(found.forwards),
            backwards=None if found.backwards is None else about.grid(found.backwards),
        )

    return Explained(
        about.batch([image]),
        lambda panel, relevance: draw_image_relevance(panel, shown, relevance),
        (8.0, 4.0),
        classes=classes,
        arrange=arrange,
    )


def _dna(
    tokenizer: DNATokenizer, file: Path | None, text: str | None, region: str | None, classes: Sequence[str]
) -> Explained:
    start = 0
    if file is None:
        _refuse("the bases given by --text", region=region)
        assert text is not None
        try:
            ids = tokenizer.encode_ids(text)
        except LetterError as error:
            raise ValueError(f"--text: {error}") from None
    else:
        genome = open_genome([file], cache_folder("genomes"))
        if region is not None:
            place = parse_region(region)
            letters = genome.fetch(place)
            if place.strand == "+":
                start = place.start
        elif len(genome.records) == 1:
            letters = genome.read(0)
        else:
            names = ", ".join(record.name for record in genome.records[:5])
            raise ValueError(
                f"{file} holds {len(genome.records)} records ({names}, ...); name one, or a part of it, with "
                "--region"
            )
        ids = tokenizer.encode_ids(text_of(letters))
        start += 1  # as regions are counted
    labels = [tokenizer.decode([token]) or "-" for token in ids.tolist()]
    return _tokens(ids, labels, start, classes)


def _tokens(ids: Tensor, labels: list[str], start: int, classes: Sequence[str]) -> Explained:
    if ids.numel() == 0:
        raise ValueError("the input is empty, expected at least one token")
    return Explained(
        ids.to(torch.int64).unsqueeze(0),
        lambda panel, relevance: draw_tokens(panel, labels, relevance, start=start),
        (10.0, max(2.0, 0.22 * token_lines(labels))),
        labels,
        classes,
    )


def _label(tokenizer: TextTokenizer, token: int) -> str:
    """One token to be read: bytes that are no letter as hexadecimal numbers, line ends and tabs as arrows."""
    if isinstance(tokenizer, ByteTokenizer) and 128 <= token < 256:
        return f"<{token:02x}>"
    text = tokenizer.decode([token])
    shown = "".join(_SHOWN.get(c, c if c.isprintable() else f"<{ord(c):02x}>") for c in text)
    return shown or f"<{token}>"


def _vocabulary(model: Model, tokenizer: TextTokenizer) -> Sequence[str]:
    """The tokens' own names where it is tokens that a model predicts."""
    if isinstance(model, SequenceClassifier):
        return ()
    return [_label(tokenizer, token) for token in range(tokenizer.vocab_size)]
