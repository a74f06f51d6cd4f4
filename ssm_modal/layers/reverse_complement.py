"""The two strands of DNA in a model: everything that has to do with the reverse complement, in one place.

Caduceus-PS (Schiff et al., arXiv 2403.03234, section 4) shares all parameters between a sequence and its
reverse complement. Its layers run on either strand alone (half of the channels, the second half reversed),
and only a head brings the two together. Here one backbone of width d_model therefore runs on the ids of both
strands as rows of one batch, and its outputs are laid side by side: `hidden` (batch, length, 2 d_model) holds
at step t what the backbone says of t on the strand given, then what it says of the same base on the other.

The law, exact up to the order of sums, with rc on each side as defined below:

    rows:    `Strands.both(rc(ids))` are the two rows of `Strands.both(ids)`, exchanged, and so is what an
             embedding or any layer makes of them
    hidden:  hidden(rc(ids)) = reverse_complement_hidden(hidden(ids)): steps reversed, halves exchanged
    logits:  logits(rc(ids)) = reverse_complement_logits(logits(ids)): steps reversed, each id's logit at its
             complement
    pooled:  logits of a whole sequence are the same for both strands

Every id is inside the law, special ones too: pad, mask and N are their own complement, begin and end change
places (`DNATokenizer.complement`). So a padded window obeys it with its padding on the other side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssm_modal.errors import ConfigError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import Config
from ssm_modal.tokenizers.dna import DNATokenizer, NucleotideTokenizer
from ssm_modal.tokenizers.kmers import MAX_K, KmerTokenizer


@dataclass(frozen=True)
class StrandsConfig(Config):
    """A model that reads both strands of DNA with the same parameters.

    `backbone.d_model` is then the width of each strand, so that `hidden` has 2 d_model channels, as in the
    published models, whose d_model counts one strand too.

    kmer, overlapping: the tokenizer the ids come from: None, nucleotides; else k-mers. Where k-mers do not
    overlap, the law is about sequences whose length k divides: others have no reverse complement in ids.
    """

    type: ClassVar[str] = "strands"
    kmer: int | None = None
    overlapping: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kmer is not None and not 1 <= self.kmer <= MAX_K:
            raise ConfigError(f"StrandsConfig: kmer is {self.kmer}, expected 1 to {MAX_K}, or None")
        if self.kmer is None and self.overlapping:
            raise ConfigError("StrandsConfig: overlapping is True without kmer, expected k-mers")

    def tokenizer(self) -> DNATokenizer:
        """The tokenizer that the ids come from."""
        return _tokenizer(self.kmer, self.overlapping)


@lru_cache(maxsize=8)
def _tokenizer(kmer: int | None, overlapping: bool) -> DNATokenizer:
    with torch.device("cpu"):  # also where a model is built on the meta device
        return NucleotideTokenizer() if kmer is None else KmerTokenizer(kmer, overlapping)


class Strands(nn.Module):
    """Ids to the ids of both strands, and the outputs of both side by side. Has no parameters.

    vocab_size: the model's; ConfigError where it is not the tokenizer's, since each id needs its complement.
    """

    def __init__(self, config: StrandsConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        wanted = config.tokenizer().vocab_size
        if vocab_size != wanted:
            kind = "nucleotides" if config.kmer is None else f"{config.kmer}-mers"
            raise ConfigError(f"vocab_size is {vocab_size}, expected {wanted}, the vocabulary of {kind}")
        # No buffer: it follows from the config, and an average of weights would average it.
        self._complement = config.tokenizer().complement

    def complement(self, device: torch.device) -> Tensor:
        """(vocab_size,) int64: the id of each id's other strand."""
        if self._complement.device != device:
            # What is kept serves training too, though the first to ask for it may be an evaluation.
            with torch.inference_mode(False):
                self._complement = self._complement.to(device)
        return self._complement

    def both(self, ids: Tensor, seqs: Sequences | None = None) -> tuple[Tensor, Sequences | None]:
        """ids (batch, length) to (2 batch, length), the given strands and then the other ones; or (1, total)
        packed by `seqs` to (1, 2 total) and the sequences that pack them."""
        other = reversed_steps(self.complement(ids.device)[ids], seqs)
        if seqs is None:
            return torch.cat([ids, other]), None
        borders = torch.cat([seqs.cu_seqlens, seqs.cu_seqlens[1:] + seqs.total])
        return torch.cat([ids, other], dim=1), Sequences(seqs.lengths * 2, borders)

    def join(self, hidden: Tensor, seqs: Sequences | None = None) -> Tensor:
        """What a model made of `both`, (2 batch, length, channels) or (1, 2 total, channels), to (batch,
        length, 2 channels) or (1, total, 2 channels): step t of both halves is the same base."""
        given, other = hidden.chunk(2, dim=0 if seqs is None else 1)
        return torch.cat([given, reversed_steps(other, seqs)], dim=-1)

    def mean_logits(self, given: Tensor, other: Tensor) -> Tensor:
        """Logits over the vocabulary (..., vocab_size) of either strand at the same bases: their mean, each
        id's logit taken from its complement on the other strand."""
        return (given + other[..., self.complement(other.device)]) / 2


def reversed_steps(x: Tensor, seqs: Sequences | None = None) -> Tensor:
    """x (batch, length, ...) with its steps in reverse order, of each sequence in itself with `seqs`."""
    if seqs is None:
        return x.flip(1)
    mirror = seqs.cu_seqlens[:-1] + seqs.cu_seqlens[1:] - 1
    steps = mirror[seqs.seq_index()] - torch.arange(seqs.total, device=x.device)
    return x.index_select(1, steps)


def reverse_complement_hidden(hidden: Tensor, seqs: Sequences | None = None) -> Tensor:
    """What `hidden` (batch, length, 2 d_model) of a model with strands is for the other strand."""
    given, other = hidden.chunk(2, dim=-1)
    return reversed_steps(torch.cat([other, given], dim=-1), seqs)


def reverse_complement_logits(logits: Tensor, complement: Tensor, seqs: Sequences | None = None) -> Tensor:
    """What per-position logits (batch, length, vocab_size) are for the other strand. complement:
    (vocab_size,) int64, the tokenizer's."""
    return reversed_steps(logits[..., complement.to(logits.device)], seqs)
