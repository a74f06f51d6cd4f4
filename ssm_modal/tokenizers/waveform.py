"""Waveforms as ids: 8-bit mu-law at a fixed scale, with ids for where a recording begins and ends."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_modal.io.atomic import atomic_write
from ssm_modal.tokenizers.base import KIND

_LEVELS = 256
_MU = _LEVELS - 1.0


class MuLawTokenizer:
    """Samples to ids 0 ... 255 by mu-law companding (mu = 255), begin_id 256 and end_id 257 beyond them, and
    behind those one id for each of `classes`, in their order, that begins a recording of that class.

    A model conditional on a label is one whose recordings begin with their class's id: nothing else differs,
    and what it generates behind that id is of that class. sample_rate: frames a second of what the ids stand
    for, None where it is not known.

    The ids are those of `torchaudio.functional.mu_law_encoding`; the scale is fixed: 1 is full scale, silence
    is id 128. Offers what a `TextTokenizer` does as far as a waveform has it (`vocab_size`, `eos_id`,
    `encode`, `decode`, `check_ids`, `to_config`, `save`, `fingerprint`), with tensors in the place of text.
    """

    levels = _LEVELS
    begin_id = _LEVELS
    end_id = _LEVELS + 1
    eos_id = end_id

    def __init__(self, classes: Sequence[str] = (), sample_rate: int | None = None) -> None:
        if isinstance(classes, str) or not all(isinstance(c, str) for c in classes):
            raise TypeError(f"classes is {classes!r}, expected a list of names")
        if len(set(classes)) != len(classes):
            raise ValueError(f"classes is {list(classes)}, expected each name once")
        if sample_rate is not None and (
            isinstance(sample_rate, bool) or not isinstance(sample_rate, int) or sample_rate < 1
        ):
            raise ValueError(f"sample_rate is {sample_rate!r}, expected 1 or more frames a second, or None")
        self.classes = tuple(classes)
        self.sample_rate = sample_rate
        self.vocab_size = _LEVELS + 2 + len(self.classes)

    def begin_id_of(self, label: str | None) -> int:
        """The id that begins a recording of class `label`; of None: of a recording without one."""
        if label is None:
            return self.begin_id
        if label not in self.classes:
            raise ValueError(f"label is {label!r}, expected one of {', '.join(self.classes) or 'no classes'}")
        return _LEVELS + 2 + self.classes.index(label)

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """Every id that begins a recording, none of which may follow a sample."""
        return (self.begin_id, *(self.begin_id_of(label) for label in self.classes))

    def encode(self, waveform: Tensor) -> Tensor:
        """The ids of `waveform` (...) of a floating dtype: int64 of the same shape, no special ids added.

        Samples beyond full scale are clipped to it, as a converter does. Raises TypeError for another dtype,
        ValueError for a NaN.
        """
        if not waveform.is_floating_point():
            raise TypeError(f"waveform is {waveform.dtype}, expected a floating dtype, full scale being 1")
        if waveform.isnan().any():
            raise ValueError("waveform holds NaN samples, expected numbers")
        # fp32 in the order of torchaudio's operations, so that no sample falls to the other side of a border.
        wave = waveform.float().clamp(-1.0, 1.0)
        mu = torch.tensor(_MU, device=wave.device)
        companded = torch.sign(wave) * torch.log1p(mu * wave.abs()) / torch.log1p(mu)
        return ((companded + 1) / 2 * mu + 0.5).to(torch.int64)

    def encode_recording(self, waveform: Tensor, label: str | None = None) -> Tensor:
        """The ids of a whole recording (n,): the begin id of `label`, its samples, end_id: (n + 2,) int64."""
        if waveform.dim() != 1:
            raise ValueError(f"waveform has the shape {tuple(waveform.shape)}, expected (n,)")
        ends = self.begin_id_of(label), self.end_id
        begin, end = (torch.tensor([i], device=waveform.device) for i in ends)
        return torch.cat([begin, self.encode(waveform), end])

    def decode(self, ids: Sequence[int] | Tensor) -> Tensor:
        """The samples that `ids` (n,) stand for, float32 (m,), begin and end ids left out.

        Each is the middle of its level in the companded domain; encoding it gives the id again. Raises
        ValueError for an id outside the vocabulary.
        """
        tokens = torch.as_tensor(ids)
        if tokens.numel() and (tokens.is_floating_point() or tokens.dtype == torch.bool):
            raise TypeError(f"ids is {tokens.dtype}, expected an integer dtype")
        tokens = tokens.to(torch.int64)
        bad = ((tokens < 0) | (tokens >= self.vocab_size)).nonzero()
        if bad.numel():
            at = int(bad[0, 0])
            raise ValueError(
                f"ids[{at}] is {int(tokens[at])}, expected 0 to {self.vocab_size - 1}, the vocabulary"
            )
        companded = tokens[tokens < self.levels].float() / _MU * 2 - 1.0
        return torch.sign(companded) * torch.expm1(companded.abs() * math.log1p(_MU)) / _MU

    def check_ids(self, ids: Sequence[int] | Tensor) -> list[int]:
        """`ids` as a list; raises ValueError for one outside the vocabulary."""
        host = [int(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        for at, token in enumerate(host):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"ids[{at}] is {token}, expected 0 to {self.vocab_size - 1}, the vocabulary")
        return host

    def to_config(self) -> dict[str, Any]:
        """Plain JSON-like data from which `from_config` makes the same tokenizer."""
        return {
            KIND: "mu_law",
            "levels": self.levels,
            "classes": list(self.classes),
            "sample_rate": self.sample_rate,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MuLawTokenizer:
        """The tokenizer whose `to_config` gave `config`; raises ValueError for any other content."""
        tokenizer = cls(config.get("classes", ()), config.get("sample_rate"))
        if config != tokenizer.to_config():
            raise ValueError(f"config is {config}, expected {tokenizer.to_config()}")
        return tokenizer

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the tokenizer to the file `path`, whole or not at all."""
        return atomic_write(path, json.dumps(self.to_config(), indent=1) + "\n")

    def fingerprint(self) -> str:
        """A hash that two tokenizers share only when they encode alike."""
        return hashlib.sha256(json.dumps(self.to_config(), sort_keys=True).encode()).hexdigest()
