"""The state after a prefix, on the disk: read once, taken up again and forked as often as one likes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ssm_modal.errors import CheckpointError, StateError
from ssm_modal.generation.prompts import device_of
from ssm_modal.io.atomic import put_in_place, write_aside
from ssm_modal.state import State

KEY = "ssm_modal_state"  # of the safetensors header: what the file holds, as JSON
_SAMPLES = 64  # numbers of each weight that the fingerprint reads


def save_state(model: nn.Module, state: State, path: str | os.PathLike[str]) -> Path:
    """Write `state`, of any number of rows, to the file `path`, whole or not at all; `load_state` reads it.

    The file is safetensors; its header has the fingerprint of `model`, whose state it is. Raises StateError
    for a state of another architecture.
    """
    _check_kind(model, state)
    tensors, plain = {}, {}
    for name, value in _leaves(state):
        if isinstance(value, Tensor):
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        else:
            plain[name] = value
    about = {"version": 1, "model": model_fingerprint(model), "rows": state.batch_size, "plain": plain}
    target = Path(path)
    metadata = {"format": "pt", KEY: json.dumps(about)}
    put_in_place(write_aside(target, lambda aside: save_file(tensors, aside, metadata=metadata)), target)
    return target


def load_state(
    model: Any, path: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> State:
    """The state in the file `path`, on `device` (None: the model's), for `generate(..., state=)`.

    `state.select([0, 0, 0])` forks it. Raises FileNotFoundError, CheckpointError for a file that is no saved
    state or is cut short, StateError for the state of a model of other weights or another architecture.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"state is {str(file)!r}: there is no such file")
    place = device_of(model) if device is None else torch.device(device)
    try:
        with safe_open(file, framework="pt", device=str(place)) as opened:
            about = json.loads((opened.metadata() or {}).get(KEY, "null"))
            if not isinstance(about, dict) or about.get("version") != 1:
                raise CheckpointError(f"{file} holds no saved state of this version (no header {KEY!r})")
            own = model_fingerprint(model)
            if about.get("model") != own:
                raise StateError(
                    f"{file} is the state of another model: its fingerprint is {about.get('model')}, "
                    f"expected {own}; a state serves only the weights that made it"
                )
            template = model.init_state(int(about["rows"]), device="meta")
            plain = about["plain"]

            def read(name: str, was: Any) -> Any:
                if not isinstance(was, Tensor):
                    return type(was)(plain[name])
                tensor = opened.get_tensor(name)
                keep = not tensor.is_floating_point()
                return tensor if keep else tensor.to(was.dtype)

            return _rebuilt(template, "", read)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        if isinstance(error, StateError):
            raise
        raise CheckpointError(f"{file} cannot be read as a saved state: {error}") from error


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """A hash of the model's config and of numbers spread over each of its weights: the same on every device
    and in every wider dtype, another for other weights."""
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        digest.update(json.dumps(config.to_dict(), sort_keys=True).encode())
    samples = []
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if isinstance(tensor, Tensor) and tensor.numel():
            flat = tensor.reshape(-1)
            step = max(1, flat.shape[0] // _SAMPLES)
            samples.append(flat[::step][: _SAMPLES + 1].to(torch.float32))
    if samples:
        digest.update(torch.cat(samples).cpu().numpy(force=True).tobytes())
    return digest.hexdigest()[:32]


def _check_kind(model: Any, state: object) -> None:
    expected = type(model.init_state(1, device="meta"))
    if not isinstance(state, expected):
        raise StateError(f"state is a {type(state).__name__}, expected a {expected.__name__}")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and host value in a state, under the path of fields and places that leads to it."""
    if isinstance(value, State):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{name}.{i}")
    else:
        yield name, value


def _rebuilt(value: Any, name: str, read: Callable[[str, Any], Any]) -> Any:
    """`value` with read(path, leaf) in place of every leaf."""
    if isinstance(value, State):
        fields = [field.name for field in dataclasses.fields(value)]
        changed = {f: _rebuilt(getattr(value, f), f"{name}.{f}" if name else f, read) for f in fields}
        return dataclasses.replace(value, **changed)
    if isinstance(value, tuple):
        return tuple(_rebuilt(part, f"{name}.{i}", read) for i, part in enumerate(value))
    return read(name, value)
