"""The configs that ship with the package: `ssm-modal configs list` and `ssm-modal configs copy`."""

from __future__ import annotations

import argparse
import importlib.resources
import itertools
import re
from importlib.resources.abc import Traversable
from pathlib import Path

from ssm_modal.errors import ConfigError, nearest
from ssm_modal.io.atomic import atomic_write

SUMMARY_WIDTH = 160


def shipped_configs() -> dict[str, Traversable]:
    """Every shipped config by its name, e.g. `text/bytes.yaml`."""
    root = importlib.resources.files("ssm_modal").joinpath("configs")
    found: dict[str, Traversable] = {}

    def walk(folder: Traversable, prefix: str) -> None:
        for entry in sorted(folder.iterdir(), key=lambda e: e.name):
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                found[prefix + entry.name] = entry

    walk(root, "")
    return found


def shipped_config(name: str) -> Traversable:
    """The shipped config called `name`, with or without `.yaml` and a leading `configs/`.

    Raises ConfigError for an unknown name, with the nearest valid one.
    """
    configs = shipped_configs()
    short = name.removeprefix("configs/")
    for candidate in (short, f"{short}.yaml"):
        if candidate in configs:
            return configs[candidate]
    raise ConfigError(f"no shipped config is called {name!r}: {nearest(short, configs)}")


def find_config(name: str) -> str | Path:
    """The file at the path `name`, or else the shipped config of that name.

    Raises ConfigError where there is neither.
    """
    if Path(name).is_file():
        return name
    try:
        found = shipped_config(name)
    except ConfigError as error:
        raise ConfigError(f"--config is {name!r}: no such file, and {error}") from None
    with importlib.resources.as_file(found) as path:
        return path


def summary(config: Traversable) -> str:
    """What a config is for: the first sentence of the comment at its head, and the sentences behind it that
    fit in `SUMMARY_WIDTH` characters."""
    lines = config.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in itertools.takewhile(_is_comment, lines))
    ends = [match.end() for match in re.finditer(r"\.(?=\s|$)", comment)] or [len(comment)]
    return comment[: max([ends[0], *(end for end in ends if end <= SUMMARY_WIDTH)])]


def _is_comment(line: str) -> bool:
    return line.startswith("#")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ssm-modal configs`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="list | copy")
    actions.add_parser("list", help="name every shipped config")
    copy = actions.add_parser("copy", help="copy a shipped config here, to change it")
    copy.add_argument("name", help="e.g. text/bytes.yaml, as `ssm-modal configs list` shows it")
    copy.add_argument("destination", nargs="?", default=".", help="a file or folder (default: this folder)")
    copy.add_argument("--force", action="store_true", help="overwrite a file that is there")


def run(args: argparse.Namespace) -> int:
    """Run `ssm-modal configs`. Returns the exit code."""
    if args.action == "list":
        configs = shipped_configs()
        width = max((len(name) for name in configs), default=0)
        for name, config in configs.items():
            print(f"{name:<{width}}  {summary(config)}".rstrip())
        return 0
    config = shipped_config(args.name)
    target = Path(args.destination)
    if target.is_dir() or args.destination.endswith("/"):
        target = target / config.name
    if target.exists() and not args.force:
        raise ConfigError(f"{target} is there already; give another destination, or --force to overwrite it")
    atomic_write(target, config.read_bytes())
    print(target)
    return 0
