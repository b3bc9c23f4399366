"""What Hugging Face's models say about themselves: the size of their images, and what makes features of them wrong."""

import re
from typing import Any

from torch import nn

CLASS_TOKEN = re.compile(r"(^|[._])(cls|class)(_|$)")
"""Names of parameters that are a class token: "embeddings.cls_token", "embeddings.class_embedding"."""


def is_of_transformers(net: nn.Module) -> bool:
    """Whether a model is one of Hugging Face's transformers."""
    return any(c.__module__.partition(".")[0] == "transformers" for c in type(net).__mro__)


def sizes_of(net: nn.Module) -> list[tuple[int, ...]]:
    """The size of a sample, [C, H, W], that a model's configuration names; none if it names none."""
    config: Any = getattr(net, "config", None)
    edge, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    size = tuple(edge) if isinstance(edge, tuple | list) else (edge, edge)
    whole = [n for n in (channels, *size) if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    return [tuple(whole)] if len(whole) == 3 else []


def check(net: nn.Module, pool: str) -> None:
    """Refuse a model that hides a part of each image, and the class token of one that has none.

    Raises:
        ValueError: the configuration masks patches at random, as in a masked autoencoder; pool is "cls" and no
            parameter is a class token, so that the first place would be taken for it.
    """
    if not is_of_transformers(net):
        return
    name, config = type(net).__name__, getattr(net, "config", None)
    ratio = getattr(config, "mask_ratio", None)
    if "mae" in name.lower() and isinstance(ratio, int | float) and ratio > 0:
        raise ValueError(
            f"backbone: expected one that sees whole images: got {name}, which leaves out {ratio:.0%} of the patches "
            "at random, also in evaluation mode; set model.config.mask_ratio = 0.0 first"
        )
    if pool == "cls" and not any(CLASS_TOKEN.search(n) for n, _ in net.named_parameters()):
        raise ValueError(
            f"pool: expected a backbone with a class token for 'cls': got {name}, none of whose parameters is one, so "
            "that the first patch would be taken; use 'auto' or 'mean'"
        )
