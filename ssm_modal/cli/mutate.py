"""`ssm-modal mutate`: the effect of every substitution in a region, as a table, a track and a picture."""

from __future__ import annotations

import argparse

from ssm_modal.cli.dna_options import (
    add_genome_options,
    add_model_options,
    add_score_options,
    list_left_out,
    load_genome,
    load_model,
    region_place,
    say_differs,
    score_settings,
    scorer_of,
)
from ssm_modal.genomics.mutagenesis import Mutations, mutate_region
from ssm_modal.io.atomic import atomic_write
from ssm_modal.io.bedgraph import Track, write_bedgraph
from ssm_modal.io.journal import Journal
from ssm_modal.io.text import output_folder
from ssm_modal.plots import mutation_plot


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = (
        "The folder gets mutations.tsv (chrom, pos, ref, alt, ssm_dll: three lines a base), "
        "mutations.bedgraph (the mean of the three at each base) and mutations.png (a heat map). Scores "
        "are those of ssm-modal score. A job that was stopped goes on when the command is given again."
    )
    add_model_options(parser)
    add_genome_options(parser)
    parser.add_argument(
        "--region", required=True, metavar="REGION", help="1-based, the end included: chr1:1,000-2,000"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder that is written to")
    add_score_options(parser)


def run(args: argparse.Namespace) -> int:
    """Do what the options say; returns 0, or raises the error that says what is wrong with them."""
    folder = output_folder(args.out)
    genome = load_genome(args)
    place = region_place(genome, args.region)
    loaded = load_model(args)
    scorer = scorer_of(args, loaded, genome)
    job = {
        "genome": genome.folder.name,
        "region": [place.record, place.start, place.end],
        **loaded.identity(),
        **score_settings(args),
    }
    with Journal(folder / ".mutations.progress", job) as journal:
        say_differs(folder, journal.differs)
        found = mutate_region(scorer, place, journal.done, lambda key, rows: journal.add([(key, rows)]))
        write_bedgraph(
            folder / "mutations.bedgraph",
            "mean effect of substitutions (nats)",
            [Track(found.contig, found.start, found.mean_effect().tolist())],
        )
        picture = mutation_plot(found.effects, found.letters, found.contig, found.start)
        atomic_write(folder / "mutations.png", picture)
        atomic_write(folder / "mutations.tsv", mutation_table(found))
        journal.remove()
    list_left_out(folder / "mutations.tsv", genome.left_out)
    print(f"{folder}: mutations.tsv, mutations.bedgraph, mutations.png of {len(found.letters):,} bases")
    return 0


def mutation_table(found: Mutations) -> str:
    """Tab-separated columns chrom, pos (1-based), ref, alt, ssm_dll."""
    lines = ["chrom\tpos\tref\talt\tssm_dll"]
    lines += [f"{chrom}\t{pos}\t{ref}\t{alt}\t{effect:.6g}" for chrom, pos, ref, alt, effect in found.rows()]
    return "\n".join(lines) + "\n"
