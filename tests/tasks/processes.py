"""Runs of the command line in processes of their own, forked from a server that has imported everything
once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping, Sequence

_PRELOAD = [
    "ssm_modal.cli.lightning_cli",
    "ssm_modal.tasks.language",
    "ssm_modal.models",
    "tests.tasks.tiny",
]


def _run(args: Sequence[str], environment: Mapping[str, str]) -> None:
    import torch

    from ssm_modal.cli.main import main

    os.environ.update(environment)
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.set_num_threads(1)
    # This process came from a server; its own workers (of a data loader) are forked, as those of any program.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = ["ssm-modal"]
    sys.exit(main(args))


def run(args: Sequence[str], *, ranks: int = 1, timeout: float = 120.0) -> list[int]:
    """The exit codes of `ssm-modal` with `args` in `ranks` processes of one DDP group (minus a signal's
    number)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        group = {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(context.Process(target=_run, args=(list(args), group if ranks > 1 else {})))
        processes[-1].start()
    for process in processes:
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
