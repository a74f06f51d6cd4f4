"""Tokens of a stretch of a genome on one of its strands, read where they are needed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssm_modal.io.genome import Genome
from ssm_modal.io.regions import Region, Strand
from ssm_modal.tokenizers.dna import DNATokenizer


@dataclass(frozen=True)
class Place:
    """Bases `start` to `end` (0-based, half-open) of record number `record`, under `name`.

    strand: the direction in which they are read; "-" is the reverse complement.
    """

    name: str
    record: int
    start: int
    end: int
    strand: Strand = "+"

    @property
    def bases(self) -> int:
        return self.end - self.start

    def letters(self, genome: Genome, first: int, last: int, *, other: bool = False) -> Tensor:
        """Letters `first` to `last` in reading order, uint8 (n,); other: of the other strand, which is read
        from the other end."""
        if (self.strand == "-") == other:
            return genome.read(self.record, self.start + first, self.start + last, "+")
        return genome.read(self.record, self.end - last, self.end - first, "-")

    def ids(
        self, genome: Genome, tokenizer: DNATokenizer, first: int, last: int, *, other: bool = False
    ) -> Tensor:
        """Tokens `first` to `last` in reading order, int64 (last - first,)."""
        begin = first * tokenizer.step
        letters = self.letters(genome, begin, begin + tokenizer.bases_for(last - first), other=other)
        return tokenizer.encode_letters(letters)


def whole_record(genome: Genome, record: int) -> Place:
    """All bases of a record under its name."""
    entry = genome.records[record]
    return Place(entry.name, record, 0, entry.length)


def place_of(genome: Genome, region: Region, name: str | None = None) -> Place:
    """The place of `region`; `name` defaults to the region's own, else to the region as text.

    Raises GenomeError for an unknown contig and a place past the record's end.
    """
    genome.check(region)
    record = genome.find(region.contig)
    end = genome.records[record].length if region.end is None else region.end
    return Place(name or region.name or str(region), record, region.start, end, region.strand)
