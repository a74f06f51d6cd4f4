"""Errors of the command line and of configs in plain words, unknown keys with the nearest valid one.

Keys are checked against the signatures of the classes that the config names before jsonargparse parses it,
since its own message for a wrong key inside a class lists types, not keys.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssm_modal.errors import ConfigError, closest, nearest

_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
_NOISE = re.compile(
    r"^((- )?Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value( type)?: .*"
    r"|- Expected a <class 'NoneType'>.*)$"
)


def usage_message(error: Exception) -> str | None:
    """The message for an error in the command line or the config; None for an error of another kind."""
    if isinstance(error, argparse.ArgumentError):
        required = re.fullmatch(r"the following arguments are required: (.*)", error.message)
        if required:
            names = ", ".join(name.split(".", 1)[-1] for name in required[1].split(", "))
            return (
                f"{names} must be given: name a config by --config (ssm-modal configs list shows what ships)"
            )
        return plain(error.message)
    # What a class named in the config raises from its constructor, jsonargparse hands on in this wrapping.
    if isinstance(error, ValueError) and str(error).startswith("Does not validate against any"):
        return plain(str(error))
    return None


def plain(message: str) -> str:
    """jsonargparse's nested message as one line: the key, then what was wrong with it."""
    keys: list[str] = []
    words: list[str] = []
    for line in message.splitlines():
        line = line.strip()
        key = re.fullmatch(r'(?:- )?Parser key "(.*)":', line)
        if key:
            keys.append(key[1])
        elif line and not _NOISE.match(line):
            words.append(line.removeprefix("- "))
    text = " ".join(words)
    text = re.sub(r"Problem with given class_path '([^']*)':", r"(\1)", text)
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r"<class '([^']*)'>", r"\1", text)
    text = text.replace("Expected a one of", "expected one of").replace("Expected a ", "expected ")
    text = re.sub(r"expected (.*?)\. Got value: (.*)$", r"is \2, expected \1", text)
    given = re.search(r"^\s*Given value: (.*)$", message, flags=re.MULTILINE)
    if given and text.startswith("expected "):
        # One "expected" for each member of a union, and the value once, behind them.
        text = f"is {given[1]}, expected {' or '.join(re.split(r' ?expected ', text)[1:])}"
    return f"{'.'.join(keys)} {text}".strip() if keys else text


def check_keys(config: Mapping[str, Any], valid: Iterable[str], where: str) -> None:
    """Raise ConfigError for a key of `config` that nothing takes, naming the nearest that something does.

    config: nested, as YAML or dotted options give it. valid: the dotted keys that the parser itself knows,
    among them "model" and "data", whose content is checked against the class that each names. where: for the
    message.
    """
    tree: dict[str, Any] = {}
    for key in valid:
        node = tree
        for part in key.split("."):
            node = node.setdefault(part, {})
    _check_tree(config, tree, "", where)


def _check_tree(config: Mapping[str, Any], tree: Mapping[str, Any], prefix: str, where: str) -> None:
    for key, value in config.items():
        path = f"{prefix}{key}"
        if key not in tree:
            raise _unknown(path, str(key), tree, prefix, where)
        if path in ("model", "data"):
            _check_class(value, path, where)
        elif isinstance(value, Mapping) and tree[key]:
            _check_tree(value, tree[key], f"{path}.", where)


def _check_class(value: Any, path: str, where: str) -> None:
    if not isinstance(value, Mapping) or not isinstance(value.get("class_path"), str):
        return
    known = parameters(resolve(value["class_path"], f"{path}.class_path"))
    if known is None:
        return
    # Options on the command line may leave init_args out: --data.path for --data.init_args.path.
    short = {k: v for k, v in value.items() if k not in _CLASS_KEYS}
    inside = value.get("init_args")
    _check_fields(short, known, f"{path}.", where)
    _check_fields(inside if isinstance(inside, Mapping) else {}, known, f"{path}.init_args.", where)


def _check_fields(config: Mapping[str, Any], known: Mapping[str, Any], prefix: str, where: str) -> None:
    for key, value in config.items():
        if key not in known:
            raise _unknown(f"{prefix}{key}", str(key), known, prefix, where)
        fields = dataclass_fields(known[key])
        if fields is not None and isinstance(value, Mapping):
            _check_fields(value, fields, f"{prefix}{key}.", where)


def _unknown(path: str, key: str, valid: Iterable[str], prefix: str, where: str) -> ConfigError:
    names = sorted(set(valid))
    close = closest(key, names)
    hint = f"did you mean {prefix + close!r}?" if close is not None else f"valid there: {', '.join(names)}"
    return ConfigError(f"{where}: unknown key {path!r}; {hint}")


def resolve(class_path: str, where: str) -> Any:
    """The class at `class_path`; raises ConfigError where there is none, naming the nearest of its module."""
    module_name, _, name = class_path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"{where} is {class_path!r}: there is no module {error.name!r}") from None
    except ValueError:
        raise ConfigError(
            f"{where} is {class_path!r}, expected a path such as package.module.Class"
        ) from None
    try:
        return getattr(module, name)
    except AttributeError:
        public = [n for n in dir(module) if not n.startswith("_")]
        raise ConfigError(
            f"{where} is {class_path!r}: {module_name} has no {name!r}; {nearest(name, public)}"
        ) from None


def parameters(owner: Any) -> dict[str, Any] | None:
    """Name to type of what `owner`'s constructor takes; None where it takes any keyword."""
    signature = inspect.signature(owner)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
        return None
    function = owner.__init__ if inspect.isclass(owner) else owner
    try:
        hints = typing.get_type_hints(function)
    except NameError:
        hints = {}
    return {name: hints.get(name, Any) for name in signature.parameters}


def dataclass_fields(kind: Any) -> dict[str, Any] | None:
    """Name to type of the fields of a dataclass (or of an optional one); None for any other type."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(kind) if a is not type(None)]
        kind = inner[0] if len(inner) == 1 else None
    if not (inspect.isclass(kind) and dataclasses.is_dataclass(kind)):
        return None
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}


def option_tree(args: Sequence[str]) -> dict[str, Any]:
    """The `--a.b value` and `--a.b=value` options of `args`, nested."""
    tree: dict[str, Any] = {}
    for i, arg in enumerate(args):
        if not arg.startswith("--") or arg == "--":
            continue
        name, equals, value = arg[2:].partition("=")
        if not equals:
            value = args[i + 1] if i + 1 < len(args) else ""
        node = tree
        *parents, last = name.removesuffix("+").split(".")
        for part in parents:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                # `--model some.Class` is short for `--model.class_path some.Class`.
                child = node[part] = {"class_path": child}
            node = child
        if isinstance(node.get(last), dict):
            node[last]["class_path"] = value
        else:
            node[last] = value
    return tree


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError, naming file and line, where it is none."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no YAML: byte {error.start} is not UTF-8") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected keys with values")
    return content


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, nested mappings merged."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out
