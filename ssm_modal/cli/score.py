"""`ssm-modal score`: variants of a VCF or a table, scored by the change in log-likelihood."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from ssm_modal.cli.dna_options import (
    Progress,
    add_genome_options,
    add_model_options,
    add_score_options,
    file_hash,
    list_left_out,
    load_genome,
    load_model,
    say_differs,
    score_settings,
    scorer_of,
)
from ssm_modal.io.journal import Journal
from ssm_modal.io.recordings import LeftOut
from ssm_modal.io.scored_variants import Scored, check_output, write_scored
from ssm_modal.io.text import expand_path
from ssm_modal.io.variants import iter_variants

CHUNK = 64  # variants that are scored together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = (
        "A VCF gets the fields SSM_DLL (one number an alternative, nats) and SSM_NOTE (why there is none); a "
        "table of tab-separated columns with a header that has chrom, pos (1-based), ref and alt gets the "
        "columns ssm_dll and ssm_note. A job that was stopped goes on when the command is given again."
    )
    add_model_options(parser)
    add_genome_options(parser)
    parser.add_argument(
        "--variants", required=True, metavar="FILE", help="VCF or a table, plain, gzip or bgzip"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="what is written: .vcf or .vcf.gz for VCF, .tsv for a table; whole or not at all",
    )
    add_score_options(parser)


def run(args: argparse.Namespace) -> int:
    """Do what the options say; returns 0, or raises the error that says what is wrong with them."""
    source, target = expand_path(args.variants, "--variants"), expand_path(args.out, "--out")
    check_output(source, target)
    genome = load_genome(args)
    loaded = load_model(args)
    scorer = scorer_of(args, loaded, genome)
    job = {
        "variants": file_hash(source),
        "genome": genome.folder.name,
        "skip_bad": args.skip_bad,
        **loaded.identity(),
        **score_settings(args),
    }
    bad: list[LeftOut] = []
    scores: dict[int, list[Scored]] = {}
    progress = Progress("variants")
    with Journal(_journal(target), job) as journal:
        say_differs(target, journal.differs)
        earlier = {
            int(line): [(value, note) for value, note in found] for line, found in journal.done.items()
        }
        variants = iter_variants(source, genome, bad if args.skip_bad else None)
        while chunk := list(itertools.islice(variants, CHUNK)):
            new = [variant for variant in chunk if variant.line not in earlier]
            scored = dict(zip((v.line for v in new), map(list, scorer.score(new))))
            journal.add((str(line), found) for line, found in scored.items())
            for variant in chunk:
                scores[variant.line] = earlier.get(variant.line) or scored.get(variant.line, [])
            progress(len(scores))
        progress.end()
        write_scored(source, target, scores, scorer.about())
        journal.remove()
    list_left_out(target, [*genome.left_out, *bad])
    alternatives = [one for found in scores.values() for one in found]
    missing = sum(value is None for value, _ in alternatives)
    print(
        f"{target}: {len(scores):,} variants, {len(alternatives) - missing:,} alternatives scored"
        + (f", {missing:,} without a score" if missing else "")
    )
    return 0


def _journal(target: Path) -> Path:
    return target.with_name(f".{target.name}.progress")
