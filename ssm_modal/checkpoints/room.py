"""Whether a device can hold a model in a dtype, asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ssm_modal.errors import CheckpointError
from ssm_modal.layers.quantized import Quantisation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GIB = 1 << 30


def check_device(device: torch.device, dtype: object) -> None:
    """Raise ValueError unless `device` is there and models can run in `dtype` on it; dtype None passes."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"load_pretrained: device is {device}, but torch finds no NVIDIA GPU here")
    if dtype is None:
        return
    if dtype not in DTYPES:
        names = ", ".join(str(d) for d in DTYPES)
        raise ValueError(f"load_pretrained: dtype is {dtype!r}, expected one of {names}, or None")
    if device.type == "cuda" and dtype == torch.bfloat16:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise ValueError(
                f"load_pretrained: dtype is {dtype}, which {device} (compute capability "
                f"{capability[0]}.{capability[1]}) cannot compute in; expected torch.float16 or torch.float32"
            )
    if device.type == "mps" and dtype == torch.float64:
        raise ValueError(f"load_pretrained: dtype is {dtype}, which {device} does not have")


def stored_dtype(dtype: torch.dtype, wide: bool) -> torch.dtype:
    """The dtype a tensor is kept in where the model is in `dtype`; `wide` ones stay fp32 at least."""
    return torch.float32 if wide and dtype in (torch.bfloat16, torch.float16) else dtype


def bytes_of(
    tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], packed: Mapping[str, int]
) -> int:
    """What `tensors` take in `dtypes`, those that `packed` has the bytes of in these."""
    return sum(
        packed[name] if name in packed else t.numel() * dtypes[name].itemsize for name, t in tensors.items()
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device` now; None where that cannot be asked."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds back and has not handed out is free for us.
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    found = [n for n in (_available(), _cgroup_rest()) if n is not None]
    return min(found) if found else None


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_rest() -> int | None:
    """What a container's limit leaves. Its file cache does not count: it gives way."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        stats = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return None
    return max(0, limit - used + int(stats.get("file", 0)))


def check_room(
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    wide: set[str],
    device: torch.device,
    source: str,
    packed: Mapping[Quantisation, Mapping[str, int]],
    quantize: Quantisation | None = None,
) -> None:
    """Raise CheckpointError where `device` has too little free memory for `tensors` in `dtypes`.

    wide: the names of those that stay fp32. packed: what quantisation makes of those that it takes, in bytes
    by name; quantize: the one that is asked for. The error says what is needed, what is there and what would
    fit.
    """
    free = free_memory(device)
    needed = bytes_of(tensors, dtypes, {} if quantize is None else packed[quantize])
    if free is None or needed <= free:
        return
    choices = []
    for kind, small in packed.items():
        size = bytes_of(tensors, dtypes, small)
        if small and size < needed:
            fits = "fits" if size <= free else "does not fit either"
            choices.append(f"with quantize={kind!r} it takes {_gib(size)}, which {fits}")
    for dtype in (torch.float32, torch.bfloat16):
        small = {} if quantize is None else packed[quantize]
        size = bytes_of(tensors, {name: stored_dtype(dtype, name in wide) for name in tensors}, small)
        if size < needed:
            fits = "fits" if size <= free else "does not fit either"
            choices.append(f"in {dtype} it takes {_gib(size)}, which {fits}")
    for other in _other_devices(device):
        room = free_memory(other)
        if room is not None and room >= needed:
            choices.append(f"{other} has {_gib(room)} free, which is enough")
    narrow = next(iter(sorted(dtypes.values(), key=lambda d: d.itemsize)))
    most = free / narrow.itemsize / 1e9
    choices.append(f"{device} has room for about {most:.2g} billion weights in {narrow}")
    raise CheckpointError(
        f"{source} needs {_gib(needed)} for its weights, but {device} has {_gib(free)} free: "
        + "; ".join(choices)
    )


def _other_devices(device: torch.device) -> list[torch.device]:
    places = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] + [torch.device("cpu")]
    here = torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
    return [place for place in places if place != here]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.2f} MiB"
