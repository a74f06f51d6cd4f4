"""The `ssm-modal` program: picks the command, and turns errors into one clear message."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import ssm_modal
from ssm_modal.cli.suggest import usage_message
from ssm_modal.errors import ConfigError, nearest

TRAINING = {
    "fit": "train a model as a config says",
    "validate": "measure a run's checkpoint on the validation split",
    "test": "test a run's checkpoint",
    "predict": "run a checkpoint over the data and keep what it says",
}
BESIDE = {
    "generate": "continue a text with a trained model, or write WAV files with one of waveforms",
    "chat": "talk with a model that was tuned to, through its tokenizer's chat template",
    "evaluate": "measure a language model's perplexity on text files of any length",
    "lm-eval": "run tasks of lm-evaluation-harness on a language model",
    "score": "score variants of a genome (VCF or table) by a language model of DNA",
    "mutate": "the effect of every substitution in a region: table, track and picture",
    "embed": "embeddings of sequences of any length, by record, window or position",
    "tracks": "per-base likelihood or coverage along a region: bedGraph and picture",
    "stream": "classify a recording chunk by chunk, with the time that each takes",
    "convert": "write a model in another format: this package's, transformers', state-spaces'",
    "memory": "print what registered models take: weights, state and KV cache by length",
    "explain": "show which input positions drove a model's decision",
    "features": "write what a trained classifier of images makes of them, a vector an image, to safetensors",
    "configs": "list and copy the configs that ship with the package",
    "doctor": "say what this installation can do, what is missing and how to mend it",
}

_HELP = """usage: ssm-modal COMMAND [options]

{commands}

  ssm-modal COMMAND --help  the options of a command
  ssm-modal --version       the version
  --traceback               show where an error came from (or set SSM_MODAL_DEBUG=1)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; default: `sys.argv`). Returns the exit code.

    0: done. 1: the command failed. 2: the command line or the config is wrong. 130: interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("SSM_MODAL_DEBUG", "0") not in ("", "0")
    if "--traceback" in args:
        args.remove("--traceback")
        debug = True
    try:
        return _dispatch(args)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            # Lightning's trainer ends an interrupted run by exit(1).
            return _interrupted()
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        # The reader of a pipe has gone (`ssm-modal ... | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        command = f" {args[0]}" if args and args[0] in {**TRAINING, **BESIDE} else ""
        usage = usage_message(error)
        message = usage if usage is not None else _message(error)
        print(f"ssm-modal{command}: error: {message}", file=sys.stderr)
        return 2 if usage is not None or isinstance(error, ConfigError) else 1


def _interrupted() -> int:
    print("ssm-modal: interrupted", file=sys.stderr)
    return 130


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        rows = {**TRAINING, **BESIDE}
        print(_HELP.format(commands="\n".join(f"  {name:<10}{text}" for name, text in rows.items())), end="")
        return 0 if args else 2
    if args[0] in ("--version", "-V"):
        print(f"ssm-modal {ssm_modal.__version__}")
        return 0
    command, rest = args[0], args[1:]
    if command in TRAINING:
        return _train(args)
    if command in BESIDE:
        module = importlib.import_module(f"ssm_modal.cli.{command.replace('-', '_')}")
        parser = argparse.ArgumentParser(f"ssm-modal {command}", description=BESIDE[command])
        module.add_arguments(parser)
        return int(module.run(parser.parse_args(rest)))
    raise ConfigError(f"no command is called {command!r}: {nearest(command, {**TRAINING, **BESIDE})}")


def _train(args: list[str]) -> int:
    try:
        import jsonargparse  # noqa: F401
        import lightning  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'training needs the extra "train", and {error.name} is missing: pip install "ssm-modal[train]"'
        ) from error
    from ssm_modal.cli import lightning_cli

    return lightning_cli.run(args)


def _message(error: Exception) -> str:
    """One message for `error`: its text, after its type where that is not one that users' mistakes raise."""
    text = str(error).strip() or "no further words"
    expected = (ValueError, TypeError, OSError, ImportError, RuntimeError)
    # Lightning's own errors are about the command line too, e.g. an accelerator that is not there.
    misused = type(error).__name__ == "MisconfigurationException"
    plain = misused or (isinstance(error, expected) and type(error) is not RuntimeError)
    hint = "" if plain else " (SSM_MODAL_DEBUG=1 shows where it came from)"
    return f"{text if plain else f'{type(error).__name__}: {text}'}{hint}"


if __name__ == "__main__":
    sys.exit(main())
