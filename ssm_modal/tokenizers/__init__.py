"""Tokenizers: what turns a file's content into ids and back."""

from __future__ import annotations

from ssm_modal.tokenizers.base import StreamDecoder, TextTokenizer
from ssm_modal.tokenizers.chat_template import ChatTemplate
from ssm_modal.tokenizers.dna import DNATokenizer, NucleotideTokenizer
from ssm_modal.tokenizers.huggingface import HuggingFaceTokenizer
from ssm_modal.tokenizers.kmers import KmerTokenizer
from ssm_modal.tokenizers.text import (
    ByteTokenizer,
    CharTokenizer,
    build_tokenizer,
    load_tokenizer,
    tokenizer_from_config,
)
from ssm_modal.tokenizers.waveform import MuLawTokenizer

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "ChatTemplate",
    "DNATokenizer",
    "HuggingFaceTokenizer",
    "KmerTokenizer",
    "MuLawTokenizer",
    "NucleotideTokenizer",
    "StreamDecoder",
    "TextTokenizer",
    "build_tokenizer",
    "load_tokenizer",
    "tokenizer_from_config",
]
