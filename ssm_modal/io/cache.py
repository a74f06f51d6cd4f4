"""Where encoded texts and parsed genomes are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from ssm_modal.io.text import expand_path


def cache_folder(kind: str, given: str | os.PathLike[str] | None = None) -> Path:
    """The folder for what is kept of `kind` ("text", "genomes"); it need not exist.

    given: taken as it is, with `~` and environment variables filled in. None: `kind` below
    `$SSM_MODAL_CACHE`, else below `$XDG_CACHE_HOME/ssm_modal`, else below `~/.cache/ssm_modal`.
    """
    if given is not None:
        return expand_path(given, "cache_dir")
    own = os.environ.get("SSM_MODAL_CACHE")
    if own:
        return Path(own) / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ssm_modal" / kind
