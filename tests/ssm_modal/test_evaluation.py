"""Log-likelihoods against transformers' and by hand; the harness on tasks of our own; perplexity."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ssm_modal
from ssm_modal.cli.main import main
from ssm_modal.evaluation import score_rows, score_text
from ssm_modal.tokenizers import ByteTokenizer
from tests.ssm_modal.published import theirs

ROWS = [[1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 11, 12, 13, 14], [15, 16]]
STARTS = [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("family", "segment"), [("mamba", 1), ("falcon_mamba", 4), ("jamba", 4), ("jamba", 100)]
)
def test_log_likelihoods_are_transformers(family: str, segment: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    other = theirs(family, {})
    other.save_pretrained(tmp_path)
    found = score_rows(ssm_modal.load_pretrained(tmp_path), ROWS, STARTS, segment=segment)  # type: ignore[arg-type]
    for row, start, scored in zip(ROWS, STARTS, found):
        assert scored.logprobs.shape == (len(row) - start,)
        if len(row) == 1:
            continue
        with torch.no_grad():
            logits = other(torch.tensor([row])).logits[0]
        want = F.log_softmax(logits, -1)[range(start - 1, len(row) - 1), row[start:]]
        torch.testing.assert_close(scored.logprobs, want, rtol=1e-4, atol=1e-4)
        assert (
            scored.greedy.tolist()
            == (logits[start - 1 : -1].argmax(-1) == torch.tensor(row[start:])).tolist()
        )


def test_logits_in_pieces_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = ssm_modal.create_model("mamba_lm", vocab_size=20, d_model=16, n_layers=1)
    (whole,) = score_rows(model, [ROWS[2]], [1])
    monkeypatch.setattr("ssm_modal.evaluation.likelihood.LOGITS", 40)
    (pieces,) = score_rows(model, [ROWS[2]], [1])
    torch.testing.assert_close(pieces.logprobs, whole.logprobs)
    score = score_text(model, torch.tensor(ROWS[2]), n_bytes=16)
    assert score.targets == 8
    assert math.isclose(score.perplexity, math.exp(-float(whole.logprobs.mean())), rel_tol=1e-6)
    assert math.isclose(score.bits_per_byte, -float(whole.logprobs.sum()) / math.log(2) / 16, rel_tol=1e-6)
    with pytest.raises(ValueError, match=r"starts\[0\] is 0, expected 1 to 4"):
        score_rows(model, [ROWS[0]], [0])
    with pytest.raises(ValueError, match="starts has 1 numbers, expected 2"):
        score_rows(model, ROWS[:2], [1])
    with pytest.raises(ValueError, match="segment is 0"):
        score_rows(model, ROWS[:1], [1], segment=0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = ssm_modal.create_model("mamba_lm", vocab_size=257, d_model=16, n_layers=2, tie_embeddings=False)
    with torch.no_grad():
        for weight in model.head.parameters():  # type: ignore[union-attr, operator]
            weight.normal_(std=0.5)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    ByteTokenizer(("eos",)).save(folder / "tokenizer.json")
    return folder


def test_evaluate_measures_files_by_segments(saved: Path, tmp_path: Path, capsys: Any) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("It was the best of times. " * 20)
    (texts / "b.txt").write_text("dé")
    out = tmp_path / "out.json"
    line = ["evaluate", "--device", "cpu", "--model", str(saved), str(texts), "--output", str(out)]
    assert main([*line, "--segment", "50"]) == 0, capsys.readouterr().err
    first = json.loads(out.read_text())["texts"]
    assert main(line) == 0
    second = json.loads(out.read_text())["texts"]
    model: Any = ssm_modal.load_pretrained(saved)
    nats = 0.0
    for name, text in (("a.txt", "It was the best of times. " * 20), ("b.txt", "dé")):
        ids = torch.tensor([list(text.encode())])
        with torch.no_grad():
            loss = float(F.cross_entropy(model(ids)[0][0, :-1], ids[0, 1:], reduction="sum"))
        for found in (first, second):
            own = found[str(texts / name)]
            assert math.isclose(own["nats"], loss, rel_tol=1e-4)
            assert own["targets"] == ids.shape[1] - 1
            assert math.isclose(own["bits_per_byte"], loss / math.log(2) / (ids.shape[1] - 1), rel_tol=1e-4)
        nats += loss
    assert math.isclose(first["all"]["perplexity"], math.exp(nats / 521), rel_tol=1e-4)
    assert "perplexity" in capsys.readouterr().out
    (texts / "c.txt").write_text("x")
    assert main(line) == 1
    assert "c.txt holds 1 tokens, expected at least 2" in capsys.readouterr().err


TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: word_perplexity}}]
"""
UNTIL = """
task: tiny_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def tasks(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with three tasks over a few questions; the answers of one are the model's own."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from ssm_modal.generation import GenerationConfig, generate

    model: Any = ssm_modal.load_pretrained(saved)
    tokenizer = ByteTokenizer(("eos",))
    docs: list[dict[str, Any]] = []
    for i, question in enumerate(
        ["What is one?", "Is it so", "A longer question, with more to read, is this"]
    ):
        config = GenerationConfig(max_new_tokens=6, temperature=0, stop=("\n",))
        texts = generate(model, [tokenizer.encode(question)], config, tokenizer=tokenizer).texts
        assert texts is not None
        answer = texts[0] if i else "another"
        docs.append(
            {"question": question, "choices": [" yes", " no way", " x"], "label": i, "answer": answer}
        )
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("choice", TASK), ("rolling", ROLLING), ("until", UNTIL)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder, docs


def log_likelihood(model: Any, context: list[int], continuation: list[int]) -> float:
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logprobs = F.log_softmax(model(ids)[0][0], -1)
    at = range(len(context) - 1, ids.shape[1] - 1)
    return float(logprobs[at, continuation].sum())


def test_the_harness_gives_what_the_model_says(
    saved: Path,
    tasks: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    from lm_eval.tasks import TaskManager

    folder, docs = tasks
    out = tmp_path / "results.json"
    line = ["lm-eval", "--device", "cpu", "--model", str(saved), "--include-path", str(folder)]
    line += ["--tasks", "tiny_choice,tiny_rolling,tiny_until", "--segment", "9", "--batch-size", "2"]
    line += ["--bootstrap-iters", "0"]
    assert main([*line, "--output", str(out)]) == 0, capsys.readouterr().err
    results = json.loads(out.read_text())["results"]
    model: Any = ssm_modal.load_pretrained(saved)
    right, nats, n_bytes = 0, 0.0, 0
    for doc in docs:
        question = list(doc["question"].encode())
        said = [log_likelihood(model, question, list(choice.encode())) for choice in doc["choices"]]
        right += said.index(max(said)) == doc["label"]
        nats -= log_likelihood(model, [256], question)
        n_bytes += len(question)
    assert math.isclose(results["tiny_choice"]["acc,none"], right / 3)
    assert math.isclose(
        results["tiny_rolling"]["bits_per_byte,none"], nats / math.log(2) / n_bytes, rel_tol=1e-4
    )
    assert math.isclose(results["tiny_until"]["exact_match,none"], 2 / 3)
    own = functools.partial(
        TaskManager, include_defaults=False
    )  # the harness' own files take seconds to read
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda **options: own(include_path=options["include_path"])
    )
    assert main([*line[:7], "--tasks", "no_such_task"]) == 1
    assert "no_such_task is no task of the harness" in capsys.readouterr().err


def test_the_adapter_class_answers_as_the_harness_asks(saved: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from ssm_modal.evaluation.harness import HarnessModel

    model: Any = ssm_modal.load_pretrained(saved)
    harness = HarnessModel(model, ByteTokenizer(("eos",)), batch_size=2, segment=5)

    def ask(kind: str, *args: Any) -> Any:
        return Instance(request_type=kind, doc={}, arguments=args, idx=0)  # type: ignore[arg-type]

    asked = [("one two", " three"), ("", "x y"), ("trailing  ", "word")]
    found = harness.loglikelihood([ask("loglikelihood", *a) for a in asked], disable_tqdm=True)
    # Spaces at the end of a context go over to the continuation; an empty one is the end-of-text token.
    pairs = [(b"one two", b" three"), (None, b"x y"), (b"trailing", b"  word")]
    for (context, continuation), (nats, greedy) in zip(pairs, found):
        before = [256] if context is None else list(context)
        assert math.isclose(nats, log_likelihood(model, before, list(continuation)), rel_tol=1e-4)
        assert not greedy
    with pytest.raises(ValueError, match="hold num_beams, unknown here"):
        harness.generate_until(
            [ask("generate_until", "a", {"until": ["."], "num_beams": 4})], disable_tqdm=True
        )
    bare = HarnessModel(model, ByteTokenizer())
    with pytest.raises(ValueError, match="no end-of-text token"):
        bare.loglikelihood_rolling([ask("loglikelihood_rolling", "abc")], disable_tqdm=True)
