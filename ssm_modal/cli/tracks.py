"""`ssm-modal tracks`: per-base likelihood or coverage along a region, as bedGraph and as a picture."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from torch import Tensor

from ssm_modal.cli.dna_options import (
    add_batch_option,
    add_genome_options,
    add_model_options,
    add_stream_options,
    list_left_out,
    load_genome,
    load_model,
    log_probs_of,
    region_place,
    stream_of,
)
from ssm_modal.genomics.likelihood_track import SPACING, likelihood_track
from ssm_modal.genomics.places import Place
from ssm_modal.genomics.variant_scores import STRANDS
from ssm_modal.io.atomic import atomic_write
from ssm_modal.io.bedgraph import Track, write_bedgraph
from ssm_modal.io.coverage import coverage
from ssm_modal.io.genome import Genome
from ssm_modal.io.recordings import LeftOut
from ssm_modal.io.text import expand_path, output_folder
from ssm_modal.plots import track_plot


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = (
        "With --model the folder gets likelihood.bedgraph and likelihood.png, with --coverage "
        "coverage.bedgraph and coverage.png; give one of them or both."
    )
    add_model_options(parser, required=False)
    add_genome_options(parser)
    add = parser.add_argument
    add("--region", required=True, metavar="REGION", help="1-based, the end included: chr1:1,000-2,000")
    add("--out", required=True, metavar="DIR", help="the folder that is written to")
    add(
        "--coverage",
        metavar="FILE",
        help="BED, GFF3 or GTF intervals, or an indexed BAM or CRAM file, counted at each base",
    )
    add("--strands", choices=STRANDS, default="both", help="the mean over both strands, or one (%(default)s)")
    add(
        "--context",
        type=int,
        default=4096,
        metavar="N",
        help="bases on either side of the region that the model reads too (%(default)s)",
    )
    add(
        "--spacing",
        type=int,
        default=SPACING,
        metavar="N",
        help="of a masked model every N-th base is hidden at once (%(default)s)",
    )
    add_stream_options(parser)
    add_batch_option(parser)


def run(args: argparse.Namespace) -> int:
    """Do what the options say; returns 0, or raises the error that says what is wrong with them."""
    if args.model is None and args.coverage is None:
        raise ValueError("neither --model nor --coverage is given, expected one of them or both")
    for name in ("context", "spacing"):
        if getattr(args, name) < (1 if name == "spacing" else 0):
            raise ValueError(f"--{name} is {getattr(args, name)}, expected {int(name == 'spacing')} or more")
    folder = output_folder(args.out)
    genome = load_genome(args)
    place = region_place(genome, args.region)
    left_out: list[LeftOut] = []
    loaded = None if args.model is None else load_model(args)  # before anything is written
    if args.coverage is not None:
        file = expand_path(args.coverage, "--coverage")
        found = coverage(
            file, genome, place.record, place.start, place.end, left_out if args.skip_bad else None
        )
        _write(folder, "coverage", found.double(), genome, place, "coverage", None)
    if loaded is not None:
        values = likelihood_track(
            place,
            genome,
            loaded.tokenizer,
            log_probs_of(loaded, args.batch_tokens),
            strands=args.strands,
            context=args.context,
            spacing=args.spacing,
            stream=stream_of(args, loaded.device),
        )
        _write(folder, "likelihood", values, genome, place, "log P(base) (nats)", -math.log(4))
        known = int((~values.isnan()).sum())
        print(f"mean log P(base) {float(values.nanmean()):.4f} nats over {known:,} bases")
    list_left_out(folder / "tracks", [*genome.left_out, *left_out])
    return 0


def _write(
    folder: Path,
    name: str,
    values: Tensor,
    genome: Genome,
    place: Place,
    label: str,
    reference: float | None,
) -> None:
    contig = genome.records[place.record].name
    write_bedgraph(folder / f"{name}.bedgraph", label, [Track(contig, place.start, values.tolist())])
    picture = track_plot(values, contig, place.start, label, reference=reference)
    atomic_write(folder / f"{name}.png", picture)
    print(f"{folder}: {name}.bedgraph, {name}.png")
