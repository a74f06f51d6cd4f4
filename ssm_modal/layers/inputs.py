"""What turns a model's input into vectors of width d_model: token ids, the samples of a waveform, or vectors
of another width, such as pixels.

An input layer is one call, `layer(x, state=None, *, seqs=None) -> (vectors, seqs, state)`, for whole
sequences, packed ones and chunks of a stream: the `seqs` that comes back packs the vectors, of which a
strided layer gives fewer than it was given samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_modal.errors import ConfigError, StateError
from ssm_modal.kernels.sequences import Sequences
from ssm_modal.layers.config import Config, check_positive
from ssm_modal.state import State


@dataclass(frozen=True)
class InputConfig(Config):
    """Base of the input layers' configs."""

    @property
    def needs_whole(self) -> str | None:
        """The field by whose value the layer needs whole sequences, None where chunks of a stream will do."""
        return None

    def build(self, d_model: int) -> InputLayer:
        """The layer this config describes, giving vectors of width `d_model`."""
        raise NotImplementedError(f"{type(self).__name__} describes no layer")


@dataclass(frozen=True)
class IdsConfig(InputConfig):
    """An embedding of vocab_size ids, 0 to vocab_size - 1. embedding_std: its standard deviation at the
    start."""

    type: ClassVar[str] = "ids"
    vocab_size: int
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("IdsConfig", vocab_size=self.vocab_size, embedding_std=self.embedding_std)

    def build(self, d_model: int) -> IdsInput:
        return IdsInput(d_model, self)


@dataclass(frozen=True)
class WaveformConfig(InputConfig):
    """Every sample on its own through a Linear of one channel. scale: samples are multiplied by it first, the
    same for every recording."""

    type: ClassVar[str] = "waveform"
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("WaveformConfig", scale=self.scale)

    def build(self, d_model: int) -> WaveformInput:
        return WaveformInput(d_model, self)


@dataclass(frozen=True)
class VectorsConfig(InputConfig):
    """Vectors of `channels` numbers, each on its own through a Linear: a pixel is one, with a channel a
    colour. positions: None, or steps of which each has a learned vector, added to what stands there; the
    longest sequence then, and the model must need whole sequences."""

    type: ClassVar[str] = "vectors"
    channels: int = 1
    positions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("VectorsConfig", channels=self.channels, positions=self.positions)

    @property
    def needs_whole(self) -> str | None:
        return None if self.positions is None else "positions"

    def build(self, d_model: int) -> VectorsInput:
        return VectorsInput(d_model, self)


@dataclass(frozen=True)
class StridedWaveformConfig(InputConfig):
    """A causal convolution of `kernel` samples, kept at every `stride`-th of them, a GELU and a Linear.

    Vector i of a sequence reads samples i * stride - kernel + 1 to i * stride of that sequence, and zeros
    before its first; n samples give ceil(n / stride) vectors. So a vector is there as soon as its last sample
    is, every sequence with a sample has a vector, and the at most stride - 1 samples behind the last vector
    are not read. kernel: stride or more, so that no sample in between is left out. scale: as for
    `WaveformConfig`.
    """

    type: ClassVar[str] = "strided_waveform"
    kernel: int = 64
    stride: int = 16
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "StridedWaveformConfig"
        check_positive(name, kernel=self.kernel, stride=self.stride, scale=self.scale)
        if self.kernel < self.stride:
            raise ConfigError(
                f"{name}: kernel is {self.kernel}, expected at least stride, which is {self.stride}: samples "
                "between two windows would not be read"
            )

    def build(self, d_model: int) -> StridedWaveformInput:
        return StridedWaveformInput(d_model, self)


@dataclass(frozen=True)
class StridedState(State):
    """past: (rows, kernel - 1), the last samples, the oldest first, zeros before the first. seen: (rows,)
    int64, how many samples a row has had."""

    past: Tensor
    seen: Tensor


class InputLayer(nn.Module):
    """Base of the input layers. state_type: what it carries along a stream, None where that is nothing.
    channels: the last axis of what it takes, None for (batch, length)."""

    state_type: type[State] | None = None
    channels: int | None = None

    def forward(
        self, x: Tensor, state: StridedState | None = None, *, seqs: Sequences | None = None
    ) -> tuple[Tensor, Sequences | None, StridedState | None]:
        """x: (batch, length[, channels]), or (1, total[, channels]) packed by `seqs`; state: what an earlier
        call returned.

        Returns (vectors (batch, steps, d_model) or (1, steps, d_model), the Sequences that pack them, new
        state).
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def init_state(
        self, rows: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> StridedState | None:
        """The state before the first step for `rows` rows; None where the layer carries nothing."""
        return None


class IdsInput(InputLayer):
    """ids (batch, length) int64 or int32 to their embeddings (batch, length, d_model)."""

    def __init__(self, d_model: int, config: IdsConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)

    def forward(
        self, x: Tensor, state: StridedState | None = None, *, seqs: Sequences | None = None
    ) -> tuple[Tensor, Sequences | None, None]:
        check_ids(type(self).__name__, x, self.config.vocab_size)
        return self.embedding(x), seqs, None


class WaveformInput(InputLayer):
    """waveform (batch, length) of a floating dtype to (batch, length, d_model)."""

    def __init__(self, d_model: int, config: WaveformConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Linear(1, d_model)

    def forward(
        self, x: Tensor, state: StridedState | None = None, *, seqs: Sequences | None = None
    ) -> tuple[Tensor, Sequences | None, None]:
        check_waveform(type(self).__name__, x)
        x = x.to(self.proj.weight.dtype) * self.config.scale
        return self.proj(x.unsqueeze(-1)), seqs, None


class VectorsInput(InputLayer):
    """vectors (batch, length, channels) of a floating dtype to (batch, length, d_model)."""

    def __init__(self, d_model: int, config: VectorsConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = config.channels
        self.proj = nn.Linear(config.channels, d_model)
        self.positions = None if config.positions is None else nn.Embedding(config.positions, d_model)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)

    def forward(
        self, x: Tensor, state: StridedState | None = None, *, seqs: Sequences | None = None
    ) -> tuple[Tensor, Sequences | None, None]:
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__}: x has dtype {x.dtype}, expected a floating one")
        vectors = self.proj(x.to(self.proj.weight.dtype))
        if self.positions is None:
            return vectors, seqs, None
        lengths = [x.shape[1]] if seqs is None else seqs.lengths
        if max(lengths, default=0) > self.positions.num_embeddings:
            raise ValueError(
                f"{type(self).__name__}: x has {max(lengths)} steps, expected at most "
                f"{self.positions.num_embeddings}, the positions"
            )
        own = [self.positions.weight[:n] for n in lengths]
        return vectors + torch.cat(own).to(vectors.dtype), seqs, None


class StridedWaveformInput(InputLayer):
    """waveform (batch, length) of a floating dtype to (batch, ceil(length / stride), d_model).

    Carries a `StridedState`. With one, how many vectors a chunk gives depends on the samples before it, which
    are read from the device.
    """

    state_type = StridedState

    def __init__(self, d_model: int, config: StridedWaveformConfig) -> None:
        super().__init__()
        self.config = config
        self.width = d_model  # of what `_embed` gives
        self.conv = nn.Linear(config.kernel, d_model)  # one row a window
        self.proj = nn.Linear(d_model, d_model)

    def forward(
        self, x: Tensor, state: StridedState | None = None, *, seqs: Sequences | None = None
    ) -> tuple[Tensor, Sequences | None, StridedState]:
        check_waveform(type(self).__name__, x)
        kernel, stride = self.config.kernel, self.config.stride
        rows = x.shape[0] if seqs is None else seqs.n
        if state is None:
            state = self.init_state(rows, device=x.device, dtype=x.dtype)
            waits = [0] * rows
        else:
            if state.past.shape[0] != rows:
                raise StateError(
                    f"{type(self).__name__}: state has {state.past.shape[0]} rows, expected {rows}"
                )
            waits = [-seen % stride for seen in state.seen.tolist()]  # samples before the next vector's last
        if seqs is None and len(set(waits)) > 1:
            raise StateError(
                f"{type(self).__name__}: the rows of the state stand at different places in their stride; "
                "pack their chunks end to end with seqs"
            )
        if seqs is None:
            return self._unpacked(x, state, waits[0] if waits else 0)
        steps = [max(0, -(-(n - wait) // stride)) for n, wait in zip(seqs.lengths, waits)]
        # Zeros or leftover samples of every row, then what was given: a window reads from both.
        source = torch.cat([state.past.to(x.dtype).flatten(), x.flatten()])
        first = seqs.cu_seqlens[:rows] + rows * (kernel - 1)
        last, row = _window_ends(steps, waits, stride, x.device)
        window = torch.arange(1 - kernel, 1, device=x.device)
        index = _places(last[:, None] + window, row[:, None], first, kernel)
        out = self._embed(source[index])
        ends = torch.tensor(seqs.lengths[:rows], dtype=torch.int64).to(x.device)
        every = torch.arange(rows, device=x.device)[:, None]
        past = source[_places(ends[:, None] + window[:-1], every, first, kernel)]
        new = StridedState(past, state.seen + ends)
        return out.unsqueeze(0), Sequences.from_lengths(steps, x.device), new

    def _unpacked(
        self, x: Tensor, state: StridedState, wait: int
    ) -> tuple[Tensor, Sequences | None, StridedState]:
        """As `forward` for rows that all stand `wait` samples before their next vector's last one."""
        kernel, stride = self.config.kernel, self.config.stride
        source = torch.cat([state.past.to(x.dtype), x], 1)
        if x.shape[1] > wait:
            out = self._embed(source[:, wait:].unfold(1, kernel, stride))
        else:
            out = self.proj.weight.new_zeros(x.shape[0], 0, self.width)
        return out, None, StridedState(source[:, x.shape[1] :].clone(), state.seen + x.shape[1])

    def _embed(self, windows: Tensor) -> Tensor:
        """(..., kernel) samples to (..., width)."""
        windows = windows.to(self.conv.weight.dtype) * self.config.scale
        return self.proj(F.gelu(self.conv(windows)))

    def init_state(
        self, rows: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> StridedState:
        device, dtype = device or self.conv.weight.device, dtype or self.conv.weight.dtype
        past = torch.zeros(rows, self.config.kernel - 1, device=device, dtype=dtype)
        return StridedState(past, torch.zeros(rows, dtype=torch.int64, device=device))


def _window_ends(
    steps: list[int], waits: list[int], stride: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The last sample of every vector, counted in its row's chunk, and that row: (vectors,) int64 each."""
    number = torch.tensor(steps, dtype=torch.int64)
    row = torch.repeat_interleave(torch.arange(len(steps)), number)
    place = torch.arange(row.shape[0]) - (number.cumsum(0) - number)[row]
    last = place * stride + torch.tensor(waits, dtype=torch.int64)[row]
    return last.to(device), row.to(device)


def _places(sample: Tensor, row: Tensor, first: Tensor, kernel: int) -> Tensor:
    """Where samples, counted in their row's chunk, stand in what was kept of all rows and what was given."""
    return torch.where(sample < 0, (row + 1) * (kernel - 1) + sample, first[row] + sample)


def check_ids(owner: str, ids: object, vocab_size: int) -> None:
    """Raise unless `ids` is (batch, length) int64 or int32 with ids 0 to vocab_size - 1.

    On CUDA an id outside is a device-side assertion, since looking at the ids would stop the host.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{owner}: ids must be a tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{owner}: ids has dtype {ids.dtype}, expected int64 or int32")
    if ids.ndim != 2:
        raise ValueError(f"{owner}: ids has shape {tuple(ids.shape)}, expected (batch, length)")
    if ids.numel() == 0:
        return
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(n) for n in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            what = f"the largest id is {high}" if high >= vocab_size else f"the smallest id is {low}"
            raise ValueError(f"{owner}: ids outside the vocabulary: {what}, expected 0 to {vocab_size - 1}")
        return
    torch._assert_async(
        ((ids >= 0) & (ids < vocab_size)).all(),
        f"{owner}: ids outside the vocabulary, expected 0 to {vocab_size - 1}",
    )


def check_waveform(owner: str, waveform: object) -> None:
    """Raise unless `waveform` is (batch, length) of a floating dtype."""
    if not isinstance(waveform, Tensor):
        raise TypeError(f"{owner}: the waveform must be a tensor, got {type(waveform).__name__}")
    if not waveform.is_floating_point():
        raise TypeError(f"{owner}: the waveform has dtype {waveform.dtype}, expected a floating one")
    if waveform.ndim != 2:
        raise ValueError(f"{owner}: the waveform has shape {tuple(waveform.shape)}, expected (batch, length)")
