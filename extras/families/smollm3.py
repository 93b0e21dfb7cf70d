"""SmolLM3: a Llama every fourth layer of which has no rope (NoPE, arXiv:2501.18795)."""
from torch import Tensor

from extras.families.sliding import KEYS, SlidingLayer, settings, switched
from model import MODELS, Causal, Transformer
from support.errors import UserError, shown
from support.model_config import FAMILIES, Family, Key, ModelConfig, Reader

STILL = 1.0, 0.0        # cos and sin of no turn


class SmolLayer(SlidingLayer):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__(c, layer)
        self.turns = c.own["turns"][layer]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], keys: Causal, seen) -> Tensor:
        return super().forward(x, rope if self.turns else STILL, keys, seen)


class SmolLM3(Transformer):
    layer_type = SmolLayer


def smollm3(read: Reader) -> dict:
    count, every = read("num_hidden_layers"), read("no_rope_layer_interval")
    turns = read("no_rope_layers") or [(layer + 1) % every for layer in range(count)]       # 1: the layer has rope
    if len(turns) != count or not all(isinstance(turn, int) for turn in turns):
        raise UserError(f"{read.where}: no_rope_layers {shown(turns, 90)} is not supported, only 0 or 1 for each of "
                        f"the {count} layers")
    read = switched(read)
    return settings(read, lambda layer: read("sliding_window") and not turns[layer], turns=turns)


FAMILIES["smollm3"], MODELS["smollm3"] = Family(settings=smollm3, keys={
    "layer_types": KEYS["layer_types"], "no_rope_layers": Key(list, None, null=True),
    "no_rope_layer_interval": Key(int, 4, 1, 512), "use_sliding_window": Key(bool, False, null=True),
    "sliding_window": Key(int, None, 1, 2**30, null=True), "attention_bias": Key(bool, False),
    "mlp_bias": Key(bool, False), "tie_word_embeddings": Key(bool, True, null=True),
    "rope_theta": Key(float, 2e6, 1, 1e15)}), SmolLM3
