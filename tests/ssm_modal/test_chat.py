"""Chat templates as transformers renders them, and conversations that read only what is new."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ssm_modal
from ssm_modal.cli.chat import Conversation
from ssm_modal.cli.main import main
from ssm_modal.generation import GenerationConfig, generate
from ssm_modal.tokenizers import ByteTokenizer, ChatTemplate

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
STRICT = """{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- if loop.index > 2 %}{% break %}{% endif %}{{ bos_token }}{{ m | tojson }}{% endfor %}"""
MESSAGES = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Two — or “three”"},
    {"role": "user", "content": "Sure?"},
]


@pytest.mark.parametrize("source", [CHATML, STRICT])
@pytest.mark.parametrize("opening", [True, False])
def test_renders_as_transformers_does(source: str, opening: bool) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>")
    want = fast.apply_chat_template(
        MESSAGES, chat_template=source, tokenize=False, add_generation_prompt=opening
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render(MESSAGES, add_generation_prompt=opening) == want


def test_templates_are_found_and_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        ChatTemplate.from_folder(tmp_path)
    config = {"chat_template": "A{{ eos_token }}", "eos_token": {"content": "</s>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_folder(tmp_path).render([]) == "A</s>"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.from_folder(tmp_path).render([]) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert ChatTemplate.from_folder(tmp_path).render([]) == "J"
    with pytest.raises(ValueError, match="refuses the messages: no system role"):
        ChatTemplate(STRICT, {}).render([{"role": "system", "content": "x"}])
    with pytest.raises(ValueError, match="cannot be read"):
        ChatTemplate("{% for %}", {})
    # A template of a stranger reaches nothing of Python.
    with pytest.raises(ValueError, match="unsafe"):
        ChatTemplate("{{ ''.__class__.__mro__ }}", {}).render([])


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    model = ssm_modal.create_model("hybrid_lm", vocab_size=256, d_model=16, tie_embeddings=False)
    with torch.no_grad():
        for weight in (model.embedding.weight, *model.head.parameters()):  # type: ignore[union-attr, operator]
            weight.normal_()
        # Likely bytes are letters, so that answers decode and encode to themselves.
        model.head.proj.weight[torch.tensor([i for i in range(256) if not 97 <= i <= 122])] = 0  # type: ignore
    return model.eval()


def test_a_conversation_reads_only_what_is_new(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, template = ByteTokenizer(), ChatTemplate(CHATML, {"eos_token": "<|im_end|>"})
    config = GenerationConfig(max_new_tokens=8, temperature=0)
    read: list[int] = []
    hidden = model.hidden

    def counted(ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        read.append(ids.shape[1])
        return hidden(ids, *args, **options)

    monkeypatch.setattr(model, "hidden", counted)
    talk = Conversation(model, tokenizer, template, config, system="Be brief.")
    answers = [talk.answer("How many?"), talk.answer("Sure?")]
    turns = [read[0], read[1]]
    texts = []
    messages = [{"role": "system", "content": "Be brief."}]
    for question, answer in zip(("How many?", "Sure?"), answers):
        messages.append({"role": "user", "content": question})
        texts.append(template.render(messages))
        found = generate(model, [tokenizer.encode(texts[-1])], config, tokenizer=tokenizer).texts
        assert found == [answer]
        messages.append({"role": "assistant", "content": answer})
    assert turns == [len(texts[0]), len(texts[1]) - len(texts[0]) - len(answers[0])]
    talk.restart()
    assert talk.answer("How many?") == answers[0]
    # An answer that the template renders in another way: everything is read again, not misread.
    talk.messages[-1]["content"] = "changed"
    read.clear()
    answer = talk.answer("Sure?")
    text = template.render(talk.messages[:-1])
    assert read[0] == len(text)
    assert [answer] == generate(model, [tokenizer.encode(text)], config, tokenizer=tokenizer).texts
    assert talk.read[: len(talk.read) - 8] == tokenizer.encode(template.render(talk.messages[:-1]))


def test_chat_answers_lines_until_an_empty_one(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model.save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n/new\nHow many?\n\nmore"))
    line = [
        "chat",
        "--device",
        "cpu",
        "--model",
        str(tmp_path),
        "--temperature",
        "0",
        "--max-new-tokens",
        "8",
    ]
    assert main(line) == 0, capsys.readouterr().err
    prompt = ChatTemplate(CHATML, {}).render([{"role": "user", "content": "How many?"}])
    config = GenerationConfig(max_new_tokens=8, temperature=0)
    answer = generate(model, [list(prompt.encode())], config, tokenizer=ByteTokenizer()).texts
    assert answer is not None
    assert capsys.readouterr().out == f"{answer[0]}\n" * 2
