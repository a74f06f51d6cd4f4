"""`ssm-modal embed`: embeddings of sequences of any length, streamed to safetensors or HDF5."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from ssm_modal.cli.dna_options import (
    Progress,
    add_genome_options,
    add_model_options,
    add_stream_options,
    file_hash,
    list_left_out,
    load_genome,
    load_model,
    say_differs,
    stream_of,
)
from ssm_modal.genomics.embedding import BY, POOLS, EmbeddingConfig, check_place, embed
from ssm_modal.genomics.embedding_store import output_format
from ssm_modal.genomics.places import Place, place_of, whole_record
from ssm_modal.genomics.streaming import HiddenStates
from ssm_modal.io.genome import Genome
from ssm_modal.io.intervals import read_intervals
from ssm_modal.io.nucleotides import GenomeError
from ssm_modal.io.recordings import LeftOut
from ssm_modal.io.text import expand_path
from ssm_modal.tokenizers.dna import DNATokenizer

# The options that decide what comes out.
_SETTINGS = ("by", "bin", "pool", "layer", "strand", "window", "overlap")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = (
        'By "record" the file holds one matrix, embeddings (sequences, width); by "window" or "position" one '
        "a sequence, under its name. The metadata lists the sequences. The file is written whole or not at "
        "all; a job that was stopped goes on behind its last whole sequence when the command is given again."
    )
    add_model_options(parser)
    add_genome_options(parser)
    add = parser.add_argument
    add(
        "--bed",
        metavar="FILE",
        help="intervals to embed, on their strand: BED, GFF3 or GTF; default: whole records",
    )
    add("--out", required=True, metavar="FILE", help="what is written: .safetensors, .h5 or .hdf5")
    add("--by", choices=BY, default="record", help="what a vector stands for (%(default)s)")
    add("--bin", type=int, default=1000, metavar="N", help='tokens a vector by "window" (%(default)s)')
    add("--pool", choices=POOLS, default="mean", help="over the tokens of a record or window (%(default)s)")
    add(
        "--layer",
        type=int,
        metavar="N",
        help="0 the embedding, N the stream behind block N; default: what the head is given",
    )
    add(
        "--strand",
        choices=("given", "other", "both"),
        default="given",
        help="given: as in the FASTA or the BED; other: the reverse complement; both: their mean, each place "
        "with itself (%(default)s)",
    )
    add("--save-dtype", choices=("float32", "float16"), default="float32", help="of the file (%(default)s)")
    add_stream_options(parser)


def run(args: argparse.Namespace) -> int:
    """Do what the options say; returns 0, or raises the error that says what is wrong with them."""
    target = expand_path(args.out, "--out")
    output_format(target)
    bed = None if args.bed is None else expand_path(args.bed, "--bed")
    genome = load_genome(args)
    loaded = load_model(args)
    config = EmbeddingConfig(
        args.by, args.bin, args.pool, args.strand == "both", args.save_dtype, stream_of(args, loaded.device)
    )
    hidden = HiddenStates(loaded.model, args.layer)
    bad: list[LeftOut] = []
    places = _places(
        genome, bed, args.strand == "other", loaded.tokenizer, config, bad if args.skip_bad else None
    )
    job = {
        "genome": genome.folder.name,
        "bed": None if bed is None else file_hash(bed),
        "skip_bad": args.skip_bad,
        **loaded.identity(),
        **{name: getattr(args, name) for name in _SETTINGS},
    }
    progress = Progress("sequences")
    differs = embed(places, genome, loaded.tokenizer, hidden, config, target, job, progress)
    progress.end()
    say_differs(target, differs)
    list_left_out(target, [*genome.left_out, *bad])
    print(f"{target}: {len(places):,} sequences, {sum(p.bases for p in places):,} bases")
    return 0


def _places(
    genome: Genome,
    bed: Path | None,
    other: bool,
    tokenizer: DNATokenizer,
    config: EmbeddingConfig,
    left_out: list[LeftOut] | None,
) -> list[Place]:
    """What is embedded, each under a name of its own."""
    found: list[Place] = []
    if bed is None:
        found = [whole_record(genome, i) for i in range(len(genome.records))]
        several = Counter(place.name for place in found)
        found = [
            # Several files may each have a record of this name.
            Place(f"{genome.files[genome.records[p.record].file].name}:{p.name}", p.record, 0, p.end)
            if several[p.name] > 1
            else p
            for p in found
        ]
    else:
        read = read_intervals(bed, genome, skip_bad=left_out is not None)
        if left_out is not None:
            left_out += read.left_out
        found = [place_of(genome, region) for region in read.regions]
        named = Counter(place.name for place in found)
        # Intervals without a name of their own, or that share one, go by where they are, and by number.
        found = [
            p if named[p.name] == 1 else place_of(genome, region, f"{region} #{number}")
            for number, (p, region) in enumerate(zip(found, read.regions), 1)
        ]
    good = []
    for place in found:
        try:
            check_place(place, genome, tokenizer, config)
        except GenomeError as error:
            if left_out is None:
                raise
            left_out.append(LeftOut(error.path, error.problem))
            continue
        strand = ("-" if place.strand == "+" else "+") if other else place.strand
        good.append(Place(place.name, place.record, place.start, place.end, strand))
    if not good:
        raise GenomeError(bed or genome.files[0], "no sequence is left to embed")
    return good
