"""What a family of published models is to the loader: its config both ways, and where each tensor goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ssm_modal.errors import CheckpointError, ConfigError
from ssm_modal.layers import MambaConfig
from ssm_modal.layers.mixer import MixerConfig
from ssm_modal.models import CausalLMConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A tensor of a file and its place here: the whole tensor `name` of the model's state dict, or the part
    of it that `region` indexes."""

    key: str
    name: str
    region: tuple[int | slice, ...] = ()


@dataclass(frozen=True)
class Family:
    """One published format.

    name: "mamba", ... architecture: the class transformers loads it with; "" where it has none. read: its
    config.json to ours. write: ours to its config.json; raises ConfigError for what it has no words for.
    parts: every tensor of a file, in the layout that files with these keys have (the one to write, for no
    keys). rename: a key of older files to today's. head: the key of the head's weight, which the file of a
    tied model may hold or not.
    """

    name: str
    architecture: str
    read: Callable[[Fields], CausalLMConfig]
    write: Callable[[CausalLMConfig], dict[str, Any]]
    parts: Callable[[CausalLMConfig, Collection[str]], list[Part]]
    head: str = "lm_head.weight"
    rename: Callable[[str], str] = lambda key: key


class Fields:
    """The keys of a config.json, each asked for with what it must be; `source` is what errors call it."""

    def __init__(self, document: Mapping[str, Any], source: str) -> None:
        self.document, self.source = document, source

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of `key`, `default` where it is not there; raises CheckpointError for another type."""
        value = self.document.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.source} lacks the key {key!r}, expected {_NAMES[kind]}")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)  # type: ignore[call-arg]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.source}: {key} is {value!r}, expected {_NAMES[kind]}")
        return value

    def must_be(self, key: str, *allowed: object) -> None:
        """Raise CheckpointError where `key` is there with another value than these."""
        if key in self.document and self.document[key] not in allowed:
            raise CheckpointError(
                f"{self.source}: {key} is {self.document[key]!r}, which this architecture has only as "
                f"{' or '.join(repr(a) for a in allowed)}"
            )


_NAMES: dict[type, str] = {int: "an integer", float: "a number", bool: "true or false", dict: "a mapping"}


class Problems:
    """Why a config cannot be written in a family's words, gathered so that all are said at once."""

    def __init__(self, family: str) -> None:
        self.family = family
        self._found: list[str] = []

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self._found.append(problem)

    def check(self) -> None:
        """Raise ConfigError with everything found."""
        if self._found:
            raise ConfigError(f"the model cannot be written as {self.family}: {'; '.join(self._found)}")


def one_mixer(config: CausalLMConfig, kind: type[MixerConfig], problems: Problems) -> Any:
    """The config that every mixer of class `kind` has; a default one where there is none of them."""
    mixers = {config.stack.mixer_of(i) for i in range(config.stack.n_layers)}
    own = [m for m in mixers if isinstance(m, kind)]
    problems.expect(len(own) <= 1, f"its {kind.__name__}s differ from layer to layer")
    return own[0] if own else kind()


def vocabulary_rows(config: CausalLMConfig) -> int:
    """Rows of the embedding, padding included: other formats know no padding beside ids."""
    multiple = config.pad_vocab_multiple
    return -(-config.vocab_size // multiple) * multiple


def dt_rank_of(config: CausalLMConfig, mamba: MambaConfig) -> int:
    """The width of the bottleneck of dt, as a number."""
    return -(-config.stack.d_model // 16) if mamba.dt_rank == "auto" else mamba.dt_rank


def mamba_parts(mamba: MambaConfig, key: str, name: str) -> Iterator[Part]:
    """The tensors of one Mamba layer, its keys beginning with `key`, its names here with `name`."""
    for own in ("A_log", "D", "in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight"):
        yield Part(f"{key}.{own}", f"{name}.{own}")
    yield Part(f"{key}.out_proj.weight", f"{name}.out_proj.weight")
    yield Part(f"{key}.dt_proj.bias", f"{name}.dt_bias")
    if mamba.conv_bias:
        yield Part(f"{key}.conv1d.bias", f"{name}.conv1d.bias")
    if mamba.bias:
        yield Part(f"{key}.in_proj.bias", f"{name}.in_proj.bias")
        yield Part(f"{key}.out_proj.bias", f"{name}.out_proj.bias")
