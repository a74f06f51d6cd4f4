"""SaShiMi's U-Net: stacks of blocks at several rates, joined by causal pooling (arXiv 2202.09729).

The outermost stage runs at every step, the next at every pool[0]-th, and so on to the centre. On the way down
steps are pooled, on the way up each stage adds what comes from below to what it kept from the way down and
runs its blocks over the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssm_modal.backbone.backbone import Backbone, BackboneState
from ssm_modal.backbone.base import BackboneBase, BackboneBaseConfig
from ssm_modal.backbone.config import BackboneConfig
from ssm_modal.errors import ConfigError, StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import check_positive
from ssm_modal.layers.feed_forward import FeedForwardConfig
from ssm_modal.layers.mamba import MambaConfig
from ssm_modal.layers.mixer import MixerConfig, check_input, check_state
from ssm_modal.layers.pooling import DownPool, UpPool, queue_through
from ssm_modal.layers.s4d import S4DConfig
from ssm_modal.state import State


@dataclass(frozen=True)
class SashimiConfig(BackboneBaseConfig):
    """pool: the pooling factors, the outermost first; there is one stage more than factors.

    n_layers, mixer: of every stage, or one a stage, the outermost first, the last standing for all that lie
    deeper. stage_expand: each stage is as many times as wide as the one outside it (rounded). down_layers:
    blocks of each stage on the way down too, 0 as in the paper's autoregressive models. The rest as in
    `BackboneConfig`.
    """

    type: ClassVar[str] = "sashimi"
    n_layers: int | tuple[int, ...] = 4
    pool: tuple[int, ...] = (4, 4)
    stage_expand: float = 2.0
    mixer: MixerConfig | tuple[MixerConfig, ...] = field(
        default_factory=lambda: (S4DConfig(expand=1), MambaConfig())
    )
    down_layers: int = 0
    mlp: FeedForwardConfig | tuple[FeedForwardConfig | None, ...] | None = None
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    dropout: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "SashimiConfig"
        check_positive(name, d_model=self.d_model, stage_expand=self.stage_expand)
        if not self.pool:
            raise ConfigError(f"{name}: pool is empty, expected at least one factor")
        for what, values in (("n_layers", self.n_layers), ("mixer", self.mixer)):
            if isinstance(values, tuple) and not 1 <= len(values) <= len(self.pool) + 1:
                raise ConfigError(
                    f"{name}: {what} has {len(values)} entries, expected 1 to {len(self.pool) + 1}, "
                    "the stages"
                )
        for i, factor in enumerate(self.pool):
            if factor < 2:
                raise ConfigError(f"{name}: pool[{i}] is {factor}, expected 2 or more")
        if self.down_layers < 0:
            raise ConfigError(f"{name}: down_layers is {self.down_layers}, expected 0 or more")
        for depth in range(len(self.pool) + 1):
            stage = self.stage(depth, 1)
            why = stage.sees_the_future()
            if why is not None:
                raise ConfigError(f"{name}: stage {depth}: {why}, but pooling is causal")

    def stage(self, depth: int, n_layers: int | None = None) -> BackboneConfig:
        """The stack at `depth`, 0 the outermost; `n_layers` blocks of it, None: as the config says."""
        layers, mixer = self.n_layers, self.mixer
        if isinstance(layers, tuple):
            layers = layers[min(depth, len(layers) - 1)]
        if isinstance(mixer, tuple):
            mixer = mixer[min(depth, len(mixer) - 1)]
        return BackboneConfig(
            d_model=max(1, round(self.d_model * self.stage_expand**depth)),
            n_layers=layers if n_layers is None else n_layers,
            mixer=mixer,
            mlp=self.mlp,
            norm_eps=self.norm_eps,
            residual_in_fp32=self.residual_in_fp32,
            dropout=self.dropout,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    @property
    def aux_loss_coef(self) -> float:
        return self.stage(0).aux_loss_coef

    def build(self) -> Sashimi:
        return Sashimi(self)


@dataclass(frozen=True)
class SashimiState(State):
    """What a `Sashimi` carries.

    seen: (rows,) int64, how many steps each row has had; it stays on the host, where it decides what runs.
    stages: one state a stack: those on the way down, the centre, those on the way up, deepest first.
    down: a pooling factor: (rows, pool - 1, width), steps of a frame that is not whole yet, zeros behind
    them. up: the same of steps that a frame has given and whose time has not come.
    """

    seen: Tensor
    stages: tuple[BackboneState, ...]
    down: tuple[Tensor, ...]
    up: tuple[Tensor, ...]

    def to(
        self, device: torch.device | str | None = None, *, dtype: torch.dtype | None = None
    ) -> SashimiState:
        moved = super().to(device, dtype=dtype)
        return SashimiState(self.seen, moved.stages, moved.down, moved.up)


@dataclass
class _Run:
    """The state as it becomes in one call of `Sashimi.forward`; None for a stage that has not begun."""

    stages: list[BackboneState | None]
    down: list[Tensor]
    up: list[Tensor]


class Sashimi(BackboneBase):
    """(batch, length, d_model) to the same: stages at rates that fall by `config.pool`, exactly causal.

    Whole sequences, packed ones, segments of any length and single steps give the same: steps of a frame that
    is not whole wait in the state, and so do steps of a frame whose time has not come. Rows of one batch may
    stand at different places in their frames.
    """

    config: SashimiConfig
    state_type = SashimiState
    steps_alike = False

    def __init__(self, config: SashimiConfig) -> None:
        super().__init__()
        self.config = config
        self.d_model = config.d_model
        depths = len(config.pool)
        widths = [config.stage(depth).d_model for depth in range(depths + 1)]
        sides = list(zip(widths, widths[1:], config.pool))
        self.down_pools = nn.ModuleList(DownPool(outer, inner, pool) for outer, inner, pool in sides)
        self.up_pools = nn.ModuleList(UpPool(inner, outer, pool) for outer, inner, pool in sides)
        down = [config.stage(d, config.down_layers) for d in range(depths)] if config.down_layers else []
        around = [config.stage(depth) for depth in reversed(range(depths))]
        # In the order in which a step runs through them: the way down, the centre, the way up.
        self.stages = nn.ModuleList(Backbone(stage) for stage in [*down, config.stage(depths), *around])
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        for depth in range(len(self.config.pool)):
            for pool in self._pools(depth):
                nn.init.zeros_(pool.proj.bias)

    def _stack(self, number: int) -> Backbone:
        stage = self.stages[number]
        assert isinstance(stage, Backbone)
        return stage

    def _stacks(self) -> list[Backbone]:
        return [self._stack(number) for number in range(len(self.stages))]

    def _pools(self, depth: int) -> tuple[DownPool, UpPool]:
        down, up = self.down_pools[depth], self.up_pools[depth]
        assert isinstance(down, DownPool)
        assert isinstance(up, UpPool)
        return down, up

    @property
    def gradient_checkpointing(self) -> bool:  # type: ignore[override]
        return all(stage.gradient_checkpointing for stage in self._stacks())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        for stage in self._stacks():
            stage.gradient_checkpointing = value

    def forward(
        self, x: Tensor, state: SashimiState | None = None, *, seqs: Sequences | Tensor | None = None
    ) -> tuple[Tensor, SashimiState]:
        check_input(self, x)
        if seqs is not None and not isinstance(seqs, Sequences):
            seqs = Sequences.from_cu_seqlens(seqs, x.shape[1], x.device)
        check_input(self, x, seqs)
        self._check_state(state, x, seqs)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self._weight.dtype)
        batch, length, _ = x.shape
        if state is not None and seqs is None and not self._in_step(state):
            packed = Sequences.from_lengths([length] * batch, x.device)
            y, new = self.forward(x.reshape(1, batch * length, -1), state, seqs=packed)
            return y.view(batch, length, -1), new
        lengths = [length] * batch if seqs is None else list(seqs.lengths)
        if state is None:
            seen = torch.zeros(len(lengths), dtype=torch.int64)
            run = _Run([None] * len(self.stages), self._slots(len(lengths), x), self._slots(len(lengths), x))
        else:
            seen = state.seen
            run = _Run(list(state.stages), list(state.down), list(state.up))
        y = self._level(0, x, run, seen.tolist(), lengths, seqs)
        stages = [
            stage.init_state(len(lengths), device=x.device, dtype=x.dtype) if own is None else own
            for stage, own in zip(self._stacks(), run.stages)
        ]
        after = seen + torch.tensor(lengths, dtype=torch.int64)
        return y, SashimiState(after, tuple(stages), tuple(run.down), tuple(run.up))

    def _level(
        self, depth: int, x: Tensor, run: _Run, seen: list[int], lengths: list[int], seqs: Sequences | None
    ) -> Tensor:
        """The stages from `depth` inwards over x, whose rows have had `seen` steps at this rate."""
        pools = len(self.config.pool)
        if depth == pools:
            return self._stage(self._centre, x, run, seqs)
        if self.config.down_layers:
            x = self._stage(depth, x, run, seqs)
        pool = self.config.pool[depth]
        begun = [n % pool for n in seen]
        frames = [(b + n) // pool for b, n in zip(begun, lengths)]
        whole = [n * pool for n in frames]
        inner, run.down[depth] = queue_through(run.down[depth], begun, x, whole, seqs)
        within = None if seqs is None else Sequences.from_lengths(frames, x.device)
        down, up = self._pools(depth)
        y = self._level(depth + 1, down(inner), run, [n // pool for n in seen], frames, within)
        given = None if seqs is None else Sequences.from_lengths(whole, x.device)
        early = [pool - 1 - b for b in begun]
        y, run.up[depth] = queue_through(run.up[depth], early, up(y), lengths, given)
        return self._stage(self._centre + pools - depth, x + y, run, seqs)

    def _stage(self, number: int, x: Tensor, run: _Run, seqs: Sequences | None) -> Tensor:
        if x.shape[1] == 0:
            return x  # no frame has become whole: the stage's state stays
        y, run.stages[number] = self._stack(number)(x, run.stages[number], seqs=seqs)
        return y

    @property
    def _centre(self) -> int:
        return len(self.config.pool) if self.config.down_layers else 0

    def _in_step(self, state: SashimiState) -> bool:
        """Whether all rows stand at the same place in their frames, at every rate."""
        places = state.seen % math.prod(self.config.pool)
        return bool((places == places[:1]).all())

    def _check_state(self, state: Any, x: Tensor, seqs: Sequences | None) -> None:
        check_state(self, state, x, seqs)
        if state is not None and (len(state.stages), len(state.down)) != (
            len(self.stages),
            len(self.config.pool),
        ):
            raise StateError(
                f"Sashimi: state has {len(state.stages)} stages and {len(state.down)} pooling factors, "
                f"expected {len(self.stages)} and {len(self.config.pool)}"
            )

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SashimiState:
        like = self._weight.new_empty(0, device=device, dtype=dtype)
        return SashimiState(
            torch.zeros(batch, dtype=torch.int64),
            tuple(stage.init_state(batch, device=like.device, dtype=like.dtype) for stage in self._stacks()),
            tuple(self._slots(batch, like)),
            tuple(self._slots(batch, like)),
        )

    @property
    def _weight(self) -> Tensor:
        return self._stack(self._centre).norm.weight

    def _slots(self, rows: int, like: Tensor) -> list[Tensor]:
        """Where steps wait at each pooling factor, empty: (rows, pool - 1, width), else as `like`."""
        widths = [self.config.stage(depth).d_model for depth in range(len(self.config.pool))]
        return [like.new_zeros(rows, pool - 1, width) for pool, width in zip(self.config.pool, widths)]

    @torch.no_grad()
    def step_(self, x: Tensor, state: SashimiState) -> Tensor:
        check_input(self, x)
        self._check_state(state, x, None)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self._weight.dtype)
        if self._in_step(state):
            y = self._step(0, x, state, int(state.seen[0]))
            state.seen.add_(1)
            return y
        y, new = self.forward(x, state)
        for mine, theirs in zip(state.tensors(), new.tensors()):
            mine.copy_(theirs)
        return y

    def _step(self, depth: int, x: Tensor, state: SashimiState, seen: int) -> Tensor:
        """One step at `depth` of rows that all have had `seen` steps there."""
        if depth == len(self.config.pool):
            return self._stack(self._centre).step_(x, state.stages[self._centre])
        if self.config.down_layers:
            x = self._stack(depth).step_(x, state.stages[depth])
        pool = self.config.pool[depth]
        begun, down, up = seen % pool, state.down[depth], state.up[depth]
        if begun == pool - 1:
            to_frame, to_steps = self._pools(depth)
            frame = to_frame(torch.cat([down.to(x.dtype), x], dim=1))
            below = to_steps(self._step(depth + 1, frame, state, seen // pool))
            down.zero_()
            y = below[:, :1]
            up.copy_(below[:, 1:])
        else:
            down[:, begun] = x[:, 0]
            y = up[:, :1].to(x.dtype, copy=True)
            up.copy_(torch.cat([up[:, 1:], torch.zeros_like(up[:, :1])], dim=1))
        number = self._centre + len(self.config.pool) - depth
        return self._stack(number).step_(x + y, state.stages[number])
