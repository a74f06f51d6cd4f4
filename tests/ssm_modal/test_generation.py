"""Generation: sampling against values by hand, and the laws of the step loop on every kind of mixer."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

import ssm_modal
from ssm_modal.errors import StateError
from ssm_modal.generation import GenerationConfig, StopMatcher, generate, prefill
from ssm_modal.generation.sampling import (
    NO_TOKEN,
    choose,
    draw,
    filtered,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)
from ssm_modal.generation.stopping import RowText
from ssm_modal.models import CausalLM
from ssm_modal.tokenizers import ByteTokenizer, CharTokenizer

INF = math.inf
MODELS = ["mamba_lm", "s4d_lm", "transformer_lm", "hybrid_lm"]
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12], [13, 14]]
GREEDY = GenerationConfig(max_new_tokens=8, temperature=0)


def small(name: str = "mamba_lm", vocab_size: int = 40, spread: float = 1.0) -> CausalLM:
    """A small model, random enough for what it says to depend on what it has read, and for no two to be
    so nearly as likely that rounding could change a choice."""
    torch.manual_seed(3)
    layers = {} if name == "hybrid_lm" else {"n_layers": 2}
    model = ssm_modal.create_model(name, vocab_size=vocab_size, d_model=16, tie_embeddings=False, **layers)
    assert isinstance(model, CausalLM)
    with torch.no_grad():
        for weight in (model.embedding.weight, *model.head.parameters()):
            weight.normal_(std=spread)
        for block in model.backbone.layers:
            for weight in block.residual_weights():
                weight.mul_(16)
    return model.eval()


def reforward(model: CausalLM, prompt: list[int], steps: int) -> list[int]:
    """Greedy by the definition: the whole text again for every token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids[len(prompt) :]


# Sampling


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def kept(logits: Tensor) -> list[bool]:
    return (logits[0] > -INF).tolist()


def test_repetition_penalty_is_ctrls_formula() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0, 0.0]])
    seen = torch.tensor([[True, True, False, False, True]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 3.0, -3.0, 0.0]]
    assert penalise_repetition(logits, seen, 0.5).tolist() == [[4.0, -1.0, 3.0, -3.0, 0.0]]


def test_top_k_keeps_k_and_ties() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0], [2.0, 1.0, 2.0, 5.0]])
    assert keep_top_k(logits, 2).tolist() == [[-INF, 4.0, -INF, 3.0], [2.0, -INF, 2.0, 5.0]]
    assert keep_top_k(logits, 1).tolist() == [[-INF, 4.0, -INF, -INF], [-INF, -INF, -INF, 5.0]]
    assert torch.equal(keep_top_k(logits, 9), logits)


def test_top_p_keeps_the_fewest_that_reach_p() -> None:
    logits = logits_of(0.1, 0.5, 0.15, 0.25)
    assert kept(keep_top_p(logits, 0.45)) == [False, True, False, False]
    assert kept(keep_top_p(logits, 0.55)) == [False, True, False, True]
    assert kept(keep_top_p(logits, 0.74)) == [False, True, False, True]
    assert kept(keep_top_p(logits, 0.76)) == [False, True, True, True]
    assert kept(keep_top_p(logits, 0.95)) == [True, True, True, True]
    # The likeliest stays, however small p is.
    assert kept(keep_top_p(logits, 1e-12)) == [False, True, False, False]


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = logits_of(0.1, 0.5, 0.15, 0.25)
    assert kept(keep_min_p(logits, 0.19)) == [True, True, True, True]
    assert kept(keep_min_p(logits, 0.21)) == [False, True, True, True]
    assert kept(keep_min_p(logits, 0.4)) == [False, True, False, True]
    assert kept(keep_min_p(logits, 1.0)) == [False, True, False, False]


def test_filters_work_in_order_and_after_the_temperature() -> None:
    logits = logits_of(0.1, 0.5, 0.15, 0.25)
    # At temperature 1/2 the probabilities are squared: 0.01, 0.25, 0.0225, 0.0625 of 0.345.
    out = filtered(logits, GenerationConfig(temperature=0.5))
    assert torch.allclose(
        out.softmax(-1), torch.tensor([[0.01, 0.25, 0.0225, 0.0625]], dtype=torch.float64) / 0.345
    )
    assert kept(filtered(logits, GenerationConfig(temperature=0.5, min_p=0.1))) == [False, True, False, True]
    # top-p sees the probabilities among the top k: 0.5 / 0.75 = 0.667 already reaches 0.6.
    assert kept(filtered(logits, GenerationConfig(top_k=2, top_p=0.6))) == [False, True, False, False]
    assert kept(filtered(logits, GenerationConfig(top_p=0.6))) == [False, True, False, True]
    assert filtered(torch.zeros(1, 3, dtype=torch.bfloat16), GenerationConfig()).dtype == torch.float32


def test_draw_inverts_the_cumulated_probabilities() -> None:
    logits = logits_of(0.25, 0.5, 0.25).expand(5, 3)
    uniform = torch.tensor([0.0, 0.249, 0.251, 0.749, 0.751], dtype=torch.float64)
    assert draw(logits, uniform).tolist() == [0, 0, 1, 1, 2]
    # A token of probability 0 is never drawn, not at either end.
    holes = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]]).expand(2, 5)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(holes, ends).tolist() == [1, 3]


def test_choose_marks_rows_without_a_token() -> None:
    logits = torch.tensor([[0.0, 1.0], [math.nan, 0.0], [-INF, -INF], [-INF, 0.0]])
    half = torch.full((4,), 0.5, dtype=torch.float64)
    assert choose(logits, GREEDY, None, None).tolist() == [1, NO_TOKEN, NO_TOKEN, 1]
    sampled = choose(logits, GenerationConfig(top_k=1), half, None).tolist()
    assert sampled == [1, NO_TOKEN, NO_TOKEN, 1]


@pytest.mark.parametrize(
    "config", [GenerationConfig(), GenerationConfig(temperature=0.7, top_p=0.9, min_p=0.1)]
)
def test_frequencies_of_a_sampled_token(config: GenerationConfig) -> None:
    model = small(vocab_size=6, spread=0.3)
    logits, _ = prefill(model, [[1, 2]])
    expected = filtered(logits, config).softmax(-1)[0]
    assert int((expected > 0.05).sum()) > 1
    n = 1500
    result = generate(model, [[1, 2]] * n, dataclasses.replace(config, max_new_tokens=1, seed=5))
    counts = Counter(tokens[0] for tokens in result.tokens)
    for token, p in enumerate(expected.tolist()):
        assert abs(counts[token] - n * p) <= 4.5 * math.sqrt(n * p * (1 - p)) + 1e-9


# The step loop


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_argmax_of_the_whole_text_read_again(name: str) -> None:
    model = small(name)
    result = generate(model, PROMPTS, GREEDY)
    assert result.tokens == [reforward(model, prompt, 8) for prompt in PROMPTS]
    assert result.finish == ["length"] * 4
    # Not one token over and over, or the law would say little.
    assert len({t for row in result.tokens for t in row}) > 8


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "config", [GREEDY, GenerationConfig(max_new_tokens=8, repetition_penalty=1.3, top_k=20)]
)
def test_a_row_does_not_depend_on_the_others(name: str, config: GenerationConfig) -> None:
    model = small(name)
    config = dataclasses.replace(config, seed=7)
    together = generate(model, PROMPTS, config)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], dataclasses.replace(config, seed=7 + row))
        assert alone.tokens[0] == together.tokens[row]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [1, 3, 5, 100])
def test_prefill_in_pieces_equals_prefill_at_once(name: str, budget: int) -> None:
    model = small(name).double()
    logits, _ = prefill(model, PROMPTS, prefill_tokens=budget)
    for row, prompt in enumerate(PROMPTS):
        whole = model(torch.tensor([prompt]))[0][0, -1]
        assert torch.allclose(logits[row], whole, rtol=1e-9, atol=1e-9)
    config = dataclasses.replace(GREEDY, prefill_tokens=budget)
    assert generate(model, PROMPTS, config).tokens == generate(model, PROMPTS, GREEDY).tokens


def test_prefill_reads_at_most_its_budget_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    read: list[int] = []
    hidden = model.hidden

    def counted(ids: Tensor, *args: object, **options: object) -> object:
        read.append(ids.shape[1])
        return hidden(ids, *args, **options)

    monkeypatch.setattr(model, "hidden", counted)
    prefill(model, [[1] * 100, [2] * 10], prefill_tokens=16)
    assert sum(read) == 110
    assert max(read) <= 16


@pytest.mark.parametrize("name", MODELS)
def test_going_on_from_a_state_equals_having_read_the_prefix(name: str) -> None:
    model = small(name)
    prefix, rest = [[1, 2, 3], [4, 5]], [[6], [7, 8, 9]]
    whole = generate(model, [a + b for a, b in zip(prefix, rest)], GREEDY)
    _, state = prefill(model, prefix)
    before = [t.clone() for t in state.tensors()]
    assert generate(model, rest, GREEDY, state=state).tokens == whole.tokens
    assert generate(model, rest, GREEDY).tokens != whole.tokens
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors()))
    # The states that come back have read the prompt and every new token, rows that ended early too.
    eos = whole.tokens[0][3]
    for config in (GREEDY, dataclasses.replace(GREEDY, eos_id=eos)):
        result = generate(model, PROMPTS, config, return_states=True)
        assert result.states is not None
        for row, prompt in enumerate(PROMPTS):
            again = generate(model, [[2, 3]], GREEDY, state=result.states[row])
            expected = generate(model, [prompt + result.tokens[row] + [2, 3]], GREEDY)
            assert again.tokens == expected.tokens


def test_rows_end_at_eos_and_leave_the_others_alone() -> None:
    model = small()
    free = generate(model, PROMPTS, GREEDY).tokens
    # The first token that some rows give and others do not.
    eos = next(t for t in range(40) if 0 < sum(t in row for row in free) < 4)
    result = generate(model, PROMPTS, dataclasses.replace(GREEDY, eos_id=eos))
    for got, finish, full in zip(result.tokens, result.finish, free):
        assert got == (full[: full.index(eos)] if eos in full else full)
        assert finish == ("eos" if eos in full else "length")
    assert set(result.finish) == {"eos", "length"}
    assert generate(model, PROMPTS, dataclasses.replace(GREEDY, eos_id=eos, stop_at_eos=False)).tokens == free


def test_seed_decides_and_rows_differ() -> None:
    model = small(spread=0.3)
    config = GenerationConfig(max_new_tokens=12, seed=11)
    first = generate(model, [[1, 2]] * 3, config).tokens
    assert generate(model, [[1, 2]] * 3, config).tokens == first
    assert len({tuple(t) for t in first}) == 3
    assert generate(model, [[1, 2]] * 3, dataclasses.replace(config, seed=99)).tokens != first
    free = dataclasses.replace(config, seed=None)
    torch.manual_seed(1)
    a = generate(model, [[1, 2]], free).tokens
    b = generate(model, [[1, 2]], free).tokens
    torch.manual_seed(1)
    assert generate(model, [[1, 2]], free).tokens == a != b


def test_repetition_penalty_counts_prompt_and_new_tokens() -> None:
    model = small()
    prompt, ids = [1, 2, 3], [1, 2, 3]
    for _ in range(10):
        logits = model(torch.tensor([ids]))[0][0, -1]
        for token in set(ids):
            logits[token] = logits[token] / 1.8 if logits[token] > 0 else logits[token] * 1.8
        ids.append(int(logits.argmax()))
    config = GenerationConfig(max_new_tokens=10, temperature=0, repetition_penalty=1.8)
    assert generate(model, [prompt], config).tokens == [ids[3:]]
    assert ids[3:] != reforward(model, prompt, 10)


def test_tokens_are_told_as_they_come() -> None:
    model = small()
    told: list[tuple[int, int]] = []
    result = generate(model, PROMPTS, GREEDY, on_token=lambda row, token: told.append((row, token)))
    assert [row for row, _ in told] == [0, 1, 2, 3] * 8
    assert [[t for r, t in told if r == row] for row in range(4)] == result.tokens


def test_model_keeps_its_mode_and_gets_no_gradients() -> None:
    model = small()
    model.train()
    model.head.eval()
    result = generate(model, [[1]], GREEDY, return_states=True)
    assert model.training
    assert not model.head.training
    assert result.states is not None
    assert not any(t.requires_grad for t in result.states[0].tensors())


# Texts


class Scripted(torch.nn.Module):
    """Gives a fixed text, whatever it reads: its state counts the steps (through the real model's state)."""

    def __init__(self, script: bytes, vocab_size: int = 256) -> None:
        super().__init__()
        self.inner = small(vocab_size=vocab_size)
        self.config = self.inner.config
        self.script, self.step = script, 0

    def hidden(self, ids: Tensor, state: object = None, *, seqs: object = None) -> tuple[Tensor, object]:
        return self.inner.hidden(ids, state, seqs=seqs)  # type: ignore[arg-type]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._next(hidden.shape[0])

    def step_(self, ids: Tensor, state: object) -> Tensor:
        return self._next(ids.shape[0])[:, None]

    def _next(self, rows: int) -> Tensor:
        out = torch.zeros(rows, self.config.vocab_size)
        out[:, self.script[self.step]] = 1.0
        self.step += 1
        return out


def scripted(script: str | bytes, **settings: object) -> tuple[list[str], str, str, int]:
    """(pieces told, text, finish, number of tokens) of a scripted run."""
    data = script.encode() if isinstance(script, str) else script
    options = {"max_new_tokens": len(data), "temperature": 0, **settings}
    pieces: list[str] = []
    result = generate(
        Scripted(data),
        [[65]],
        GenerationConfig(**options),  # type: ignore[arg-type]
        tokenizer=ByteTokenizer(),
        on_text=lambda row, text: pieces.append(text),
    )
    assert result.texts is not None
    assert "".join(pieces) == result.texts[0]
    return pieces, result.texts[0], result.finish[0], len(result.tokens[0])


def test_stop_texts_are_found_across_tokens_and_cut() -> None:
    assert scripted("one two END three", stop=("END",)) == (list("one two "), "one two ", "stop", 11)
    # What looked like a stop text and was not comes late, but comes.
    pieces, text, finish, _ = scripted("a ENx b", stop=("END",))
    assert (pieces, text, finish) == (["a", " ", "ENx", " ", "b"], "a ENx b", "length")
    # Still held back when the tokens run out.
    assert scripted("abcEN", stop=("END",))[1:3] == ("abcEN", "length")
    assert scripted("aab", stop=("ab",))[1:3] == ("a", "stop")
    assert scripted("x\n\ny", stop=("\n\n",))[1:3] == ("x", "stop")
    assert scripted("END", stop=("END",))[1:3] == ("", "stop")
    # The first complete one counts; of two that end together, the longer.
    assert scripted("abcd", stop=("bcd", "c"))[1:3] == ("ab", "stop")
    assert scripted("abcd", stop=("c", "bc"))[1:3] == ("a", "stop")
    assert scripted("a€b", stop=("€",))[1:] == ("a", "stop", 4)


def test_matcher_agrees_with_a_search_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        text = "".join("ab"[i] for i in torch.randint(2, (12,), generator=generator).tolist())
        stops = tuple(
            "".join("ab"[i] for i in torch.randint(2, (n,), generator=generator).tolist())
            for n in torch.randint(2, 5, (2,), generator=generator).tolist()
        )
        ends = [(text.find(s) + len(s), -len(s)) for s in stops if s in text]
        expected = text if not ends else text[: min(ends)[0] + min(ends)[1]]
        for size in (1, 2, 5, 12):
            matcher = StopMatcher(stops)
            out = "".join(matcher.push(text[i : i + size]) for i in range(0, 12, size)) + matcher.finish()
            assert out == expected
            assert matcher.stopped == bool(ends)


def test_text_comes_in_whole_characters() -> None:
    assert scripted("aé€") == (["a", "é", "€"], "aé€", "length", 6)
    # A character cut off by the limit shows as a replacement.
    assert scripted("a€".encode()[:3])[0] == ["a", "\ufffd"]
    row = RowText(ByteTokenizer().stream(), ("\ufffd",))
    assert [row.push(0x61), row.push(0xE2), row.finish(), row.stopped] == ["a", "", "", True]


def test_tokens_beyond_the_tokenizer_are_never_chosen() -> None:
    model = small(vocab_size=40)
    tokenizer = CharTokenizer([chr(97 + i) for i in range(20)])
    free = generate(model, PROMPTS, dataclasses.replace(GREEDY, max_new_tokens=20))
    assert max(map(max, free.tokens)) >= 20
    bound = generate(model, PROMPTS, dataclasses.replace(GREEDY, max_new_tokens=20), tokenizer=tokenizer)
    assert max(map(max, bound.tokens)) < 20
    assert bound.texts == [tokenizer.decode(t) for t in bound.tokens]


def test_tokenizers_end_of_text_ends_a_row() -> None:
    model = Scripted(bytes([97, 98]) + bytes([0]), vocab_size=257)
    model.script = [97, 98, 256, 99]  # type: ignore[assignment]
    result = generate(model, [[65]], GREEDY, tokenizer=ByteTokenizer(("eos",)))
    assert (result.tokens, result.finish, result.texts) == ([[97, 98]], ["eos"], ["ab"])


# Errors


@pytest.mark.parametrize(
    ("settings", "error", "word"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0, expected 1 or more"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens is 2.5, expected a whole number"),
        ({"temperature": -1}, ValueError, "temperature is -1, expected 0 or more"),
        ({"temperature": math.nan}, ValueError, "temperature is nan"),
        ({"temperature": "1"}, TypeError, "temperature is '1'"),
        ({"top_k": 0}, ValueError, "top_k is 0"),
        ({"top_p": 0}, ValueError, "top_p is 0, expected more than 0 and at most 1"),
        ({"top_p": 1.1}, ValueError, "top_p is 1.1"),
        ({"min_p": -0.1}, ValueError, "min_p is -0.1"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty is 0"),
        ({"stop": "END"}, TypeError, "stop is the string 'END'"),
        ({"stop": ("",)}, ValueError, "stop holds an empty string"),
        ({"stop": (3,)}, TypeError, "stop holds 3"),
        ({"eos_id": -1}, ValueError, "eos_id is -1"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": 1 << 62}, ValueError, r"expected less than 2\^62"),
        ({"prefill_tokens": 0}, ValueError, "prefill_tokens is 0"),
    ],
)
def test_bad_settings_are_named(settings: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        GenerationConfig(**settings)


def test_bad_prompts_are_named() -> None:
    model = small()
    for prompts, error, word in (
        ([], ValueError, "prompts is empty"),
        ("abc", TypeError, "prompts is a str"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "prompts is a Tensor"),
        (["abc"], TypeError, r"prompts\[0\] is a string"),
        ([[1], []], ValueError, r"prompts\[1\] is empty"),
        ([[1], [2, 40]], ValueError, r"prompts\[1\] holds id 40 at position 1, expected 0 to 39"),
        ([[-1]], ValueError, r"prompts\[0\] holds id -1 at position 0"),
        ([[0.5]], TypeError, r"prompts\[0\] has dtype torch.float32"),
        ([torch.zeros(1, 2, dtype=torch.int64)], ValueError, r"prompts\[0\] has shape \(1, 2\)"),
    ):
        with pytest.raises(error, match=word):
            generate(model, prompts, GREEDY)
    with pytest.raises(ValueError, match="stop is given without a tokenizer"):
        generate(model, [[1]], GenerationConfig(stop=("a",)))
    with pytest.raises(ValueError, match="on_text is given without a tokenizer"):
        generate(model, [[1]], GREEDY, on_text=lambda row, text: None)
    with pytest.raises(StateError, match="state has 2 rows, expected 1"):
        generate(model, [[1]], GREEDY, state=model.init_state(2))
    with pytest.raises(StateError, match="state is a dict"):
        generate(model, [[1]], GREEDY, state={})  # type: ignore[arg-type]


def test_nan_is_reported_with_its_row() -> None:
    with pytest.raises(RuntimeError, match=r"logits for row 1 hold NaN .*, after 0 new tokens"):
        generate(_nan_on(7), [[1], [7]], GREEDY)


def _nan_on(token: int) -> CausalLM:
    """A model whose logits are NaN once it has read `token`."""
    model = small()
    embed = model.embedding.forward

    def forward(ids: Tensor) -> Tensor:
        return embed(ids).masked_fill((ids == token)[..., None], math.nan)

    model.embedding.forward = forward  # type: ignore[method-assign]
    return model


def test_generation_on_the_device(device: torch.device) -> None:
    model = small().to(device)
    result = generate(model, PROMPTS, dataclasses.replace(GREEDY, repetition_penalty=1.2, seed=1))
    expected = generate(small(), PROMPTS, dataclasses.replace(GREEDY, repetition_penalty=1.2, seed=1))
    assert result.tokens == expected.tokens
    sampled = GenerationConfig(max_new_tokens=8, top_k=10, top_p=0.9, min_p=0.05, seed=1)
    tensors = [torch.tensor(p, device=device) for p in PROMPTS]
    assert generate(model, tensors, sampled).tokens == generate(small(), PROMPTS, sampled).tokens
