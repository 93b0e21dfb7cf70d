"""Rope on a part of each head's channels (partial_rotary_factor), as Phi-3 and Qwen3.5 have it."""
from dataclasses import replace

import torch
from torch import Tensor

from model import rope_frequencies, rotate
from support.errors import UserError
from support.model_config import ModelConfig, Reader, head_width, rope_settings


def partial_rope(read: Reader) -> dict:
    """rope_settings, and how many channels of a head are turned. The factor stands beside rope, or in it."""
    found, width = rope_settings(read), head_width(read)
    factor = found.setdefault("partial_rotary_factor", read("partial_rotary_factor"))
    found["turned"] = int(width * factor)
    if found["turned"] < 2 or found["turned"] % 2:
        raise UserError(f"{read.where}: partial_rotary_factor {factor:g} of head_dim {width} is {found['turned']} "
                        f"channels; rope turns them in pairs")
    return found


def partial_frequencies(config: ModelConfig) -> Tensor:
    """model.rope_frequencies of the channels that are turned."""
    return rope_frequencies(replace(config, head_dim=config.rope["turned"]))


def turned_in_part(x_BTnH: Tensor, cos_BT1h: Tensor, sin_BT1h: Tensor) -> Tensor:
    """The first h channels of each head turned."""
    h = cos_BT1h.shape[-1]
    return torch.cat((rotate(x_BTnH[..., :h], cos_BT1h, sin_BT1h), x_BTnH[..., h:]), -1)
