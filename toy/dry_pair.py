"""Dry pair: what `bash speedrun.sh --dry` trains in place of Qwen3-0.6B, Qwen3-4B and GSM8K.

    python toy/dry_pair.py FOLDER       # FOLDER/student, FOLDER/teacher, FOLDER/train.jsonl, FOLDER/test.jsonl

Random weights of small shape, and files as the real ones come: config.json of Qwen3 with tied embeddings, a head width
of its own and spare rows, bfloat16 safetensors, a byte-level BPE tokenizer with a chat template that knows
enable_thinking, question and answer records. Nothing can be learned from it; it shows that every stage of a run goes
through. The same bytes every time.
"""
import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import Transformer  # noqa: E402
from support.model_config import ModelConfig  # noqa: E402

SPECIAL = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"
CHAT = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}")
SHAPES = {"student": (64, 192, 2), "teacher": (96, 288, 3)}     # width, MLP width, layers


def problems(rng: random.Random) -> list[dict]:
    """A dozen records in the manner of GSM8K, calculations in <<>> and the answer behind ####."""
    found = []
    for name in ("Ana", "Ben", "Chloe", "Dan", "Eve", "Finn", "Gita", "Hugo", "Ines", "Jon", "Kaya", "Leo"):
        bags, each, eaten = rng.randint(2, 9), rng.randint(3, 9), rng.randint(1, 5)
        whole, left = bags * each, bags * each - eaten
        found.append({"question": f"{name} buys {bags} bags of {each} apples and eats {eaten} of them. How many apples "
                                  f"are left?",
                      "answer": f"{name} buys {bags}*{each}=<<{bags}*{each}={whole}>>{whole} apples.\nThen {whole}-"
                                f"{eaten}=<<{whole}-{eaten}={left}>>{left} are left.\n#### {left}"})
    return found


def write_tokenizer(folder: Path, texts: list[str]) -> tuple[int, int]:
    """Returns its size and the id of its stop token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    stop = backend.token_to_id("<|im_end|>")
    config = dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None,
                  model_max_length=40960, clean_up_tokenization_spaces=False, chat_template=CHAT)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    stops = {"eos_token_id": [stop, backend.token_to_id("<|endoftext|>")], "do_sample": True, "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(stops, indent=2) + "\n")
    return backend.get_vocab_size(), stop


def write_model(folder: Path, size: int, stop: int, shape: tuple[int, int, int], seed: int) -> None:
    width, mlp_width, layers = shape
    raw = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=64 * (size // 64 + 1),
               hidden_size=width, intermediate_size=mlp_width, num_hidden_layers=layers, num_attention_heads=4,
               num_key_value_heads=2, head_dim=32, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e6,
               max_position_embeddings=40960, tie_word_embeddings=True, attention_bias=False, eos_token_id=stop)
    Transformer(ModelConfig.from_dict(raw)).init_weights(seed).save(folder, torch.bfloat16)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("error: one folder is needed, as in python toy/dry_pair.py runs/dry")
    folder, records = Path(sys.argv[1]), problems(random.Random(0))
    for seed, (name, shape) in enumerate(SHAPES.items()):
        size, stop = write_tokenizer(folder / name, [text for record in records for text in record.values()])
        write_model(folder / name, size, stop, shape, seed)
    for name, part in (("train", records[:8]), ("test", records[8:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))


if __name__ == "__main__":
    main()
