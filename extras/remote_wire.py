"""Wire: what a teacher's server (serve_teacher.py) and its client (remote.py) say to each other.

    GET  /hello       JSON: what is served, the hashes of its files, head and weights, how many tokens a pass may have
    GET  /file/NAME   a small file of the checkpoint, as it lies on the server's disk
    GET  /head        safetensors: {"head_VE"}
    POST /score       safetensors: one pass {"tokens_BT", "mask_BT"}, with {"lengths_S"} where sequences lie end to end,
                      and {"temperature", "topk"} where hidden states are too many bytes; answered by {"hidden_NE"}, or
                      by {"top_NK", "id_NK", "tail_N", "logp_N", "entropy_N"}

Every body has its SHA-256 in the header X-Checksum, and every answer the hash of the weights in X-Weights: what was cut
off or damaged is asked for again, and a teacher that has become another one is noticed at once. Errors are JSON,
{"error": one sentence}. The token goes with each request as `Authorization: Bearer TOKEN`.
"""
import hashlib
import re

import safetensors.torch
import torch
from torch import Tensor

from support.tokenizer import TEXT_FILES

PROTOCOL = "opd teacher 1"
TOKEN = "OPD_TEACHER_TOKEN"             # the environment variable
CHECKSUM, WEIGHTS = "X-Checksum", "X-Weights"
SMALL_FILES = ("config.json", *TEXT_FILES)
MOST_HELLO = 2**20                      # bytes
MOST_TOPK = 10_000
SPARE = 2**16                           # bytes of a body besides its numbers
NOTHING = -1e30                         # log of no mass at all: a large finite number, as in losses.renormalised


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def is_digest(value) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def packed(**tensors: Tensor) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def unpacked(body: bytes) -> dict[str, Tensor]:
    """Raises ValueError for bytes that are no safetensors; the library itself raises several kinds."""
    try:
        return safetensors.torch.load(body)
    except Exception as error:
        raise ValueError(f"no safetensors ({error})") from error


def weights_hash(weights: dict[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes: equal where every product would be."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
