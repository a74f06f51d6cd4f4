"""Scores of variants against sums worked out by hand from a table, and the laws they obey."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("Bio")

import ssm_modal
from ssm_modal.genomics import LogProbs, Place, Query, VariantScorer, likelihood_track, mutate_region
from ssm_modal.genomics.streaming import StreamConfig
from ssm_modal.io.genome import Genome, open_genome
from ssm_modal.io.nucleotides import GenomeError, reverse_complement, text_of
from ssm_modal.io.variants import Allele, Variant
from ssm_modal.tokenizers import KmerTokenizer, NucleotideTokenizer
from tests.ssm_modal.dna_models import TableLM

NUCLEOTIDES = NucleotideTokenizer()


def letters(n: int, seed: int) -> str:
    drawn = torch.randint(4, (n,), generator=torch.Generator().manual_seed(seed))
    return "".join("ACGT"[i] for i in drawn.tolist())


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    (tmp_path / "g.fa").write_text(f">c\n{letters(60, 0)}\n>d\n{letters(20, 1)}NNRN{letters(20, 2)}\n")
    return open_genome([tmp_path / "g.fa"], tmp_path / "cache")


@pytest.fixture
def other(tmp_path: Path, genome: Genome) -> Genome:
    """The same genome on its other strand."""
    texts = [text_of(genome.read(i, strand="-")) for i in range(2)]
    (tmp_path / "o.fa").write_text(f">c\n{texts[0]}\n>d\n{texts[1]}\n")
    return open_genome([tmp_path / "o.fa"], tmp_path / "cache")


def variant(genome: Genome, record: int, start: int, end: int, *alts: str) -> Variant:
    ref = text_of(genome.read(record, start, end))
    return Variant(1, record, start, ref, tuple(Allele(end, alt) for alt in alts))


def mirrored(genome: Genome, given: Variant) -> Variant:
    """`given` on the other strand."""
    length = genome.records[given.record].length

    def turned(text: str) -> str:
        return text.translate(str.maketrans("ACGT", "TGCA"))[::-1]

    end = given.start + len(given.ref)
    return Variant(
        1,
        given.record,
        length - end,
        turned(given.ref),
        tuple(Allele(length - given.start, turned(a.letters or "")) for a in given.alleles),
    )


def causal_sum(model: TableLM, ids: Tensor, first: int) -> float:
    table = model.left.log_softmax(-1)
    return float(sum(table[ids[t - 1], ids[t]] for t in range(max(1, first), len(ids))))


def test_causal_scores_are_sums_of_conditionals_on_both_strands(genome: Genome) -> None:
    model = TableLM(causal=True)
    scorer = VariantScorer(genome, NUCLEOTIDES, LogProbs(model, 64), window=17)
    given = variant(genome, 0, 30, 32, "A", "GTTC")
    scores = scorer.score([given])[0]
    for allele, (score, _) in zip(given.alleles, scores):
        flank = (17 - max(2, len(allele.letters or ""))) // 2
        left, right = genome.read(0, 30 - flank, 30), genome.read(0, 32, 32 + flank)
        wanted = 0.0
        for turn in (False, True):
            for sign, text in ((1, allele.letters), (-1, given.ref)):
                middle = NUCLEOTIDES.decode_letters(NUCLEOTIDES.encode_ids(text or ""))
                whole = torch.cat([left, middle, right])
                ids = NUCLEOTIDES.encode_letters(reverse_complement(whole) if turn else whole)
                wanted += 0.5 * sign * causal_sum(model, ids, flank)
        assert score == pytest.approx(wanted, abs=1e-12)


def test_masked_and_pseudo_scores_by_hand(genome: Genome) -> None:
    model = TableLM(causal=False)
    ids = NUCLEOTIDES.encode_letters(genome.read(0))
    mask = NUCLEOTIDES.mask_id

    def log_p(ids: Tensor, at: int) -> float:
        hidden = ids.clone()
        hidden[at] = mask
        return float((model.left[hidden[at - 1]] + model.right[hidden[at + 1]]).log_softmax(-1)[ids[at]])

    scorer = VariantScorer(genome, NUCLEOTIDES, LogProbs(model, 512), window=21, strands="+")
    ref = "ACGT"[ids[25]]
    alt = next(base for base in "ACGT" if base != ref)
    snv = variant(genome, 0, 25, 26, alt)
    changed = ids.clone()
    changed[25] = "ACGT".index(alt)
    assert scorer.score([snv])[0][0][0] == pytest.approx(log_p(changed, 25) - log_p(ids, 25), abs=1e-12)
    pseudo = VariantScorer(
        genome, NUCLEOTIDES, LogProbs(model, 512), 21, method="pseudo", strands="+", pseudo_radius=2
    )
    inserted = torch.cat([ids[:26], torch.tensor([2, 2]), ids[26:]])
    wanted = sum(log_p(inserted, t) for t in range(23, 30)) - sum(log_p(ids, t) for t in range(23, 28))
    found = pseudo.score([variant(genome, 0, 25, 26, ref + "GG")])[0][0][0]
    assert found == pytest.approx(wanted, abs=1e-12)
    # "auto" takes pseudo-likelihood for it, "masked" has none.
    assert VariantScorer(genome, NUCLEOTIDES, LogProbs(model, 512), 21, strands="+", pseudo_radius=2).score(
        [variant(genome, 0, 25, 26, ref + "GG")]
    )[0][0][0] == pytest.approx(wanted, abs=1e-12)
    masked = VariantScorer(genome, NUCLEOTIDES, LogProbs(model, 512), 21, method="masked")
    assert masked.score([variant(genome, 0, 25, 26, ref + "GG")]) == [
        ((None, "no substitution, which masked likelihood needs"),)
    ]


SMALL = {"d_model": 8, "n_layers": 1, "d_state": 4}
MODELS = {
    "causal": lambda: TableLM(True),
    "masked": lambda: TableLM(False),
    "mamba": lambda: ssm_modal.create_model("dna_lm", **SMALL).double(),
    "caduceus_ph": lambda: ssm_modal.create_model("caduceus_ph", **SMALL).double(),
    "caduceus_ps": lambda: ssm_modal.create_model("caduceus_ps", **SMALL).double(),
}


@pytest.mark.parametrize("kind", MODELS)
def test_laws_of_scores(genome: Genome, other: Genome, kind: str) -> None:
    """Own alleles are exactly 0; the other strand has the same score; A to B is minus B to A."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    answers = LogProbs(model, 200)
    scorer = VariantScorer(genome, NUCLEOTIDES, answers, window=24, pseudo_radius=3)
    turned = VariantScorer(other, NUCLEOTIDES, answers, window=24, pseudo_radius=3)
    given = [
        variant(genome, 0, 12, 13, *"ACGT", "ACC"),
        variant(genome, 0, 40, 45, "G"),
        variant(genome, 0, 0, 1, *"ACGT"),
        variant(genome, 0, 59, 60, *"ACGT", "TTT"),
        variant(genome, 1, 30, 32, "TT", "CAA"),
    ]
    scores = scorer.score(given)
    mirror = turned.score([mirrored(genome, one) for one in given])
    zeros = 0
    for one, own, theirs in zip(given, scores, mirror):
        for allele, (score, reason), (same, _) in zip(one.alleles, own, theirs):
            assert score is not None, reason
            assert score == pytest.approx(same, abs=1e-10)
            if allele.letters == one.ref:
                assert score == 0.0
                zeros += 1
            else:
                assert abs(score) > 1e-6
    assert zeros == 3
    # One strand alone has another score, but for a model that reads both.
    alone = VariantScorer(genome, NUCLEOTIDES, answers, window=24, strands="+").score(given[1:2])[0][0][0]
    assert (abs((alone or 0.0) - (scores[1][0][0] or 0.0)) < 1e-3) == (kind == "caduceus_ps")


@pytest.mark.parametrize(
    ("k", "overlapping", "reason"),
    [(3, True, "several bases in overlapping k-mers"), (3, False, "3-mers without overlap, no substitution")],
)
def test_kmers(genome: Genome, other: Genome, k: int, overlapping: bool, reason: str) -> None:
    tokenizer = KmerTokenizer(k, overlapping)
    torch.manual_seed(0)
    options = {"vocab_size": tokenizer.vocab_size, "d_model": 8, "n_layers": 1, "d_state": 4}
    causal = LogProbs(ssm_modal.create_model("mamba_lm", **options).double().eval(), 100)
    snv = variant(genome, 0, 30, 31, *"ACGT")
    for answers in (causal, LogProbs(_Any(tokenizer.vocab_size), 100)):
        scorer = VariantScorer(genome, tokenizer, answers, window=25)
        mine = scorer.score([snv])[0]
        theirs = VariantScorer(other, tokenizer, answers, window=25).score([mirrored(genome, snv)])[0]
        assert [a for a, _ in mine] == pytest.approx([a for a, _ in theirs], abs=1e-10)
        assert mine["ACGT".index(snv.ref)][0] == 0.0
        assert sum(value == 0.0 for value, _ in mine) == 1
    masked = VariantScorer(genome, tokenizer, LogProbs(_Any(tokenizer.vocab_size), 100), 25, method="masked")
    if overlapping:
        assert masked.score([variant(genome, 0, 30, 33, "AAA")])[0][0] == (None, reason)
        # The mean over the k tokens that hold the base, each with all k hidden.
        table = masked.log_probs.model.left.log_softmax(-1)
        ids = tokenizer.encode_letters(genome.read(0, 18, 43))
        alt = genome.read(0, 18, 43)
        alt[12] = ord("A")
        new = tokenizer.encode_letters(alt)
        wanted = sum(float(table[0, new[t]] - table[0, ids[t]]) for t in (10, 11, 12)) / 3
        plus = VariantScorer(genome, tokenizer, masked.log_probs, 25, method="masked", strands="+")
        assert plus.score([variant(genome, 0, 30, 31, "A")])[0][0][0] == pytest.approx(wanted, abs=1e-12)
    else:
        assert VariantScorer(genome, tokenizer, causal, 25).score([variant(genome, 0, 30, 31, "AC")])[0][
            0
        ] == (
            None,
            reason,
        )


class _Any(TableLM):
    """A masked model that says the same everywhere."""

    def __init__(self, vocab: int) -> None:
        super().__init__(causal=False)
        generator = torch.Generator().manual_seed(3)
        self.left = torch.nn.Parameter(torch.randn(1, vocab, generator=generator, dtype=torch.float64))

    def hidden(self, ids: Tensor, state: object = None) -> tuple[Tensor, None]:
        return self.left[torch.zeros_like(ids)], None


def test_alleles_without_a_score_and_wrong_settings(genome: Genome) -> None:
    answers = LogProbs(TableLM(True), 64)
    scorer = VariantScorer(genome, NUCLEOTIDES, answers, window=12)
    given = Variant(1, 0, 30, "A", (Allele(31, None, "spanning deletion"), Allele(31, "A" * 12)))
    assert scorer.score([given, Variant(2, 0, 3, "A", ())]) == [
        ((None, "spanning deletion"), (None, "allele of 12 bases in a window of 12")),
        (),
    ]
    with pytest.raises(GenomeError, match="window is 61, but the longest record has 60 bases"):
        VariantScorer(genome, NUCLEOTIDES, answers, window=61)
    with pytest.raises(ValueError, match="method is 'masked', but the model is a causal one"):
        VariantScorer(genome, NUCLEOTIDES, answers, window=12, method="masked")
    with pytest.raises(TypeError, match="expected a causal or masked language model"):
        LogProbs(ssm_modal.create_model("ids_classifier", d_model=8, n_layers=1), 9)
    with pytest.raises(ValueError, match="a causal model does not predict a sequence's first"):
        answers([Query(torch.tensor([1, 2]), torch.tensor([0]), torch.tensor([1]))])


@pytest.mark.parametrize("causal", [True, False])
def test_a_code_in_the_genome_is_the_base_that_the_variant_names(tmp_path: Path, causal: bool) -> None:
    genomes = []
    for letter in "RAG":  # R: A or G
        text = letters(20, 4) + letter + letters(20, 5)
        (tmp_path / f"{letter}.fa").write_text(f">c\n{text}\n")
        genomes.append(open_genome([tmp_path / f"{letter}.fa"], tmp_path / "cache"))
    code, *known = genomes
    for ref, alt, genome in zip("AG", "GA", known):
        given = Variant(1, 0, 20, ref, (Allele(21, alt), Allele(21, ref)))
        mine, wanted = (
            VariantScorer(one, NUCLEOTIDES, LogProbs(TableLM(causal=causal), 64), window=15).score([given])[0]
            for one in (code, genome)
        )
        assert mine == wanted
        assert mine[0][0]
        assert mine[1][0] == 0.0


def test_batches_hold_sequences_of_one_length_once() -> None:
    model = TableLM(True)
    answers = LogProbs(model, 10)
    rows = [
        torch.tensor(x) for x in ([0, 1, 2, 3, 0], [0, 1], [3, 2, 1, 0, 0], [0, 1, 2, 3, 0], [1, 1, 1, 1, 1])
    ]
    queries = [Query(row, torch.tensor([1]), row[1:2]) for row in rows]
    found = answers(queries)
    assert sorted(model.shapes) == [(1, 2), (1, 5), (2, 5)]
    table = model.left.log_softmax(-1)
    assert [float(x) for x in found] == pytest.approx([float(table[r[0], r[1]]) for r in rows], abs=1e-12)


def test_mutagenesis_has_the_scores_of_score_and_goes_on(genome: Genome) -> None:
    scorer = VariantScorer(genome, NUCLEOTIDES, LogProbs(TableLM(True), 500), window=12)
    done: dict[str, list[list[float] | None]] = {}
    found = mutate_region(scorer, Place("d", 1, 18, 26), done, done.__setitem__)
    assert found.letters[2:6] == "NNRN"
    assert found.effects[2:6].isnan().all()
    for i in (0, 1, 6, 7):
        given = variant(genome, 1, 18 + i, 19 + i, *"ACGT")
        assert found.effects[i].tolist() == [value for value, _ in scorer.score([given])[0]]
    rows = list(found.rows())
    assert len(rows) == 12
    assert rows[0][:2] == ("d", 19)
    kept = {"18": [[9.0] * 4] * 8}
    again = mutate_region(scorer, Place("d", 1, 18, 26), kept, kept.__setitem__)
    assert (again.effects == 9.0).all()


@pytest.mark.parametrize("segment", [3, 100])
def test_the_track_of_a_causal_model(genome: Genome, segment: int) -> None:
    model = TableLM(True)
    table = model.left.log_softmax(-1)
    ids = NUCLEOTIDES.encode_letters(genome.read(1))
    turned = NUCLEOTIDES.reverse_complement(ids)
    place = Place("d", 1, 0, 44)
    track = likelihood_track(
        place, genome, NUCLEOTIDES, LogProbs(model, 9), context=0, stream=StreamConfig(segment=segment)
    )
    plus = [float("nan"), *(float(table[ids[t - 1], ids[t]]) for t in range(1, 44))]
    minus = [float("nan"), *(float(table[turned[t - 1], turned[t]]) for t in range(1, 44))][::-1]
    assert track[20:24].isnan().all()
    assert float(track[0]) == pytest.approx(minus[0])
    assert float(track[43]) == pytest.approx(plus[43])
    for t in (1, 19, 24, 42):
        assert float(track[t]) == pytest.approx((plus[t] + minus[t]) / 2)
    inner = likelihood_track(Place("d", 1, 5, 9), genome, NUCLEOTIDES, LogProbs(model, 9), context=2)
    torch.testing.assert_close(inner, track[5:9])


def test_the_track_of_a_masked_model(genome: Genome) -> None:
    """Every base is hidden alone, whatever the windows; with k-mers every token that holds it is."""
    model = TableLM(False)
    ids = NUCLEOTIDES.encode_letters(genome.read(0))
    track = likelihood_track(
        Place("c", 0, 0, 60),
        genome,
        NUCLEOTIDES,
        LogProbs(model, 9),
        strands="+",
        spacing=5,
        stream=StreamConfig(window=20, overlap=8),
    )
    wanted = [
        float((model.left[ids[t - 1]] + model.right[ids[t + 1]]).log_softmax(-1)[ids[t]])
        for t in range(1, 59)
    ]
    assert track[1:59].tolist() == pytest.approx(wanted)
    tokenizer = KmerTokenizer(3, True)
    flat = _Any(tokenizer.vocab_size)
    table = flat.left.log_softmax(-1)[0]
    kmers = tokenizer.encode_letters(genome.read(0))
    for strands in ("+", "both"):
        track = likelihood_track(Place("c", 0, 0, 60), genome, tokenizer, LogProbs(flat, 9), strands=strands)
        assert not track.isnan().any()
        if strands == "+":
            assert float(track[30]) == pytest.approx(float(table[kmers[28:31]].mean()))
            assert float(track[0]) == pytest.approx(float(table[kmers[0]]))
            assert float(track[59]) == pytest.approx(float(table[kmers[57]]))
    blocks = KmerTokenizer(3, False)
    wide = _Any(blocks.vocab_size)
    track = likelihood_track(Place("c", 0, 0, 60), genome, blocks, LogProbs(wide, 9), strands="+")
    first = blocks.encode_letters(genome.read(0))[10]
    assert track[30:33].tolist() == pytest.approx([float(wide.left.log_softmax(-1)[0, first]) / 3] * 3)
