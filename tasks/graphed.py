"""Forward and backward of a training step as one CUDA graph.

A small model's step is hundreds of kernels of a few microseconds each, and the host needs longer to launch
them than the GPU to run them. A CUDA graph records them once and launches all of them at a time
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssm_modal.backbone.recompute import Surroundings, hooks_held, refuse_second_derivatives
from ssm_modal.tasks.step_output import StepOutput

# Calls of a kind of batch that run as they are before it is recorded: kernels compile, libraries start.
WARM_UP = 2

Step = Callable[[Mapping[str, Any]], StepOutput]


@dataclass
class Recording:
    """A recorded step.

    replay: runs it. inputs: what it reads, by the batch's names. output: what `step` returned. gradients: of
    `output.loss`, one a parameter, None where it has none. All of them are overwritten by every replay.
    """

    replay: Callable[[], None]
    inputs: dict[str, Tensor]
    output: StepOutput
    gradients: list[Tensor | None]


class GraphedStep:
    """`step(batch)`, recorded once for every kind of batch and replayed from then on.

    A kind of batch is its tensors' names, shapes and dtypes; a kind is recorded the third time it is met, so
    the odd last batch of an epoch never is. The loss that is returned is an autograd function of the
    parameters whose gradients are there already, so hooks, accumulation, clipping, DDP and scaling of the
    loss see what they always see. Random numbers go on from the generator's state, as without a graph.

    Args:
        step: the forward; it must not wait for the device nor look at values on it.
        parameters: what the loss has gradients to; others get none.
        most: kinds of batches that may be recorded; each keeps its activations' memory.
        record: makes a recording of a batch; for tests.

    Raises ValueError where a batch cannot be recorded (values that are no tensors, such as packed sequences;
    fp16 autocast, whose gradients need the loss scaled before), RuntimeError where the step cannot, where
    more than `most` kinds come, and in a backward that comes after the next step.
    """

    def __init__(
        self,
        step: Step,
        parameters: Sequence[Tensor],
        *,
        most: int = 16,
        record: Callable[[Mapping[str, Tensor]], Recording] | None = None,
    ) -> None:
        self.step = step
        self.parameters = [p for p in parameters if p.requires_grad]
        self.most = most
        self.turn = 0
        self._record = record or self._record_graph
        self._met: dict[tuple[Any, ...], int] = {}
        self._recordings: dict[tuple[Any, ...], Recording] = {}
        self._pool: Any = None
        self._addresses: list[int] = []

    def __call__(self, batch: Mapping[str, Any]) -> StepOutput:
        kind = self._kind(batch)
        addresses = [p.data_ptr() for p in self.parameters]
        if addresses != self._addresses:
            # The weights were moved: what was recorded reads memory that is no longer theirs.
            self._addresses, self._pool = addresses, None
            self._recordings.clear()
        recording = self._recordings.get(kind)
        if recording is None:
            self._met[kind] = self._met.get(kind, 0) + 1
            if self._met[kind] <= WARM_UP:
                return self.step(batch)
            if len(self._recordings) == self.most:
                raise RuntimeError(
                    f"a CUDA graph is recorded for at most {self.most} kinds of batches, and another came: "
                    f"{_described(kind)}; leave graphs off for batches whose shapes vary"
                )
            recording = self._recordings[kind] = self._record(batch)
        self.turn += 1
        loss = _Replayed.apply(self, recording, batch, *self.parameters)
        sums = {name: (a.clone(), b.clone()) for name, (a, b) in recording.output.sums.items()}
        return StepOutput(loss, recording.output.count.clone(), sums)

    def _kind(self, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"a training step becomes a CUDA graph only with batches of tensors, but the batch's "
                    f"{name!r} is a {type(value).__name__}; leave graphs off for packed sequences"
                )
        return tuple((name, tuple(value.shape), value.dtype) for name, value in batch.items())

    def _record_graph(self, batch: Mapping[str, Tensor]) -> Recording:
        device = self.parameters[0].device
        surroundings = Surroundings(device)
        if surroundings.narrow:
            raise ValueError(
                "a training step becomes a CUDA graph in fp32 or bf16, got fp16 autocast, whose gradients "
                "need the loss scaled before they are taken; take precision bf16-mixed"
            )
        inputs = {name: value.clone() for name, value in batch.items()}
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(device)
        try:
            # "thread_local": the thread that pins the next batches' memory goes on meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output, gradients = surroundings.run(self._forward_backward, inputs, grad=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"the training step cannot be recorded as a CUDA graph ({error}); leave graphs off"
            ) from error
        return Recording(graph.replay, inputs, output, gradients)

    def _forward_backward(self, inputs: Mapping[str, Tensor]) -> tuple[StepOutput, list[Tensor | None]]:
        output = self.step(inputs)
        with hooks_held(self.parameters):
            gradients = torch.autograd.grad(output.loss, self.parameters, allow_unused=True)
        detached = {name: (a.detach(), b.detach()) for name, (a, b) in output.sums.items()}
        return StepOutput(output.loss.detach(), output.count.detach(), detached), list(gradients)


class _Replayed(torch.autograd.Function):
    """The loss of a replayed step; its gradients are those that the replay left behind, times the loss's."""

    @staticmethod
    def forward(
        ctx: Any, graphed: GraphedStep, recording: Recording, batch: Mapping[str, Tensor], *parameters: Tensor
    ) -> Tensor:
        ctx.graphed, ctx.turn, ctx.gradients = graphed, graphed.turn, recording.gradients
        for name, place in recording.inputs.items():
            place.copy_(batch[name], non_blocking=True)
        recording.replay()
        return recording.output.loss.clone()

    @staticmethod
    def backward(ctx: Any, *dloss: Tensor) -> tuple[Any, ...]:
        refuse_second_derivatives("a training step recorded as a CUDA graph")
        if ctx.turn != ctx.graphed.turn:
            raise RuntimeError(
                "the backward of a training step recorded as a CUDA graph came after the next step, which "
                "has overwritten its gradients; call it before"
            )
        have = [g for g in ctx.gradients if g is not None]
        scaled = iter(torch._foreach_mul(have, dloss[0]))
        return (None, None, None, *(None if g is None else next(scaled) for g in ctx.gradients))


def _described(kind: tuple[Any, ...]) -> str:
    return ", ".join(f"{name} {shape} {str(dtype).removeprefix('torch.')}" for name, shape, dtype in kind)
