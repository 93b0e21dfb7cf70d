"""ModelConfig: what a checkpoint's config.json says, every key read through one table of types and ranges.

config.json is a stranger's file, and its numbers decide how much is allocated and what is computed. What is not in the
table is not read, only kept for saving.
"""
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

from support.errors import UserError, shown

REQUIRED = object()
FAMILIES: dict[str, "Family"] = {}      # model_type -> what is particular about its config.json


class Key(NamedTuple):
    """What a key of config.json may hold: from `lowest` to `highest` for a number, one of `choices` for a text."""
    kind: type                      # float takes whole numbers too, nothing but bool takes true and false
    default: object = REQUIRED      # where the key is missing
    lowest: float = 0
    highest: float = 0
    choices: tuple = ()
    null: bool = False              # null is allowed: not set, or switched off
    families: tuple = ()    # elsewhere the key means nothing and the default holds, as in transformers; () = all

    def allowed(self) -> str:
        """The values, in words."""
        if self.kind is str:
            words = ", ".join(map(repr, self.choices))
        elif self.kind in (int, float):
            low, high = (f"{n:,}" if type(n) is int else f"{n:g}" for n in (self.lowest, self.highest))
            words = f"{'whole numbers' if self.kind is int else 'numbers'} from {low} to {high}"
        else:
            words = {bool: "true and false", list: "a list"}.get(self.kind, "an object")
        return words + " and null" * self.null

    def takes(self, value) -> bool:
        if value is None:
            return self.null
        if self.kind is str:
            return isinstance(value, str) and value in self.choices
        if self.kind in (int, float):       # a comparison with NaN is False; type(): True is no number here
            return type(value) in (int, self.kind) and self.lowest <= value <= self.highest
        return isinstance(value, self.kind)


# The highest numbers are several times those of the largest published model: what is above them is damage, and would
# be built, or multiplied out, before anything else could say so.
TABLE = {
    "model_type":               Key(str, choices=FAMILIES),
    "hidden_act":               Key(str, "silu", choices=("silu",)),
    "vocab_size":               Key(int, lowest=1, highest=2**22),
    "hidden_size":              Key(int, lowest=1, highest=2**17),
    "intermediate_size":        Key(int, lowest=1, highest=2**19),
    "num_hidden_layers":        Key(int, lowest=1, highest=512),
    "num_attention_heads":      Key(int, lowest=1, highest=2**10),
    "num_key_value_heads":      Key(int, None, 1, 2**10, null=True),        # as many as there are query heads
    "head_dim":                 Key(int, None, 2, 2**10, null=True),        # hidden_size / heads; 128 for qwen3
    "rms_norm_eps":             Key(float, 1e-6, 0, 1),
    "max_position_embeddings":  Key(int, 2048, 1, 2**30, null=True),
    "use_sliding_window":       Key(bool, False, null=True, families=("qwen2", "qwen3")),
    "sliding_window":           Key(int, 4096, 1, 2**30, null=True),
    "tie_word_embeddings":      Key(bool, False, null=True),
    "attention_bias":           Key(bool, False, null=True, families=("llama", "qwen3")),
    "mlp_bias":                 Key(bool, False, null=True, families=("llama",)),
    "rope_parameters":          Key(dict, None, null=True),                 # transformers 5; before it the next two
    "rope_scaling":             Key(dict, None, null=True),
    "rope_theta":               Key(float, 10000.0, 1, 1e15),               # below 1 the slow channels would be fast
    # inside rope_parameters or rope_scaling
    "rope_type":                Key(str, choices=("default", "linear", "llama3")),
    "factor":                   Key(float, lowest=1e-3, highest=1e6),
    "low_freq_factor":          Key(float, lowest=1e-3, highest=1e6),
    "high_freq_factor":         Key(float, lowest=1e-3, highest=1e6),
    "original_max_position_embeddings": Key(float, lowest=1, highest=2**30),
    "partial_rotary_factor":    Key(float, 1.0, 1, 1),
}
ROPE_KEYS = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


class Reader:
    """Reads the keys of one object of config.json through the table."""

    def __init__(self, raw: dict, where: str, family: str = ""):
        self.raw, self.where, self.family = raw, where, family
        self.table = TABLE | FAMILIES[family].keys if family else TABLE

    def __call__(self, key: str):
        rule = self.table[key]
        if key not in self.raw or self.family and rule.families and self.family not in rule.families:
            if rule.default is REQUIRED:
                raise UserError(f"{self.where}: {key} is missing; is this a complete checkpoint?")
            return rule.default
        value = self.raw[key]
        if not rule.takes(value):
            text = repr(value) if isinstance(value, str) else value
            raise UserError(f"{self.where}: {key} {shown(text, 90)} is not supported, only {rule.allowed()}")
        return value


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says, under config.json's own names; `raw` keeps the file for saving."""
    model_type: str
    vocab_size: int                 # rows of the embedding, padding rows included
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: dict = field(hash=False)  # rope_theta, rope_type, and the type's own numbers
    context: int                    # longest sequence: max_position_embeddings, or the sliding window if shorter
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool                   # queries and keys are normed, each head by itself
    raw: dict = field(hash=False)
    own: dict = field(default_factory=dict, hash=False)     # what only this family has

    @staticmethod
    def from_dict(raw: dict, where: str = "config.json") -> "ModelConfig":
        """Reads both spellings: rope_theta + rope_scaling, and transformers 5's rope_parameters."""
        raw = text_part(raw)
        family = Reader({"model_type": raw.get("model_type")}, where)("model_type")
        read = Reader(raw, where, family)
        read("hidden_act")
        if raw.get("quantization_config"):
            raise UserError(f"{where}: quantised checkpoints are not supported; use the bf16 or fp32 one")
        sizes = {key: read(key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                            "num_attention_heads")}
        heads, bias = sizes["num_attention_heads"], bool(read("attention_bias"))
        kv_heads = read("num_key_value_heads") or heads
        if heads % kv_heads:
            raise UserError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        context = read("max_position_embeddings") or TABLE["max_position_embeddings"].default
        if family == "mistral" or read("use_sliding_window"):
            context = min(context, read("sliding_window") or context)
        fields = dict(
            model_type=family, **sizes, num_key_value_heads=kv_heads, head_dim=head_width(read),
            rms_norm_eps=read("rms_norm_eps"), rope=FAMILIES[family].rope(read), context=context,
            tie_word_embeddings=bool(read("tie_word_embeddings")), qkv_bias=bias or family == "qwen2", o_bias=bias,
            mlp_bias=bool(read("mlp_bias")), qk_norm=family == "qwen3", raw=raw)
        return ModelConfig(**fields | FAMILIES[family].settings(read))


def text_part(raw: dict) -> dict:
    """The config of the decoder inside one that also describes a vision tower."""
    text = raw.get("text_config")
    if not isinstance(text, dict):
        return raw
    dtype, tied = ({key: raw[key] for key in keys if key in raw} for keys in (("dtype", "torch_dtype"),
                                                                             ("tie_word_embeddings",)))
    return {**dtype, **text, **tied}        # the outer model has the head, and says whether it is tied


def head_width(read: Reader) -> int:
    hidden, heads = read("hidden_size"), read("num_attention_heads")
    width = read("head_dim")
    if width is None and read.family == "qwen3":
        width = 128
    elif width is None and hidden % heads:
        raise UserError(f"{read.where}: hidden_size {hidden} is no multiple of num_attention_heads {heads}, and no "
                        f"head_dim is given")
    width = width or hidden // heads
    if width % 2 or width > TABLE["head_dim"].highest:
        raise UserError(f"{read.where}: head_dim {width} is not supported, only even numbers up to "
                        f"{TABLE['head_dim'].highest:,}: rope turns channels in pairs")
    return width


def rope_settings(read: Reader) -> dict:
    name = "rope_parameters" if read("rope_parameters") else "rope_scaling"
    rope, where = dict(read(name) or {}), f"{read.where}, {name}"
    if layers := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise UserError(f"{where}: {shown(layers[0], 90)} has settings of its own; rope that differs between layers is "
                        f"not supported")
    named = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]
    rope["rope_type"] = named[0] if named else "default"
    if "rope_theta" not in rope:
        rope["rope_theta"] = read("rope_theta")
    inner = Reader(rope, where, read.family)
    needs = ROPE_KEYS[inner("rope_type")]
    if missing := [key for key in needs if key not in rope]:
        raise UserError(f"{where}: rope type {rope['rope_type']!r} needs {', '.join(missing)}")
    for key in ("rope_theta", "partial_rotary_factor", *needs):
        inner(key)
    if "low_freq_factor" in needs and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError(f"{where}: low_freq_factor {rope['low_freq_factor']} is not below high_freq_factor "
                        f"{rope['high_freq_factor']}")
    return rope


class Family(NamedTuple):
    """What is particular about the config.json of a model_type."""
    keys: dict[str, Key] = {}       # that it has besides TABLE, or that it takes otherwise
    settings: Callable[[Reader], dict] = lambda read: {}    # fields of ModelConfig that follow; `own` for others
    rope: Callable[[Reader], dict] = rope_settings


FAMILIES |= {"llama": Family(), "mistral": Family(), "qwen2": Family(), "qwen3": Family()}
