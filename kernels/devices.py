"""The current GPU: Triton launches on it, not on the one that holds its arguments."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_HERE: AbstractContextManager[Any] = nullcontext()


def gpu_of(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which the GPU of `x` is the current one; nothing where it is, or where `x` is on none.

    `torch.cuda.device_of` costs several microseconds a call even then.
    """
    device = x.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
