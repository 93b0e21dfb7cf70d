"""Saving: a model's weights into a Hugging Face folder, and fresh weights for a new one. support/weights.py is the way
back."""
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.errors import NotFinite


class Saves:
    """What model.Transformer can do with files."""

    def init_weights(self, seed: int):
        """Fresh weights: normal(0, 0.02), norms 1, biases 0; residual outputs smaller by sqrt(2 layers)."""
        rng = torch.Generator().manual_seed(seed)
        small = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if parameter.dim() == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                else:
                    parameter.normal_(0.0, small if "o_proj" in name or "down_proj" in name else 0.02, generator=rng)
        return self

    def on_disk(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the files, under their names: all or parts (views) of these parameters. Here all."""
        return weights

    def from_disk(self, name: str) -> str | None:
        """The name in on_disk() of a tensor of the files; None: it is not read. Old Llama files hold angles of rope,
        which config.json tells."""
        return None if name.endswith("rotary_emb.inv_freq") else name

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors in `dtype`, by default the dtype the checkpoint came in. The
        tokenizer's files are Tokenizer.save's business. Weights that are not finite as written (65,504 is the largest
        number of float16) are refused before anything is written."""
        dtype = dtype or self.disk_dtype
        folder = Path(folder)
        whole = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in self.weights().items()}
        tensors = {name: tensor.contiguous() for name, tensor in self.on_disk(whole).items()}
        for name, tensor in tensors.items():
            if not all_finite(tensor):
                raise NotFinite(f"{self.title} holds NaN or infinity: tensor {name}, as {dtype} on disk; it is not "
                                f"saved to {folder}; lower --lr or --max_grad_norm")
        folder.mkdir(parents=True, exist_ok=True)
        raw = {key: value for key, value in self.config.raw.items() if key not in ("torch_dtype", "dtype")}
        raw["dtype" if "rope_parameters" in raw else "torch_dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def all_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity: either shows in the extremes, which cost a twentieth of isfinite() on a CPU."""
    return all(math.isfinite(extreme) for extreme in tensor.detach().aminmax())
