"""Whether the tensors of a checkpoint are those of a model: names and shapes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ssm_modal.errors import CheckpointError, listed

Shape = Sequence[int]


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError unless `tensors` have the names and shapes of `model`'s state dict.

    `source` is what the error calls the place they come from.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_shapes(expected, {name: t.shape for name, t in tensors.items()}, source, type(model).__name__)


def check_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], source: str, model: str) -> None:
    """Raise CheckpointError, with the first differences of each kind, unless `found` has the names and shapes
    of `expected`.

    source, model: what the error calls the place and the model.
    """
    shapes = [
        f"{name} {tuple(found[name])}, expected {tuple(want)}"
        for name, want in expected.items()
        if name in found and tuple(found[name]) != tuple(want)
    ]
    lists = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": shapes,
    }
    problems = [f"{title}: {listed(names, 16)}" for title, names in lists.items() if names]
    if problems:
        raise CheckpointError(f"{source} does not fit {model}; {'; '.join(problems)}")
