"""Tensors on their way to a file and back. Several processes put versions in place that gather and cut shards."""
from torch import Tensor


def on_host(tensor: Tensor) -> Tensor:
    """The whole tensor, on the CPU."""
    return tensor.detach().cpu()


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A tensor from a file, as the parameter that it belongs to is held."""
    return whole
