"""What `score`, `mutate`, `embed` and `tracks` share: their options, and the model, tokenizer and genome."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssm_modal.checkpoints import load_pretrained
from ssm_modal.cli.language_model import DTYPES, find_device, find_tokenizer
from ssm_modal.genomics.log_probs import LogProbs
from ssm_modal.genomics.places import Place, place_of
from ssm_modal.genomics.streaming import StreamConfig
from ssm_modal.genomics.variant_scores import METHODS, STRANDS, VariantScorer
from ssm_modal.io.cache import cache_folder
from ssm_modal.io.genome import GENOME_SUFFIXES, Genome, open_genome
from ssm_modal.io.left_out import write_left_out
from ssm_modal.io.recordings import LeftOut
from ssm_modal.io.regions import parse_region
from ssm_modal.io.text import expand_path, text_files
from ssm_modal.models.base import Model
from ssm_modal.tokenizers.dna import DNATokenizer

_BATCH_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 19}
_SEGMENT = {"cpu": 1 << 14, "cuda": 1 << 17}


def add_model_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--model and how it is loaded."""
    add = parser.add_argument
    add(
        "--model",
        required=required,
        metavar="PATH",
        help="a saved model's folder, a run's folder, a .ckpt file or a Hugging Face repository (owner/name)",
    )
    add(
        "--tokenizer",
        metavar="NAME|PATH",
        help='"nucleotide" or a tokenizer.json; default: the one kept with the model',
    )
    add("--device", default="auto", help='"cpu", "cuda", "cuda:1", ...; "auto" takes the GPU if there is one')
    add("--dtype", choices=sorted(DTYPES), help="dtype of the weights; default: as they were saved")


def add_genome_options(parser: argparse.ArgumentParser) -> None:
    """--fasta, and what is done with bad input."""
    add = parser.add_argument
    add(
        "--fasta",
        required=True,
        action="append",
        metavar="FILE",
        help="FASTA or GenBank, plain, gzip or bgzip, or a folder of them; again for more",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="leave bad records and lines out and list them, with file, line and reason, in a .left_out.csv "
        "beside the output; default: stop at the first",
    )
    add(
        "--cache-dir",
        metavar="DIR",
        help="where parsed genomes are kept; default: below $SSM_MODAL_CACHE or ~/.cache/ssm_modal",
    )


def add_score_options(parser: argparse.ArgumentParser) -> None:
    """How variants are scored."""
    defaults = VariantScorer.__dataclass_fields__
    add = parser.add_argument
    add(
        "--window",
        type=int,
        default=defaults["window"].default,
        metavar="N",
        help="bases around a variant that the model reads, the allele in the middle (%(default)s)",
    )
    add(
        "--method",
        choices=METHODS,
        default="auto",
        help="auto: causal likelihood for a causal model; for a masked one, masked likelihood of "
        "substitutions and pseudo-likelihood of insertions and deletions",
    )
    add("--strands", choices=STRANDS, default="both", help="the mean over both strands, or one (%(default)s)")
    add(
        "--pseudo-radius",
        type=int,
        default=defaults["pseudo_radius"].default,
        metavar="N",
        help="bases on either side of an allele that pseudo-likelihood takes (%(default)s)",
    )
    add_batch_option(parser)


def add_batch_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help=f"tokens that go through the model at once ({_BATCH_TOKENS['cpu']}, on a GPU "
        f"{_BATCH_TOKENS['cuda']})",
    )


def add_stream_options(parser: argparse.ArgumentParser) -> None:
    """How sequences of any length go through the model."""
    defaults = StreamConfig()
    add = parser.add_argument
    add(
        "--segment",
        type=int,
        metavar="N",
        help="tokens that a causal model takes at once, its state carried from one segment to the next "
        f"({_SEGMENT['cpu']}, on a GPU {_SEGMENT['cuda']}); the result does not depend on it",
    )
    add(
        "--window",
        type=int,
        default=defaults.window,
        metavar="N",
        help="a bidirectional model takes a longer sequence in windows of N tokens (%(default)s)",
    )
    add(
        "--overlap",
        type=int,
        default=defaults.overlap,
        metavar="N",
        help="tokens that neighbouring windows share (%(default)s)",
    )


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, its tokenizer, and what tells it from others."""

    model: Model
    tokenizer: DNATokenizer
    device: torch.device

    def identity(self) -> dict[str, Any]:
        """Plain data that two starts of one job share: a hash of the weights, and the tokenizer."""
        whole = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            whole.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return {"model": whole.hexdigest(), "tokenizer": self.tokenizer.to_config()}


def load_model(args: argparse.Namespace) -> LoadedModel:
    """The model and the tokenizer that the options name.

    Raises ValueError for a tokenizer that is none of DNA, or has more ids than the model.
    """
    device = find_device(args.device)
    place = str(expand_path(args.model, "--model"))
    model = load_pretrained(place, device=device, dtype=None if args.dtype is None else DTYPES[args.dtype])
    tokenizer = find_tokenizer(place, args.tokenizer)
    if not isinstance(tokenizer, DNATokenizer):
        raise ValueError(
            f"the tokenizer kept with the model is a {type(tokenizer).__name__}, expected one of DNA; give "
            "--tokenizer nucleotide, or the tokenizer.json of the run"
        )
    size = getattr(model.config, "vocab_size", None)
    if isinstance(size, int) and tokenizer.vocab_size > size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model knows {size}; give the tokenizer "
            "that it was trained with by --tokenizer"
        )
    return LoadedModel(model, tokenizer, device)


def log_probs_of(loaded: LoadedModel, batch_tokens: int | None) -> LogProbs:
    """The model's answers, in batches that fit its device."""
    tokens = _BATCH_TOKENS.get(loaded.device.type, _BATCH_TOKENS["cpu"])
    return LogProbs(loaded.model, tokens if batch_tokens is None else batch_tokens)


def scorer_of(args: argparse.Namespace, loaded: LoadedModel, genome: Genome) -> VariantScorer:
    """What scores variants as the options say."""
    return VariantScorer(
        genome,
        loaded.tokenizer,
        log_probs_of(loaded, args.batch_tokens),
        args.window,
        args.method,
        args.strands,
        args.pseudo_radius,
    )


def score_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_score_options` that change a score."""
    return {name: getattr(args, name) for name in ("window", "method", "strands", "pseudo_radius")}


def stream_of(args: argparse.Namespace, device: torch.device) -> StreamConfig:
    """How sequences go through a model on `device`, as the options say."""
    segment = _SEGMENT.get(device.type, _SEGMENT["cpu"]) if args.segment is None else args.segment
    return StreamConfig(segment, args.window, args.overlap)


def load_genome(args: argparse.Namespace) -> Genome:
    """The records of the files that the options name, parsed or out of the cache."""
    files: list[Path] = []
    for given in args.fasta:
        path = expand_path(given, "--fasta")
        files += text_files(path, GENOME_SUFFIXES, "--fasta") if path.is_dir() else [path]
    return open_genome(files, cache_folder("genomes", args.cache_dir), skip_bad=args.skip_bad)


def region_place(genome: Genome, text: str) -> Place:
    """The place that --region means, on the plus strand.

    Raises ValueError for one on the minus strand: these jobs read both.
    """
    region = parse_region(text)
    if region.strand == "-":
        raise ValueError(f"--region is {text!r}, expected no strand: positions are those of the plus strand")
    return place_of(genome, region)


def list_left_out(target: Path, left_out: Sequence[LeftOut]) -> None:
    """Write what was left out beside `target`, and say so; an older list goes where there is nothing."""
    file = target.with_name(target.name + ".left_out.csv")
    if not left_out:
        file.unlink(missing_ok=True)
        return
    write_left_out(file, left_out)
    print(f"{len(left_out)} left out, listed in {file}", file=sys.stderr)


def file_hash(path: Path) -> str:
    """A hash of a file's content."""
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def say_differs(target: Path, differs: Sequence[str]) -> None:
    """Say that an unfinished job beside `target` was of another kind."""
    if differs:
        print(
            f"the unfinished job beside {target} had another {', '.join(differs)}: it was begun anew",
            file=sys.stderr,
        )


class Progress:
    """A line on the terminal about how far a job is; nothing where stderr is none."""

    def __init__(self, what: str) -> None:
        self._what, self._shown = what, False

    def __call__(self, done: int, of: int | None = None) -> None:
        if sys.stderr.isatty():
            whole = "" if of is None else f" of {of:,}"
            print(f"\r{done:,}{whole} {self._what}", end="", file=sys.stderr, flush=True)
            self._shown = True

    def end(self) -> None:
        if self._shown:
            print(file=sys.stderr)
