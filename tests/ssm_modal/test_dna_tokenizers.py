"""Tokenizers of DNA: ids, round trips, and the reverse-complement law of each."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch

from ssm_modal.io.nucleotides import LetterError, letters_of, reverse_complement, text_of
from ssm_modal.tokenizers import (
    DNATokenizer,
    KmerTokenizer,
    NucleotideTokenizer,
    build_tokenizer,
    load_tokenizer,
    tokenizer_from_config,
)

TOKENIZERS = [
    NucleotideTokenizer(),
    *(KmerTokenizer(k, overlapping) for k in (1, 2, 3, 6) for overlapping in (False, True)),
]
NAMES = ["nucleotide", *(f"{k}{'o' if o else 'n'}" for k in (1, 2, 3, 6) for o in (False, True))]
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=NAMES)


def text(n: int, letters: str = "ACGT", seed: int = 0) -> str:
    return "".join(random.Random(seed + n).choices(letters, k=n))


def other_strand(sequence: str) -> str:
    return text_of(reverse_complement(letters_of(sequence)))


def test_ids_of_nucleotides() -> None:
    tokenizer = NucleotideTokenizer()
    assert tokenizer.encode("ACGTNacgtnUR") == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 3, 4]
    assert tokenizer.vocab_size == 9
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.begin_id, tokenizer.end_id) == (5, 6, 7, 8)
    assert tokenizer.decode([7, 0, 1, 6, 4, 8, 5]) == "ACNN"
    assert tokenizer.count_bytes(torch.tensor([7, 0, 1, 6, 4, 8, 5])) == 4
    assert tokenizer.complement.tolist() == [3, 2, 1, 0, 4, 5, 6, 8, 7]
    with pytest.raises(LetterError, match="letter 'X' at base 2"):
        tokenizer.encode("AX")
    with pytest.raises(ValueError, match=r"ids\[1\] is 9, expected 0 to 8"):
        tokenizer.decode([0, 9])


def test_ids_of_kmers() -> None:
    plain, overlapping = KmerTokenizer(3), KmerTokenizer(3, overlapping=True)
    # ACG = 0 * 16 + 1 * 4 + 2, CGT = 1 * 16 + 2 * 4 + 3, GTT = 2 * 16 + 3 * 4 + 3
    assert plain.encode("ACGGTTA") == [6, 47, 65]
    assert plain.encode("ACGTNTAN") == [6, 64, 65, 69]
    assert (plain.vocab_size, plain.pad_id, plain.end_id) == (74, 70, 73)
    assert overlapping.encode("ACGTT") == [6, 27, 47]
    assert overlapping.encode("ACGTTNAAA") == [6, 27, 47, 64, 64, 64, 0]
    assert (overlapping.vocab_size, overlapping.mask_id) == (69, 66)
    # k-mers that do not fit each other: the one that begins last decides.
    assert overlapping.decode([0, 21, 63]) == "ACTTT"
    assert overlapping.encode("") == plain.encode("") == []
    with pytest.raises(ValueError, match="2 letters hold no 3-mer"):
        overlapping.encode("AC")
    for k in (0, 11, True, 2.0):
        with pytest.raises(ValueError, match="k is"):
            KmerTokenizer(k)  # type: ignore[arg-type]


def test_every_kmer_has_its_other_strand() -> None:
    for tokenizer in (KmerTokenizer(3), KmerTokenizer(3, overlapping=True), KmerTokenizer(2)):
        for letters in itertools.product("ACGT", repeat=tokenizer.k):
            (token,) = tokenizer.encode("".join(letters))
            assert tokenizer.decode([int(tokenizer.complement[token])]) == other_strand("".join(letters))
        there = tokenizer.complement[tokenizer.complement]
        assert torch.equal(there, torch.arange(tokenizer.vocab_size))


@every_tokenizer
def test_round_trips(tokenizer: DNATokenizer) -> None:
    for n in (6, 7, 11, 12, 60, 61):
        sequence = text(n)
        ids = tokenizer.encode_ids(sequence)
        assert ids.dtype == torch.int64
        assert tokenizer.decode(ids) == sequence
        assert tokenizer.count_bytes(ids) == n
        assert tokenizer.encode(tokenizer.decode(ids)) == ids.tolist()
        with_specials = [tokenizer.begin_id, *ids.tolist(), tokenizer.end_id, tokenizer.pad_id]
        assert tokenizer.decode(with_specials) == sequence
        mixed = text(n, "ACGTNRY")
        assert tokenizer.encode(tokenizer.decode(tokenizer.encode(mixed))) == tokenizer.encode(mixed)


def test_lone_n_stays_n_under_overlap_and_its_kmer_is_n_without() -> None:
    sequence = "ACGTACGTNACGTACG"
    assert (decoded := KmerTokenizer(4, overlapping=True)).decode(decoded.encode(sequence)) == sequence
    assert (plain := KmerTokenizer(4)).decode(plain.encode(sequence)) == "ACGTACGTNNNNTACG"
    # Between two N with fewer than k bases nothing is known.
    assert decoded.decode(decoded.encode("ACGTNACNACGT")) == "ACGTNNNNACGT"


@every_tokenizer
def test_the_other_strand_of_ids_is_that_of_the_letters(tokenizer: DNATokenizer) -> None:
    for n in (6, 12, 60):
        for letters in ("ACGT", "ACGTN"):
            sequence = text(n, letters)
            ids = tokenizer.encode_ids(sequence)
            there = tokenizer.reverse_complement(ids)
            assert there.tolist() == tokenizer.encode(other_strand(sequence))
            assert torch.equal(tokenizer.reverse_complement(there), ids)
    begin, end = torch.tensor([tokenizer.begin_id]), torch.tensor([tokenizer.end_id])
    whole = torch.cat([begin, ids, end])
    assert torch.equal(tokenizer.reverse_complement(whole), torch.cat([begin, there, end]))
    rows = torch.stack([ids, there])
    assert torch.equal(tokenizer.reverse_complement(rows), torch.stack([there, ids]))
    with pytest.raises(ValueError, match="expected 0 to"):
        tokenizer.reverse_complement(torch.tensor([tokenizer.vocab_size]))


def test_without_overlap_k_must_divide_the_length() -> None:
    tokenizer = KmerTokenizer(3)
    with pytest.raises(ValueError, match="single base at place 2: 3 does not divide the number of bases"):
        tokenizer.reverse_complement(tokenizer.encode_ids("ACGACGA"))
    overlapping = KmerTokenizer(3, overlapping=True)
    ids = overlapping.encode_ids("ACGACGA")
    assert overlapping.decode(overlapping.reverse_complement(ids)) == "TCGTCGT"


@every_tokenizer
def test_streams_give_what_decode_gives(tokenizer: DNATokenizer) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        # Any ids: k-mers that do not fit each other, N, masks and specials among them.
        ids = torch.randint(0, tokenizer.vocab_size, (12,), generator=generator).tolist()
        ids += torch.randint(tokenizer.n_id, tokenizer.vocab_size, (4,), generator=generator).tolist()
        ids += tokenizer.encode(text(12))
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)
        before = tokenizer.encode(text(9))
        stream = tokenizer.stream(before)
        come = "".join(map(stream.push, ids)) + stream.finish()
        assert come == tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]


@every_tokenizer
def test_counts_of_tokens_and_bases(tokenizer: DNATokenizer) -> None:
    for bases in range(1, 30):
        tokens = tokenizer.tokens_in(bases)
        if tokens:
            needed = tokenizer.bases_for(tokens)
            assert needed <= bases < tokenizer.bases_for(tokens + 1)
            assert len(tokenizer.encode(text(needed))) == tokens
        else:
            assert bases < tokenizer.bases_for(1)


@every_tokenizer
def test_configs(tmp_path: Path, tokenizer: DNATokenizer) -> None:
    file = tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(file)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.encode(text(12)) == tokenizer.encode(text(12))
    assert sum(t.fingerprint() == tokenizer.fingerprint() for t in TOKENIZERS) == 1


def test_names_of_tokenizers() -> None:
    assert isinstance(build_tokenizer("nucleotide"), NucleotideTokenizer)
    with pytest.raises(ValueError, match=r"unknown keys \['size'\]"):
        tokenizer_from_config({"ssm_modal_tokenizer": "kmer", "size": 3})
    with pytest.raises(TypeError, match=r"letters is torch\.int64"):
        NucleotideTokenizer().encode_letters(torch.tensor([65]))
    with pytest.raises(ValueError, match="letters holds 97 at place 1"):
        NucleotideTokenizer().encode_letters(torch.tensor([65, 97], dtype=torch.uint8))
