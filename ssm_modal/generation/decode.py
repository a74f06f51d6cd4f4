"""Decoding on the device: the model's step and the choice of the next token, on CUDA as one graph."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ssm_modal.generation.config import GenerationConfig
from ssm_modal.generation.prompts import CausalModel
from ssm_modal.generation.sampling import choose
from ssm_modal.state import State

GRAPH_FROM = 8  # tokens from which on capturing a graph is worth the few steps it takes
DRAWS = 64  # random numbers of a row that are drawn and moved to the device at once
BLOCK = 32  # tokens taken between two looks of the host, where it need not look at each


class Decoder:
    """The rows of one `generate` on the device: their state, last tokens and random numbers.

    `take(n)` gives the next n tokens of every row. On CUDA a step and the choice behind it are one graph over
    buffers that stay where they are; the host then waits for the device once a `take`, not once a token.
    `rows`: which prompt each row of the state is of. `fixed`: whether the rows stay as they are (under a
    graph), else `keep` leaves out those that have ended. state: as prefill returned it, changed in place.
    seen: (rows, limit) bool for a repetition penalty. limit: tokens from there on are never chosen.
    """

    def __init__(
        self,
        model: CausalModel,
        logits: Tensor,
        state: State,
        config: GenerationConfig,
        generators: list[torch.Generator],
        *,
        seen: Tensor | None,
        limit: int,
    ) -> None:
        self.model, self.config, self.limit, self.seen = model, config, limit, seen
        self.rows = list(range(logits.shape[0]))
        self._logits: Tensor | None = logits  # of the prompts, until the first token is chosen
        self._generators = generators
        device = logits.device
        hidden = [token for token in config.suppress_tokens if token < limit]
        self._suppressed = torch.tensor(hidden, dtype=torch.int64, device=device) if hidden else None
        alike = getattr(getattr(model, "backbone", None), "steps_alike", False)
        worth = config.cuda_graph and config.max_new_tokens >= GRAPH_FROM
        self.fixed = worth and alike and can_capture(device)
        self.state = state.reserve(config.max_new_tokens) if self.fixed else state
        self._make_buffers(BLOCK if self.fixed else 1, device)
        self._drawn = torch.zeros(len(self.rows), 0, dtype=torch.float64, device=device)
        self._graph: Callable[[], None] | None = None
        self._tokens = torch.zeros(len(self.rows), dtype=torch.int64, device=device)

    @property
    def most(self) -> int:
        """Tokens that `take` gives at once at most."""
        return self._taken.shape[1]

    def _make_buffers(self, most: int, device: torch.device) -> None:
        n = len(self.rows)
        self._taken = torch.zeros(n, most, dtype=torch.int64, device=device)
        self._uniform: Tensor | None = None
        if self._generators:
            self._uniform = torch.zeros(n, most, dtype=torch.float64, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)

    def take(self, n: int) -> list[list[int]]:
        """The next n tokens, at most `most`, of each row; `NO_TOKEN` where the logits leave none. The last of
        them has not been read by the model yet."""
        self._at.zero_()
        if self._uniform is not None:
            self._uniform[:, :n] = self._draw(n)
        for _ in range(n):
            if self._logits is not None:
                self._choose(self._logits)
                self._logits = None
            else:
                self._advance()
        return self._taken[:, :n].tolist()

    def _draw(self, n: int) -> Tensor:
        """(rows, n): the next numbers of each row's own generator."""
        if self._drawn.shape[1] < n:
            own = [self._generators[row] for row in self.rows]
            more = torch.stack([torch.rand(DRAWS, dtype=torch.float64, generator=g) for g in own])
            self._drawn = torch.cat([self._drawn, more.to(self._drawn.device)], dim=1)
        out, self._drawn = self._drawn[:, :n], self._drawn[:, n:]
        return out

    def keep(self, places: list[int]) -> None:
        """Go on with these places of `rows` alone; nothing where the rows are fixed."""
        if self.fixed:
            return
        index = torch.tensor(places, device=self._tokens.device)
        self.state, self._tokens = self.state.select(index), self._tokens[index]
        self.seen = None if self.seen is None else self.seen[index]
        self._drawn = self._drawn[index]
        self.rows = [self.rows[at] for at in places]
        self._make_buffers(self.most, self._tokens.device)

    def _advance(self) -> None:
        if self.fixed and self._graph is None:
            self._capture()
        if self._graph is None:
            self._step()
        else:
            self._graph()
            self.state.advance_(1)

    def _step(self) -> None:
        """Read the last tokens, choose the next."""
        self._choose(self.model.step_(self._tokens[:, None], self.state)[:, -1])

    def _choose(self, logits: Tensor) -> None:
        at = self._at.expand(len(self.rows), 1)
        uniform = None if self._uniform is None else self._uniform.gather(1, at).squeeze(1)
        logits = logits[:, : self.limit]
        if self._suppressed is not None:
            logits = logits.index_fill(-1, self._suppressed, -torch.inf)
        chosen = choose(logits, self.config, uniform, self.seen)
        self._taken.scatter_(1, at, chosen[:, None])
        self._at.add_(1)
        # A row without a token ends the run once the host sees it; until then the model reads id 0 for it.
        self._tokens.copy_(chosen.clamp(min=0))
        if self.seen is not None:
            self.seen.scatter_(1, self._tokens[:, None], True)

    def _capture(self) -> None:
        scratch = copy.copy(self)
        scratch.state, scratch._tokens, scratch._at = (
            self.state.clone(),
            self._tokens.clone(),
            self._at.clone(),
        )
        scratch._taken = self._taken.clone()
        scratch.seen = None if self.seen is None else self.seen.clone()
        # In recording, or in a part of it, the host notes a step that the device does not take.
        before = self.state.reserve(0)
        try:
            self._graph = captured(self._step, scratch._step, self._taken.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Nothing of the step ran. Such a model reads the device on the host, as odd widths of experts do.
            warnings.warn(
                f"a decode step of this model cannot be a CUDA graph, so its kernels are launched one by "
                f"one: {error}",
                stacklevel=2,
            )
            self.fixed = False
        self.state = before


def can_capture(device: torch.device) -> bool:
    """Whether `device` has graphs."""
    return device.type == "cuda"


def captured(
    step: Callable[[], None], warm_up: Callable[[], None], device: torch.device
) -> Callable[[], None]:
    """`step` as a CUDA graph, which the returned function runs. warm_up: the same step on other buffers:
    first launches compile kernels and make workspaces, which a recording may not."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay
