"""What one batch gives a training task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class StepOutput:
    """What one batch gives: sums and counts, so that means over batches and processes are exact.

    loss: () the summed loss over the batch's targets, in nats. count: () the number of targets.
    sums: further metrics, each name to ((), ()): its sum over the batch and what to divide by.
    """

    loss: Tensor
    count: Tensor
    sums: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
