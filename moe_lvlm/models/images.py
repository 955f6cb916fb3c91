"""The size of images that a tower takes, and an image of that size that shows nothing."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedConfig


def image_size(vision_config: PreTrainedConfig) -> tuple[int, int]:
    """(height, width) that a tower was made for."""
    size = vision_config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def blank_image(vision_config: PreTrainedConfig, *, like: Tensor) -> Tensor:
    """[1, C, H, W] of zeros, in the type and on the device of `like`.

    A parameter's type would do, but under ZeRO-3 a look at another module's parameter gathers it: on the ranks without
    an image only.
    """
    # InstructBLIP's towers read RGB, and do not say so
    return like.new_zeros(1, getattr(vision_config, "num_channels", 3), *image_size(vision_config))
