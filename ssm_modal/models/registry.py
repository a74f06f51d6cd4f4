"""Models by name: a builder is a plain function that returns a config, and holds numbers only."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any, TypeVar

from ssm_modal.errors import ConfigError, nearest
from ssm_modal.models.base import Model, ModelConfig

Builder = TypeVar("Builder", bound=Callable[[], ModelConfig])

_builders: dict[str, Callable[[], ModelConfig]] = {}


def register_model(builder: Builder) -> Builder:
    """Register a function without arguments that returns a model's config, under the function's name.

    Raises ValueError where the name is taken by another function.
    """
    name = getattr(builder, "__name__", "")
    known = _builders.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (
        builder.__module__,
        builder.__qualname__,
    ):
        raise ValueError(
            f"register_model: the name {name!r} is taken by {known.__module__}.{known.__qualname__}"
        )
    _builders[name] = builder
    return builder


def list_models(pattern: str | None = None) -> list[str]:
    """Registered names in order; `pattern` picks some, as file names are ("mamba_*").

    >>> list_models("s4d*")
    ['s4d_lm']
    """
    return sorted(name for name in _builders if pattern is None or fnmatch.fnmatchcase(name, pattern))


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The config of a registered model with some fields changed; see `create_model`."""
    if name not in _builders:
        raise ConfigError(f"unknown model {name!r}; {nearest(name, _builders)}")
    return _builders[name]().with_overrides(overrides)


def create_model(name: str, **overrides: Any) -> Model:
    """A freshly initialised model by its registered name, a plain `nn.Module`.

    overrides: fields of its nested config, by a dotted path (`**{"backbone.mixer.d_state": 32}`) or by the
    last part alone where only one field has that name (`d_state=32`). A nested config is replaced by a config
    or by a dict with its "type" (`mixer={"type": "s4d"}`).

    Raises ConfigError for an unknown name or key, naming the nearest valid one, and for values that do not
    fit.

    >>> create_model("mamba_lm", vocab_size=16, d_model=64, n_layers=2).config.backbone.n_layers
    2
    """
    return model_config(name, **overrides).build()
