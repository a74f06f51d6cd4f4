"""Parameters that keep full precision when a model is cast, and take no weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

_NARROW = (torch.bfloat16, torch.float16)


class WideParameters(nn.Module):
    """Base of modules with parameters that stay fp32 (or fp64) under `.to(torch.bfloat16)` or `.half()`.

    `wide_parameters`: names of parameters that never become bf16 or fp16: a decay exp(dt * A) is a power of A
    over thousands of steps, so a rounded A is another model. `undecayed_parameters`: names of those marked
    `_no_weight_decay`. The marks survive casts, moves, `copy.deepcopy`, pickling and
    `load_state_dict(assign=True)`, all of which may replace the Parameter object.
    """

    wide_parameters: ClassVar[tuple[str, ...]] = ()
    undecayed_parameters: ClassVar[tuple[str, ...]] = ()

    def mark_parameters(self) -> None:
        """Set `_no_weight_decay` on `undecayed_parameters`; to be called once they exist."""
        for name in self.undecayed_parameters:
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept: list[Tensor] = []
        for name in self.wide_parameters:
            parameter = self._parameters.get(name)
            if parameter is not None:
                kept.append(parameter)
                if parameter.grad is not None:
                    kept.append(parameter.grad)

        def guarded(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if out.dtype in _NARROW and any(tensor is k for k in kept):
                # From the tensor itself, not from `out`: going through bf16 would round it.
                wide = torch.float32 if tensor.dtype in (*_NARROW, torch.float64) else tensor.dtype
                return tensor.to(device=out.device, dtype=wide)
            return out

        out = super()._apply(guarded, recurse)
        self.mark_parameters()
        return out

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name in self.wide_parameters:
            parameter = self._parameters.get(name)
            if parameter is not None and parameter.dtype in _NARROW:  # assign=True took the file's dtype
                parameter.data = parameter.data.float()
        self.mark_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mark_parameters()
