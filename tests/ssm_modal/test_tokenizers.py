"""Tokenizers: values by hand, round trips, streams equal to whole decoding, files written and read back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from ssm_modal.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    TextTokenizer,
    build_tokenizer,
    load_tokenizer,
    tokenizer_from_config,
)

TEXT = "Grüße, €uro 𝄞 and plain words; tab\tline\nline\r\n\n  indented \u200d👩‍👩‍👧 end"


def bpe_content() -> str:
    """A byte-level BPE `tokenizer.json`, trained here on a little text, with an end-of-text token."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the words and the plain words of the text\n"] * 20, trainer)
    return tokenizer.to_str()


def metaspace_content() -> str:
    """A word-piece-like tokenizer whose decoder strips the first word's space, as SentencePiece's does."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "▁the", "▁word", "s", "</s>"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer.to_str()


def all_tokenizers() -> list[TextTokenizer]:
    return [
        ByteTokenizer(),
        ByteTokenizer(("eos", "pad")),
        CharTokenizer.from_text(TEXT),
        HuggingFaceTokenizer.from_json(bpe_content()),
    ]


@pytest.mark.parametrize("index", range(4))
def test_round_trip_tensor_and_stream(index: int, tmp_path: Path) -> None:
    tokenizer = all_tokenizers()[index]
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(torch.tensor(ids)) == TEXT
    assert tokenizer.encode_ids(TEXT).to(torch.int64).tolist() == ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode("") == []
    assert tokenizer.encode_ids("").shape == (0,)
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == TEXT
    # No piece holds half a character.
    assert "\ufffd" not in "".join(pieces)
    # Behind a prefix the stream gives the rest.
    stream = tokenizer.stream(tokenizer.encode(TEXT[:5]))
    rest = tokenizer.encode(TEXT[5:])
    assert "".join(stream.push(i) for i in rest) + stream.finish() == TEXT[5:]
    again = load_tokenizer(tokenizer.save(tmp_path / "tokenizer.json"))
    assert type(again) is type(tokenizer)
    assert again.encode(TEXT) == ids
    assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert again.to_config() == tokenizer.to_config()
    assert again.fingerprint() == tokenizer.fingerprint()
    assert load_tokenizer(tmp_path).encode(TEXT) == ids


@pytest.mark.parametrize("index", range(4))
def test_ids_outside_the_vocabulary_are_named(index: int) -> None:
    tokenizer = all_tokenizers()[index]
    top = tokenizer.vocab_size - 1
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"ids\[1\] is {bad}, expected 0 to {top}"):
            tokenizer.decode([0, bad])


def test_bytes_are_utf8_and_specials_follow() -> None:
    plain, special = ByteTokenizer(), ByteTokenizer(("pad", "eos"))
    assert plain.encode("aé€") == [0x61, 0xC3, 0xA9, 0xE2, 0x82, 0xAC]
    assert (plain.vocab_size, plain.eos_id, plain.pad_id) == (256, None, None)
    assert (special.vocab_size, special.pad_id, special.eos_id) == (258, 256, 257)
    assert special.decode([0x61, 257, 0x62, 256]) == "ab"
    assert plain.fingerprint() != special.fingerprint()
    with pytest.raises(ValueError, match=r"specials is \['bos'\]"):
        ByteTokenizer(["bos"])
    with pytest.raises(ValueError, match="lone surrogate"):
        plain.encode("a\ud800")


def test_invalid_bytes_decode_to_the_replacement_character() -> None:
    tokenizer = ByteTokenizer()
    for ids in ([0x61, 0xFF, 0x62], [0xE2, 0x82, 0x61], [0xE2, 0x82], [0xC3], [0x80, 0x80]):
        whole = bytes(ids).decode("utf-8", "replace")
        stream = tokenizer.stream()
        assert "".join(stream.push(i) for i in ids) + stream.finish() == whole == tokenizer.decode(ids)
    stream = tokenizer.stream()
    assert [stream.push(i) for i in "€a".encode()] == ["", "", "€", "a"]


def test_characters_are_sorted_and_others_raise() -> None:
    tokenizer = CharTokenizer.from_text(["hello", " world"])
    assert "".join(tokenizer.characters) == " dehlorw"
    assert tokenizer.encode("hold") == [3, 5, 4, 1]
    assert tokenizer.eos_id is None
    for encode in (tokenizer.encode, tokenizer.encode_ids):
        with pytest.raises(
            ValueError, match=r"text has '€' \(U\+20AC\) at character 2, expected one of the 8"
        ):
            encode("he€lo")
    with pytest.raises(ValueError, match="text is empty"):
        CharTokenizer.from_text("")
    with pytest.raises(ValueError, match="a character twice"):
        CharTokenizer("aa")
    with pytest.raises(ValueError, match="single characters"):
        CharTokenizer(["ab"])


def test_huggingface_finds_its_end_of_text_and_adds_nothing() -> None:
    tokenizer = HuggingFaceTokenizer.from_json(bpe_content())
    assert tokenizer.eos_id == 0
    assert tokenizer.eos_token == "<|endoftext|>"
    # Written out in the text the special token is one id; decoding leaves it out.
    ids = tokenizer.encode("the words<|endoftext|>")
    assert ids[-1] == 0
    assert tokenizer.decode(ids) == "the words"
    assert len(tokenizer.encode("the words and the plain words")) < 29 / 2
    assert HuggingFaceTokenizer.from_json(bpe_content(), guess_eos=False).eos_id is None
    with pytest.raises(ValueError, match="eos_token is '<end>', which is not in"):
        HuggingFaceTokenizer.from_json(bpe_content(), eos_token="<end>")
    with pytest.raises(ValueError, match=r"no Hugging Face tokenizer\.json"):
        HuggingFaceTokenizer.from_json("{}")


def test_huggingface_ignores_truncation_and_padding_of_the_file() -> None:
    content = json.loads(bpe_content())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    plain = HuggingFaceTokenizer.from_json(bpe_content())
    assert HuggingFaceTokenizer.from_json(json.dumps(content)).encode(TEXT) == plain.encode(TEXT)


def test_huggingface_stream_keeps_the_space_of_a_first_word() -> None:
    tokenizer = HuggingFaceTokenizer.from_json(metaspace_content())
    assert tokenizer.eos_id == 4
    ids = tokenizer.encode("the word the")
    assert ids == [1, 2, 1]
    assert tokenizer.decode(ids[1:]) == "word the"  # alone, the first word loses its space
    stream = tokenizer.stream(ids[:1])
    assert [stream.push(i) for i in ids[1:]] == [" word", " the"]


def test_huggingface_reads_a_plain_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe_content(), encoding="utf-8")
    for spec in (str(tmp_path), str(tmp_path / "tokenizer.json")):
        tokenizer = build_tokenizer(spec)
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        assert tokenizer.eos_id == 0
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bpe_content()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'ssm-modal\[text\]'"):
        HuggingFaceTokenizer.from_json(content)


def test_build_tokenizer_by_name_and_errors(tmp_path: Path) -> None:
    assert build_tokenizer("byte").vocab_size == 256
    assert build_tokenizer("byte+eos").eos_id == 256
    assert build_tokenizer("char", ["ab", "c"]).vocab_size == 3
    byte = ByteTokenizer(("eos",))
    assert build_tokenizer(byte) is byte
    assert build_tokenizer(byte.to_config()).eos_id == 256
    with pytest.raises(ValueError, match="no text was given"):
        build_tokenizer("char")
    with pytest.raises(FileNotFoundError, match=r"tokenizer is 'bytes', expected \"byte\""):
        build_tokenizer("bytes")
    with pytest.raises(TypeError, match="got int"):
        build_tokenizer(3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json': there is no such file"):
        load_tokenizer(tmp_path)
    for content, word in (("no json", "is no tokenizer"), ("[1]", "got list"), ('{"a": 1}', "has the keys")):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=word):
            load_tokenizer(tmp_path)
    for config, word in (
        ({"ssm_modal_tokenizer": "word"}, "expected one of"),
        ({"ssm_modal_tokenizer": "byte", "special": []}, "unknown keys"),
        ({"ssm_modal_tokenizer": "char"}, "lacks the key 'characters'"),
    ):
        with pytest.raises(ValueError, match=word):
            tokenizer_from_config(config)
