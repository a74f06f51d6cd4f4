"""What the command line adds to every training run. Needs the extra `train`."""

from ssm_modal.cli.callbacks.audio import LogAudio
from ssm_modal.cli.callbacks.averaging import WeightAverage
from ssm_modal.cli.callbacks.checkpointing import RunCheckpoint
from ssm_modal.cli.callbacks.graphs import CudaGraphs
from ssm_modal.cli.callbacks.nonfinite import NonFiniteError, StopOnNonFinite
from ssm_modal.cli.callbacks.progress import Progress

__all__ = [
    "CudaGraphs",
    "LogAudio",
    "NonFiniteError",
    "Progress",
    "RunCheckpoint",
    "StopOnNonFinite",
    "WeightAverage",
]
