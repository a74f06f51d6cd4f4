"""Regions of sequences. Inside the library coordinates are 0-based and half-open; text has its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Strand = Literal["+", "-"]
_REGION = re.compile(r"^(?P<contig>.+):(?P<start>[\d,]+)(?P<dash>-(?P<end>[\d,]+)?)?$")
_STRAND = re.compile(r"\((?P<strand>[+-])\)$")


@dataclass(frozen=True)
class Region:
    """Bases `start` to `end` of a contig: 0-based, half-open; `end` None: to the contig's end.

    strand: "-" is the reverse complement of these bases. name: where a file gives one.
    """

    contig: str
    start: int = 0
    end: int | None = None
    strand: Strand = "+"
    name: str | None = None

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ValueError(f"start is {self.start} in {self.contig!r}, expected 0 or more")
        if self.end is not None and self.end <= self.start:
            kind = "empty" if self.end == self.start else "reversed"
            raise ValueError(
                f"the region from {self.start} to {self.end} of {self.contig!r} (0-based) is {kind}"
            )
        if self.strand not in ("+", "-"):
            raise ValueError(f'strand is {self.strand!r}, expected "+" or "-"')

    def __str__(self) -> str:
        """As `parse_region` reads it: 1-based, the end included."""
        place = "" if self.end is None and self.start == 0 else f":{self.start + 1}-{self.end or ''}"
        return f"{self.contig}{place}{'(-)' if self.strand == '-' else ''}"


def parse_region(text: str) -> Region:
    """The region that `text` means, 1-based with the end included, as samtools writes it.

    "chr1:1,000-2,000" is `Region("chr1", 999, 2000)`; "chr1:1000" and "chr1:1000-" go to the end; "chr1" is
    the whole contig; "(-)" behind it takes the minus strand. A contig's name may hold colons: what is not of
    these forms is a name. Raises ValueError for a start of 0, an end before the start and an empty name.
    """
    whole = text.strip()
    strand: Strand = "+"
    if found := _STRAND.search(whole):
        strand = "-" if found["strand"] == "-" else "+"
        whole = whole[: found.start()]
    if not whole:
        raise ValueError(f"region is {text!r}, expected a contig's name, such as 'chr1:1,000-2,000'")
    match = _REGION.match(whole)
    if match is None:
        return Region(whole, strand=strand)
    start, end = _number(match["start"], text), None
    if match["end"] is not None:
        end = _number(match["end"], text)
        if end < start:
            raise ValueError(f"region is {text!r}: it ends before it starts")
    if start < 1:
        raise ValueError(f"region is {text!r}: it starts at 0, but the first base is 1 in this notation")
    return Region(match["contig"], start - 1, end, strand)


def _number(digits: str, text: str) -> int:
    plain = digits.replace(",", "")
    if not plain:
        raise ValueError(f"region is {text!r}: {digits!r} is no number")
    return int(plain)
