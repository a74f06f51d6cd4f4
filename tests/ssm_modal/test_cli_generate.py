"""`ssm-modal generate`: what it prints, the tokenizer it finds, what it says when it cannot."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ssm_modal
from ssm_modal.cli.generate import _Printer
from ssm_modal.cli.language_model import find_tokenizer
from ssm_modal.cli.main import main
from ssm_modal.generation import GenerationConfig, generate
from ssm_modal.models import CausalLM
from ssm_modal.tokenizers import ByteTokenizer, CharTokenizer

CHARACTERS = "abcdefghijklmnop \n"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small random model over characters, saved with its tokenizer."""
    torch.manual_seed(0)
    model = ssm_modal.create_model(
        "mamba_lm", vocab_size=len(CHARACTERS), d_model=16, n_layers=1, tie_embeddings=False
    )
    with torch.no_grad():
        for weight in (model.embedding.weight, *model.head.parameters()):
            weight.normal_()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    CharTokenizer(CHARACTERS).save(folder / "tokenizer.json")
    return folder


def expected(folder: Path, prompts: list[str], **settings: object) -> list[str]:
    tokenizer = CharTokenizer(CHARACTERS)
    model = ssm_modal.load_pretrained(folder)
    assert isinstance(model, CausalLM)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    result = generate(model, ids, GenerationConfig(**settings), tokenizer=tokenizer)  # type: ignore[arg-type]
    assert result.texts is not None
    return result.texts


def line(*options: object) -> int:
    return main(["generate", "--device", "cpu", *(str(o) for o in options)])


def test_prints_prompt_and_text(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--model", saved, "--prompt", "abc", "--max-new-tokens", 30)
    assert line(*common, "--temperature", 0) == 0
    (text,) = expected(saved, ["abc"], max_new_tokens=30, temperature=0)
    assert capsys.readouterr().out == "abc" + text + ("" if text.endswith("\n") else "\n")
    assert (
        line(*common, "--seed", 3, "--top-k", 9, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1)
        == 0
    )
    settings = {"seed": 3, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
    (text,) = expected(saved, ["abc"], max_new_tokens=30, **settings)
    streamed = capsys.readouterr().out
    assert streamed == "abc" + text + ("" if text.endswith("\n") else "\n")
    assert line(*common, "--seed", 3, "--no-stream") == 0
    assert line(*common, "--seed", 3) == 0
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :]


def test_stop_ends_the_text(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = expected(saved, ["abc"], max_new_tokens=60, seed=1)
    stop = text[20:22]
    assert line("--model", saved, "--prompt", "abc", "--max-new-tokens", 60, "--seed", 1, "--stop", stop) == 0
    assert capsys.readouterr().out.rstrip("\n") == ("abc" + text[: text.index(stop)]).rstrip("\n")


def test_several_prompts_are_printed_in_numbered_lines(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("ab\ncd")
    prompts = ["abc", "p", "ab\ncd"]
    options = ("--model", saved, "--prompt", "abc", "--prompt", "p", "--prompt-file", tmp_path / "prompt.txt")
    texts = expected(saved, prompts, max_new_tokens=50, seed=2)
    assert any("\n" in text for text in texts)
    for extra in ((), ("--no-stream",)):
        assert line(*options, "--max-new-tokens", 50, "--seed", 2, *extra) == 0
        printed = capsys.readouterr().out.splitlines()
        for row, (prompt, text) in enumerate(zip(prompts, texts), 1):
            whole = prompt + text
            lines = whole.removesuffix("\n").split("\n")
            assert [p.removeprefix(f"[{row}] ") for p in printed if p.startswith(f"[{row}] ")] == lines
        assert all(p[0] == "[" for p in printed)


def test_tokens_are_printed_as_they_come() -> None:
    out = io.StringIO()
    printer = _Printer(["ab"], out, stream=True)
    printer.start()
    assert out.getvalue() == "ab"
    printer.add(0, "c")
    assert out.getvalue() == "abc"
    printer.finish()
    assert out.getvalue() == "abc\n"
    out = io.StringIO()
    printer = _Printer(["a\nb", "x"], out, stream=True)
    printer.start()
    printer.add(1, "y\nz")
    printer.add(0, "c")
    assert out.getvalue() == "[1] a\n[2] xy\n"
    printer.finish()
    assert out.getvalue() == "[1] a\n[2] xy\n[1] bc\n[2] z\n"


def test_a_terminal_that_cannot_show_a_character_goes_on() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    printer = _Printer(["a€b"], out, stream=True)
    printer.start()
    printer.finish()
    assert raw.getvalue() == b"a?b\n"


def test_tokenizer_is_found_beside_the_checkpoint_in_the_run_or_in_the_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint = run / "checkpoints" / "last.ckpt"
    stored = json.dumps(CharTokenizer("xyz").to_config())
    torch.save({"state_dict": {}, "TextDataModule": {"tokenizer": stored}, "epoch": 0}, checkpoint)
    for place in (run, checkpoint):
        assert find_tokenizer(str(place)).vocab_size == 3
    CharTokenizer("abcd").save(run / "tokenizer.json")
    for place in (run, checkpoint):
        assert find_tokenizer(str(place)).vocab_size == 4
    assert isinstance(find_tokenizer(str(run), "byte"), ByteTokenizer)
    assert find_tokenizer(str(tmp_path), str(run / "tokenizer.json")).vocab_size == 4


def test_a_repository_brings_its_tokenizer(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    ByteTokenizer().save(tmp_path / "tokenizer.json")  # not the repository's: nothing may take it
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(saved))
    common = ("--prompt", "abc", "--max-new-tokens", 5, "--temperature", 0)
    assert line("--model", saved, *common) == 0
    wanted = capsys.readouterr().out
    assert line("--model", "someone/some-model", *common) == 0
    assert capsys.readouterr().out == wanted


def error(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    assert line(*options) != 0
    caught = capsys.readouterr()
    assert "Traceback" not in caught.err
    assert caught.out == ""
    return caught.err


def test_errors_say_what_is_wrong(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", saved)
    abc = (*model, "--prompt", "abc")
    assert "no prompt is given" in error(capsys, *model)
    assert "--prompt is empty" in error(capsys, *model, "--prompt", "")
    assert "there is no such file" in error(capsys, *model, "--prompt-file", tmp_path / "gone.txt")
    (tmp_path / "zero.bin").write_bytes(b"a\0")
    assert "byte 1 is NUL" in error(capsys, *model, "--prompt-file", tmp_path / "zero.bin")
    assert "text has 'Z' (U+005A) at character 2" in error(capsys, *model, "--prompt", "abZ")
    assert "temperature is -1.0" in error(capsys, *abc, "--temperature", -1)
    assert "top_p is 2.0" in error(capsys, *abc, "--top-p", 2)
    assert "--device is 'gpu'" in error(capsys, *abc, "--device", "gpu")
    if not torch.cuda.is_available():
        assert "torch finds no NVIDIA GPU" in error(capsys, *abc, "--device", "cuda")
    gone = tmp_path / "gone"
    assert str(gone) in error(capsys, "--model", gone, "--prompt", "a")
    assert "the tokenizer has 256 ids, but the model knows 18" in error(capsys, *abc, "--tokenizer", "byte")
    assert '--tokenizer is "char"' in error(capsys, *abc, "--tokenizer", "char")
    (saved / "tokenizer.json").unlink()
    message = error(capsys, *abc)
    assert "there is no tokenizer.json in" in message
    assert "--tokenizer" in message


def test_runs_as_a_program(saved: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ssm_modal.cli.main",
        "generate",
        "--model",
        str(saved),
        "--prompt",
        "abc",
    ]
    done = subprocess.run(
        [*command, "--max-new-tokens", "5", "--device", "cpu", "--temperature", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (text,) = expected(saved, ["abc"], max_new_tokens=5, temperature=0)
    assert done.stdout == "abc" + text + ("" if text.endswith("\n") else "\n")


def test_a_state_is_kept_and_taken_up_for_several_prompts(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--model", saved, "--temperature", 0, "--max-new-tokens", 8)
    file = tmp_path / "state.safetensors"
    assert line(*common, "--prompt", "abc", "--save-state", file) == 0
    (first,) = expected(saved, ["abc"], temperature=0, max_new_tokens=8)
    capsys.readouterr()
    assert line(*common, "--prompt", "de", "--prompt", "f", "--state", file, "--no-stream") == 0
    texts = expected(saved, [f"abc{first}de", f"abc{first}f"], temperature=0, max_new_tokens=8)
    out = capsys.readouterr().out
    for row, (prompt, text) in enumerate(zip(("de", "f"), texts)):
        assert "".join(f"[{row + 1}] {part}\n" for part in f"{prompt}{text}".split("\n") if part) in out
    assert line(*common, "--prompt", "a", "--prompt", "b", "--save-state", file) == 1
    assert "--save-state is given with 2 prompts, expected one" in capsys.readouterr().err
    other = tmp_path / "other"
    torch.manual_seed(1)
    ssm_modal.create_model("mamba_lm", vocab_size=len(CHARACTERS), d_model=16, n_layers=1).save_pretrained(
        other
    )
    CharTokenizer(CHARACTERS).save(other / "tokenizer.json")
    assert line("--model", other, "--prompt", "a", "--state", file) == 1
    assert "is the state of another model" in capsys.readouterr().err


def test_weights_are_packed_by_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = ssm_modal.create_model("mamba_lm", vocab_size=len(CHARACTERS), d_model=64, n_layers=1)
    model.save_pretrained(tmp_path)
    CharTokenizer(CHARACTERS).save(tmp_path / "tokenizer.json")
    common = ("--model", tmp_path, "--prompt", "abc", "--temperature", 0, "--max-new-tokens", 5)
    assert line(*common, "--quantize", "int8") == 0
    packed = ssm_modal.load_pretrained(tmp_path, quantize="int8")
    config = GenerationConfig(temperature=0, max_new_tokens=5)
    texts = generate(
        packed, [CharTokenizer(CHARACTERS).encode("abc")], config, tokenizer=CharTokenizer(CHARACTERS)
    )  # type: ignore[arg-type]
    assert texts.texts is not None
    assert capsys.readouterr().out.strip("\n") == f"abc{texts.texts[0]}".strip("\n")
