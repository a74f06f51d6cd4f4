"""Frozen configs to plain JSON-like data and back, and overrides by dotted or short names.

A config is a frozen dataclass derived from `Config`. One that may stand beside others in the same field (a
mixer, a model) carries a `type` string as a class variable; it is written as the key "type" and read back by
it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

from ssm_modal.errors import ConfigError, closest, nearest

T = TypeVar("T")

# The configs that have a `type`. Not a class variable: beside `type` its annotation could not be evaluated.
_TAGGED: dict[str, type[Config]] = {}


@dataclass(frozen=True)
class Config:
    """Base of all configs. A subclass with a `type` is found by that string wherever a base is expected."""

    type: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        tag = cls.__dict__.get("type", "")
        if tag:
            other = _TAGGED.get(tag)
            if other is not None and other.__qualname__ != cls.__qualname__:
                raise TypeError(f"config type {tag!r} is taken by {other.__qualname__}")
            _TAGGED[tag] = cls

    def __post_init__(self) -> None:
        """Check every field against its annotation; subclasses check what the values mean after this."""
        for name, hint in _fields(type(self)).items():
            object.__setattr__(self, name, _read(hint, getattr(self, name), f"{type(self).__name__}.{name}"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dicts, lists, strings, numbers, booleans and None, safe for JSON and YAML."""
        out: dict[str, Any] = {"type": self.type} if self.type else {}
        for f in dataclasses.fields(self):
            out[f.name] = _plain(getattr(self, f.name))
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; unknown keys, types and values raise ConfigError."""
        return _read_config(cls, data, cls.__name__)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """A copy with some fields changed.

        Keys are dotted paths ("backbone.mixer.d_state"), or the last part alone where only one field has that
        name ("d_state"). A path through a tuple reaches every entry that has the field, or one by its index
        ("backbone.mixer.0.d_state"). A value for a nested config is a config, None where allowed, or a dict,
        which changes the fields that it names (a dict with another "type" starts that config afresh).
        """
        config = self
        pending = dict(overrides)
        # Whole configs first, so that `mixer={"type": "s4d"}, d_state=8` sets the new mixer's d_state.
        for key in [k for k in pending if _holds_config(config, k)]:
            config = _set(config, _resolve(config, key), pending.pop(key))
        # Fields of one config together: a check may span several of them.
        grouped: dict[tuple[str, ...], dict[str, Any]] = {}
        for key, value in pending.items():
            for path in _resolve(config, key):
                grouped.setdefault(path[:-1], {})[path[-1]] = value
        for parent, values in grouped.items():
            config = _replace_at(config, parent, values)
        return config


def check_choice(owner: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        near = closest(value, [a for a in allowed if isinstance(a, str)]) if isinstance(value, str) else None
        raise ConfigError(
            f"{owner}: {name} is {value!r}, expected one of {', '.join(repr(a) for a in allowed)}"
            + (f"; did you mean {near!r}?" if near is not None else "")
        )


def check_positive(owner: str, **values: float | None) -> None:
    """Raise ConfigError unless each given number is above 0; None passes."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{owner}: {name} is {value!r}, expected more than 0")


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def _fields(cls: type[Config]) -> dict[str, Any]:
    """Field names and their resolved annotations."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _read_config(cls: type[Config], data: object, where: str) -> Any:
    if isinstance(data, cls):
        return data
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping of {cls.__name__}'s fields, got {data!r}")
    values = dict(data)
    if "type" in values:
        tag = values.pop("type")
        valid = {name: c for name, c in _TAGGED.items() if issubclass(c, cls)}
        if tag not in valid:
            raise ConfigError(f"{where}: unknown type {tag!r}; {nearest(str(tag), valid)}")
        cls = valid[tag]
    elif any(c is not cls and issubclass(c, cls) for c in _TAGGED.values()) and not cls.type:
        tags = [name for name, c in _TAGGED.items() if issubclass(c, cls)]
        raise ConfigError(f"{where}: the key 'type' is missing; valid: {', '.join(sorted(tags))}")
    hints = _fields(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(str(key), hints)}")
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in values:
            raise ConfigError(f"{where}: the key {f.name!r} is missing")
    return cls(**{key: _read(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _read(hint: Any, value: Any, where: str) -> Any:
    """`value` checked against an annotation, plain data turned into configs and tuples."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        errors = []
        for option in options:
            if option is type(None):
                continue
            try:
                return _read(option, value, where)
            except ConfigError as error:
                errors.append((option, error))
        # A mapping can only have meant the config among the options: its own error says what is wrong.
        for option, failure in errors:
            takes_mapping = isinstance(option, type) and issubclass(option, Config)
            takes_list = typing.get_origin(option) is tuple
            if (isinstance(value, Mapping) and takes_mapping) or (
                isinstance(value, (list, tuple)) and takes_list
            ):
                raise failure
        raise ConfigError(f"{where}: got {value!r}, expected {_name(hint)}")
    if origin is Literal:
        check_choice(where.rsplit(".", 1)[0], where.rsplit(".", 1)[-1], value, typing.get_args(hint))
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: got {value!r}, expected a list")
        entry = typing.get_args(hint)[0]
        return tuple(_read(entry, v, f"{where}.{i}") for i, v in enumerate(value))
    if isinstance(hint, type) and issubclass(hint, Config):
        return _read_config(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (
        not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)
    ):
        raise ConfigError(f"{where}: got {value!r}, expected {_name(hint)}")
    return value


def _name(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_name(o) for o in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(o) for o in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_name(typing.get_args(hint)[0])}"
    return {
        type(None): "None",
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
    }.get(hint, getattr(hint, "__name__", str(hint)))


def _paths(config: Config, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every field of `config` and of the configs inside it: its path and its value."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        path = (*prefix, f.name)
        yield path, value
        if isinstance(value, Config):
            yield from _paths(value, path)
        elif isinstance(value, tuple):
            for i, entry in enumerate(value):
                if isinstance(entry, Config):
                    yield (*path, str(i)), entry
                    yield from _paths(entry, (*path, str(i)))


def _without_index(path: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(p for p in path if not p.isdigit())


def _resolve(config: Config, key: str) -> list[tuple[str, ...]]:
    """The paths that an override key means; raises ConfigError where there is none or it is ambiguous."""
    asked = tuple(key.split("."))
    paths = [path for path, _ in _paths(config)]
    exact = [p for p in paths if p == asked or _without_index(p) == asked]
    found = exact or [
        p for p in paths if p[-len(asked) :] == asked or _without_index(p)[-len(asked) :] == asked
    ]
    found = [p for p in found if not p[-1].isdigit() or p[-len(asked) :] == asked]
    if not found:
        valid = {".".join(_without_index(p)) for p in paths} | {p[-1] for p in paths if not p[-1].isdigit()}
        raise ConfigError(f"unknown key {key!r} for {type(config).__name__}; {nearest(key, valid)}")
    if len({_without_index(p) for p in found}) > 1:
        names = ", ".join(sorted({".".join(_without_index(p)) for p in found}))
        raise ConfigError(f"the key {key!r} is ambiguous for {type(config).__name__}: it may mean {names}")
    return found


def _holds_config(config: Config, key: str) -> bool:
    """Whether the field that `key` means holds (or may hold) a config."""
    try:
        path = _resolve(config, key)[0]
    except ConfigError:
        return False  # it may exist once the whole configs are in place
    return _mentions_config(_hint_at(config, path))


def _mentions_config(hint: Any) -> bool:
    if isinstance(hint, type):
        return issubclass(hint, Config)
    return any(_mentions_config(option) for option in typing.get_args(hint))


def _hint_at(config: Config, path: tuple[str, ...]) -> Any:
    at: Any = config
    for i, name in enumerate(path):
        if isinstance(at, tuple):
            if i == len(path) - 1:
                return type(at[int(name)])
            at = at[int(name)]
            continue
        if i == len(path) - 1:
            return _fields(type(at))[name]
        at = getattr(at, name)
    raise AssertionError("unreachable: a path has at least one part")


def _set(config: T, paths: list[tuple[str, ...]], value: Any) -> T:
    for path in paths:
        config = _replace_at(config, path[:-1], {path[-1]: value})
    return config


def _replace_at(at: Any, parent: tuple[str, ...], values: Mapping[str, Any], hint: Any = None) -> Any:
    """`at` (annotated as `hint`) with fields, or tuple entries, of what stands at `parent` replaced."""
    if isinstance(at, tuple):
        entry_hint = _entry_hint(hint)
        entries = list(at)
        if parent:
            i = int(parent[0])
            entries[i] = _replace_at(entries[i], parent[1:], values, entry_hint)
        else:
            for index, value in values.items():
                entries[int(index)] = _merge(entry_hint, entries[int(index)], value, f"entry {index}")
        return tuple(entries)
    hints = _fields(type(at))
    if parent:
        name, rest = parent[0], parent[1:]
        return dataclasses.replace(at, **{name: _replace_at(getattr(at, name), rest, values, hints[name])})
    owner = type(at).__name__
    changed = {
        name: _merge(hints[name], getattr(at, name), value, f"{owner}.{name}")
        for name, value in values.items()
    }
    return dataclasses.replace(at, **changed)


def _entry_hint(hint: Any) -> Any:
    """What the entries of a tuple annotated as `hint`, or as one option of it, are annotated as."""
    options = (hint, *typing.get_args(hint))
    return next(typing.get_args(option)[0] for option in options if typing.get_origin(option) is tuple)


def _merge(hint: Any, current: Any, value: Any, where: str) -> Any:
    """`value` for a field; a dict changes the current config's fields unless it names another type."""
    if (
        isinstance(value, Mapping)
        and isinstance(current, Config)
        and value.get("type", current.type) == current.type
    ):
        hints = _fields(type(current))
        changed = {}
        for key, entry in value.items():
            if key == "type":
                continue
            if key not in hints:
                raise ConfigError(f"{where}: unknown key {key!r}; {nearest(str(key), hints)}")
            changed[key] = _merge(hints[key], getattr(current, key), entry, f"{where}.{key}")
        return dataclasses.replace(current, **changed)
    return _read(hint, value, where)
