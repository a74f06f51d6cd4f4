"""Exact training over any length in bounded memory: by segments, each computed again for its gradients.

A causal model that carries a state is run over a long sequence in segments. The first pass records no
gradients and keeps nothing but the state that enters each segment. The second goes from the last segment to
the first: each is computed again from its entering state, this time with gradients, the gradient of its
leaving state being the one that came out of the segment after it. The result is the gradient of the whole
sequence, not a truncated one: the chain rule over segments (backpropagation through time with checkpoints;
Griewank & Walther, "Revolve", ACM TOMS 26(1), 2000), and the memory that of one segment, whatever the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ssm_modal.backbone.recompute import (
    RandomState,
    Surroundings,
    hooks_held,
    refuse_second_derivatives,
)
from ssm_modal.backbone.segments import Segment, check_cut, cuts_of
from ssm_modal.errors import StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.state import State

Body = Callable[[Segment, Any], tuple[Any, Any]]  # its hidden is for the head alone, in any form
Head = Callable[[Any, Segment], Tensor | tuple[Tensor, ...]]


def sum_over_segments(
    body: Body,
    head: Head,
    inputs: Sequence[Tensor],
    parameters: Iterable[Tensor],
    segment: int,
    *,
    seqs: Sequences | None = None,
    ahead: bool = False,
) -> Any:
    """The sum over all segments of `head(hidden, segment)`, where `hidden, state = body(segment, state)`.

    Equal to one call over the whole length in value and in every gradient, in the memory of one segment, the
    gradients and one state a segment. One `torch.autograd.Function` whose inputs are `inputs` and
    `parameters`, so hooks on parameters, accumulation, loss scaling and clipping see what they always see.

    Args:
        body: `body(segment, state)` runs the model over `segment.inputs` (with `segment.seqs`) from `state`,
            a `State` or None at a start, and returns (hidden, new state). It must be causal and, given the
            same random numbers and state, the same each time.
        head: `head(hidden, segment)` gives a tensor, or a tuple of tensors, of the same shapes for every
            segment: a summed loss, a sum over positions (a mean's numerator), the last step's vector in the
            segment that has it and zeros elsewhere.
        inputs: (batch, length, ...) each, cut along the length. Those that require gradients get them.
        parameters: every tensor that requires gradients and that `body` and `head` use beside `inputs`;
            others may be among them. A tensor left out gets no gradient.
        segment: steps a segment, at least 1; the last may be shorter.
        seqs: packed sequences along the length (batch 1); they may cross the borders of segments.
        ahead: compute the gradients already in the forward and only scale them in the backward. `head` must
            then give one real scalar; it is called once a segment and not twice, and the body's last segment
            also once. Leave it off where gradients would leave the dtype's range unless the loss is scaled
            (fp16).

    Returns what `head` returns, summed over the segments. First derivatives only. Without gradients (under
    `torch.no_grad()`, or where nothing requires any) it is one pass.

    A state that grows with the length (attention's cache) is exact too, but each segment keeps its own:
    memory then grows with length^2 / segment.

    Raises TypeError or ValueError for bad arguments, StateError where `body` returns no state to carry, and
    RuntimeError in the backward where a parameter was changed in place since the forward.
    """
    inputs = tuple(inputs)
    check_cut(inputs, segment, seqs)
    wanted = tuple(_trainable(parameters))
    plan = _Plan(body, head, inputs[0], segment, seqs, wanted, ahead)
    if torch.is_grad_enabled() and (wanted or any(x.requires_grad for x in inputs)):
        sums = _Sum.apply(plan, len(inputs), *inputs, *wanted)
    else:
        _, sums = plan.first_pass(inputs, keep=False, outputs=True)
    return sums if plan.as_tuple else sums[0]


@torch.no_grad()
def iterate_segments(
    body: Body, inputs: Sequence[Tensor], segment: int, *, seqs: Sequences | None = None
) -> Iterator[tuple[Segment, Tensor]]:
    """Run `body` over the segments in order without gradients; yields each segment and its hidden.

    Arguments as of `sum_over_segments`.
    """
    inputs = tuple(inputs)
    check_cut(inputs, segment, seqs)
    plan = _Plan(body, lambda hidden, own: hidden, inputs[0], segment, seqs, (), False)
    state: Any = None
    for k in range(len(plan.cuts)):
        own = plan.segment(k, inputs)
        hidden, state = plan.advance(k, own, state)
        yield own, hidden


def _trainable(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    seen = set()
    for i, p in enumerate(parameters):
        if not isinstance(p, Tensor):
            raise TypeError(f"parameters[{i}] must be a tensor, got {type(p).__name__}")
        if p.requires_grad and id(p) not in seen:
            seen.add(id(p))
            yield p


@dataclass(frozen=True)
class _Kept:
    """What the second pass starts a segment from. leaves: the entering state's tensors, none at a start."""

    leaves: tuple[Tensor, ...]
    spec: Any
    random: RandomState

    def state(self, leaves: Sequence[Tensor]) -> Any:
        return None if self.spec is None else pytree.tree_unflatten(list(leaves), self.spec)


class _Plan:
    """One call of `sum_over_segments`: the segments and how to run them once and again."""

    def __init__(
        self,
        body: Body,
        head: Head,
        like: Tensor,
        segment: int,
        seqs: Sequences | None,
        parameters: tuple[Tensor, ...],
        ahead: bool,
    ) -> None:
        self.body, self.head, self.parameters, self.ahead = body, head, parameters, ahead
        self.device = like.device
        self.cuts = cuts_of(like.shape[1], segment, seqs)
        self.seqs = [
            None if len(cut.parts) == 1 else Sequences.from_lengths(cut.parts, like.device)
            for cut in self.cuts
        ]
        self.surroundings = Surroundings(like.device)
        self.as_tuple = False

    # ------------------------------------------------------------------ one segment

    def segment(self, k: int, inputs: Sequence[Tensor]) -> Segment:
        cut = self.cuts[k]
        return Segment(cut.start, cut.end, tuple(x[:, cut.start : cut.end] for x in inputs), self.seqs[k])

    def advance(self, k: int, segment: Segment, state: Any) -> tuple[Tensor, Any]:
        """The body over segment k: its hidden, and the state to carry on, None at an end."""
        cut, rows = self.cuts[k], len(self.cuts[k].parts)
        if state is not None and rows > 1:
            # The first part goes on with its sequence; the others start, from a zero state.
            state = pytree.tree_map(
                lambda t: torch.cat([t, t.new_zeros(rows - 1, *t.shape[1:])]) if _is_tensor(t) else t, state
            )
        hidden, leaving = self.body(segment, state)
        if not cut.leaves:
            return hidden, None
        if not isinstance(leaving, State):
            raise StateError(
                f"segment: the model returned {type(leaving).__name__} as its state after step {cut.end}, "
                "but the rest needs one; a model that needs the whole sequence cannot be run by segments "
                "(recompute its blocks instead)"
            )
        if rows > 1:
            leaving = pytree.tree_map(lambda t: t[-1:] if _is_tensor(t) else t, leaving)
        return hidden, leaving

    def outputs(self, hidden: Tensor, segment: Segment) -> tuple[Tensor, ...]:
        out = self.head(hidden, segment)
        self.as_tuple = isinstance(out, tuple)
        outs = out if isinstance(out, tuple) else (out,)
        for i, o in enumerate(outs):
            if not isinstance(o, Tensor):
                raise TypeError(f"head must return tensors, got {type(o).__name__} (output {i})")
        if self.ahead and (len(outs) != 1 or outs[0].ndim or outs[0].is_complex()):
            shapes = ", ".join(str(tuple(o.shape)) for o in outs)
            raise ValueError(f"ahead needs a head that returns one real scalar, got shapes {shapes}")
        return outs

    def run(self, k: int, segment: Segment, state: Any, outputs: bool) -> tuple[tuple[Tensor, ...], Any]:
        """Body and, if asked for, head over segment k: the outputs, and the state to carry on."""
        hidden, leaving = self.advance(k, segment, state)
        return self.outputs(hidden, segment) if outputs else (), leaving

    # ------------------------------------------------------------------ the two passes

    def first_pass(
        self, inputs: Sequence[Tensor], *, keep: bool, outputs: bool
    ) -> tuple[list[_Kept], tuple[Tensor, ...]]:
        """All segments in order without gradients: what entered each, and the summed outputs if asked for.

        Without outputs the last segment is not run: nothing of it is needed.
        """
        kept: list[_Kept] = []
        sums: tuple[Tensor, ...] = ()
        state: Any = None

        with self.surroundings.casts_kept():
            for k in range(len(self.cuts)):
                if keep:
                    leaves, spec = ([], None) if state is None else pytree.tree_flatten(state)
                    kept.append(_Kept(tuple(leaves), spec, RandomState.of(self.device)))
                if outputs or k + 1 < len(self.cuts):
                    segment = self.segment(k, inputs)
                    outs, state = self.surroundings.run(self.run, k, segment, state, outputs, grad=False)
                    state = None if state is None else pytree.tree_map(_compact, state)
                    sums = _added(sums, outs)
        return kept, sums

    def second_pass(
        self,
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        kept: list[_Kept],
        douts: Sequence[Tensor | None] | None,
    ) -> tuple[tuple[Tensor, ...], list[Tensor | None], list[Tensor | None]]:
        """The segments from the last to the first with gradients; `kept` is emptied on the way.

        douts: the gradients of the summed outputs; None stands for 1. Returns the summed outputs, the
        gradients of the inputs and of the parameters (half-precision ones summed in fp32).
        """
        dinputs = [torch.zeros_like(x) if n else None for x, n in zip(inputs, needed)]
        total = _Total(self.parameters)
        dstate: list[Tensor | None] = []
        sums: tuple[Tensor, ...] = ()
        after = None if douts is None else RandomState.of(self.device)
        with self.surroundings.casts_kept():
            for k in reversed(range(len(self.cuts))):
                entering = kept.pop()
                entering.random.restore(self.device)
                leaves = [_fresh(t, True) for t in entering.leaves]
                segment = self.segment(k, [x.detach() for x in inputs])
                own = tuple(_fresh(x, n) for x, n in zip(segment.inputs, needed))
                segment = Segment(segment.start, segment.end, own, segment.seqs)

                outs, state = self.surroundings.run(
                    self.run, k, segment, entering.state(leaves), True, grad=True
                )
                leaving = [] if state is None else pytree.tree_leaves(state)
                given = [torch.ones_like(o) for o in outs] if douts is None else list(douts)
                pairs = [(o, d) for o, d in zip([*outs, *leaving], [*given, *dstate])]
                pairs = [(o, d) for o, d in pairs if d is not None and _is_tensor(o) and o.requires_grad]
                targets = [t for t in (*own, *leaves) if t.requires_grad]
                found: dict[int, Tensor | None] = {}
                if pairs:
                    with hooks_held(self.parameters):
                        results = torch.autograd.grad(
                            [o for o, _ in pairs],
                            [*self.parameters, *targets],
                            [d for _, d in pairs],
                            allow_unused=True,
                        )
                    total.add(results[: len(self.parameters)])
                    found = {id(t): g for t, g in zip(targets, results[len(self.parameters) :])}
                for whole, part in zip(dinputs, own):
                    g = found.get(id(part))
                    if whole is not None and g is not None:
                        whole[:, segment.start : segment.end] = g
                dstate = [found.get(id(t)) for t in leaves]
                sums = _added(tuple(o.detach() for o in outs), sums)
                if after is None:
                    after = RandomState.of(self.device)  # as after one pass over the whole
                del outs, leaving, state, pairs, found  # the graph, before the next one is made
        assert after is not None
        after.restore(self.device)
        return sums, dinputs, total.sums


class _Total:
    """The parameters' gradients, summed over segments: in fp32 for bf16 and fp16 parameters."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._wide = [
            torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype for p in parameters
        ]
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        have: list[Tensor] = []
        more: list[Tensor] = []
        for i, g in enumerate(grads):
            if g is None:
                continue
            mine = self.sums[i]
            if mine is None:
                # A copy where autograd may hand out a view, or the same tensor for two parameters.
                self.sums[i] = g.to(self._wide[i], copy=True, memory_format=torch.contiguous_format)
            else:
                have.append(mine)
                more.append(g)
        if have:
            torch._foreach_add_(have, more)


class _Sum(torch.autograd.Function):
    """The sum over segments of a plan; see `sum_over_segments`."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, n_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = tensors[:n_inputs]
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.n_inputs = plan, n_inputs
        needed = ctx.needs_input_grad[2 : 2 + n_inputs]
        if plan.ahead:
            kept, _ = plan.first_pass(inputs, keep=True, outputs=False)
            sums, dinputs, dparameters = plan.second_pass(inputs, needed, kept, None)
            grads = [*dinputs, *dparameters]
            ctx.present = [g is not None for g in grads]
            ctx.save_for_backward(*(g for g in grads if g is not None))
            return sums
        kept, sums = plan.first_pass(inputs, keep=True, outputs=True)
        ctx.kept = [(len(k.leaves), k.spec, k.random) for k in kept]
        ctx.versions = [p._version for p in plan.parameters]
        ctx.save_for_backward(*inputs, *(t for k in kept for t in k.leaves))
        return sums

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivatives("training by segments")
        plan: _Plan = ctx.plan
        if all(d is None for d in douts):
            return (None,) * (2 + ctx.n_inputs + len(plan.parameters))
        saved = list(ctx.saved_tensors)
        if plan.ahead:
            dout = douts[0]
            assert dout is not None
            present = iter(saved)
            grads = [next(present) * dout if there else None for there in ctx.present]
            dinputs, dparameters = grads[: ctx.n_inputs], grads[ctx.n_inputs :]
        else:
            for p, version in zip(plan.parameters, ctx.versions):
                if p._version != version:
                    raise RuntimeError(
                        f"segment: a parameter of shape {tuple(p.shape)} was changed in place between the "
                        "forward and the backward, which computes its segments again with it"
                    )
            inputs, leaves = saved[: ctx.n_inputs], iter(saved[ctx.n_inputs :])
            kept = [_Kept(tuple(next(leaves) for _ in range(n)), spec, r) for n, spec, r in ctx.kept]
            needed = ctx.needs_input_grad[2 : 2 + ctx.n_inputs]
            _, dinputs, dparameters = plan.second_pass(inputs, needed, kept, douts)
        narrowed = (None if g is None else g.to(p.dtype) for g, p in zip(dparameters, plan.parameters))
        return (None, None, *dinputs, *narrowed)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _compact(value: Any) -> Any:
    """A tensor that keeps no memory alive but its own: a state is often a view of a whole segment."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    own = value.numel() * value.element_size()
    return value.clone() if value.untyped_storage().nbytes() > own else value


def _fresh(value: Tensor, needed: bool) -> Tensor:
    """The same values as a leaf of a new graph."""
    floating = value.is_floating_point() or value.is_complex()
    return value.detach().requires_grad_(needed and floating)


def _added(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x + y for x, y in zip(a, b)) if a and b else a or b
