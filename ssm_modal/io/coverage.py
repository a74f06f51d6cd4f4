"""How many intervals or reads lie over each base of a region."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ssm_modal.io.genome import Genome
from ssm_modal.io.intervals import read_intervals
from ssm_modal.io.nucleotides import GenomeError
from ssm_modal.io.recordings import LeftOut
from ssm_modal.io.variants import load_pysam

ALIGNMENTS = (".bam", ".cram")


def coverage(
    path: str | os.PathLike[str],
    genome: Genome,
    record: int,
    start: int,
    end: int,
    left_out: list[LeftOut] | None = None,
) -> Tensor:
    """Coverage of bases `start` to `end` (0-based, half-open) of record number `record`, int64 (n,).

    path: BED, GFF3 or GTF (intervals on either strand), or an indexed BAM or CRAM file (aligned bases of
    reads but unmapped, secondary, failed and duplicate ones, as samtools depth counts, without N).
    left_out: None raises at a bad line; a list takes it with the reason.

    Raises FileNotFoundError, and GenomeError as `read_bed` and `read_features`, for a BAM file without an
    index and for one that does not know the record.
    """
    file = Path(path)
    if file.suffix.lower() in ALIGNMENTS:
        return _aligned(file, genome, record, start, end)
    found = read_intervals(file, genome, skip_bad=left_out is not None)
    if left_out is not None:
        left_out += found.left_out
    # +1 where an interval begins, -1 behind its end, added up.
    change = torch.zeros(end - start + 1, dtype=torch.int64)
    for region in found.regions:
        if genome.find(region.contig) != record:
            continue
        stop = genome.records[record].length if region.end is None else region.end
        first, last = max(region.start, start), min(stop, end)
        if first < last:
            change[first - start] += 1
            change[last - start] -= 1
    return change.cumsum(0)[:-1]


def _aligned(file: Path, genome: Genome, record: int, start: int, end: int) -> Tensor:
    pysam = load_pysam()
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r}: there is no such file")
    try:
        with pysam.AlignmentFile(str(file)) as reads:
            if not reads.has_index():
                raise GenomeError(file, "has no index beside it; make one: samtools index")
            name = next((n for n in reads.references if _same(genome, n, record)), None)
            if name is None:
                raise GenomeError(file, f"knows no record {genome.records[record].name!r}")
            counts = reads.count_coverage(name, start, end, quality_threshold=0)
    except (OSError, ValueError) as error:
        if isinstance(error, GenomeError):
            raise
        raise GenomeError(file, f"pysam cannot read it: {error}") from error
    return torch.stack([torch.tensor(one, dtype=torch.int64) for one in counts]).sum(0)


def _same(genome: Genome, name: str, record: int) -> bool:
    try:
        return genome.find(name) == record
    except GenomeError:
        return False
