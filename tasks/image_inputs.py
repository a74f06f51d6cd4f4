"""Whether a model takes what a data module of images gives."""

from __future__ import annotations

from typing import Any

from ssm_modal.layers import VectorsConfig
from ssm_modal.models import SequenceClassifierConfig, VisionMambaConfig


def check_image_input(config: Any, data: Any) -> None:
    """Raise ValueError where the model of `config` takes whole images or pixels and `data` gives something
    else, or the reverse, or another number of channels, or images of another size."""
    given = getattr(data, "input", None)
    takes, channels, option = None, 0, ""
    if isinstance(config, VisionMambaConfig):
        takes, channels, option = "images", config.in_chans, "in_chans"
    elif isinstance(config, SequenceClassifierConfig) and isinstance(config.input, VectorsConfig):
        takes, channels, option = "pixels", config.input.channels, "input.channels"
    if given is None or (takes is None and given not in ("images", "pixels")):
        return
    if given != takes:
        what = takes if takes is not None else getattr(getattr(config, "input", None), "type", "other input")
        raise ValueError(
            f"the data gives {given!r}, but the model takes {what!r}; set data.init_args.layout to "
            '"images" for a Vision Mamba or "pixels" for a pixels_classifier'
        )
    if data.channels != channels:
        raise ValueError(
            f"the data gives images of {data.channels} channels, but the model was built for {channels}; set "
            f"data.init_args.channels to {channels}, or model.init_args.overrides.{option} to {data.channels}"
        )
    if isinstance(config, VisionMambaConfig) and not config.dynamic_img_size:
        size = tuple(data.image_size)
        if size != config.image:
            raise ValueError(
                f"the data gives images of {size[0]} x {size[1]} pixels, but the model was built for "
                f"{config.image[0]} x {config.image[1]}; set data.init_args.image_size or "
                "model.init_args.overrides.img_size"
            )
