"""What the benchmarks share: random Qwen3 checkpoints, interleaved timing, processes of their own, peak memory."""
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from extras import compile as compile_extra  # noqa: E402
from model import Transformer  # noqa: E402
from support.extras import offers  # noqa: E402
from support.used_memory import resident  # noqa: E402
from support.model_config import ModelConfig  # noqa: E402


# width, MLP width, layers, heads, key/value heads, head width, tied
QWEN3 = {"qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, True), "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, True),
         "qwen3-4b": (2560, 9728, 36, 32, 8, 128, True), "qwen3-8b": (4096, 12288, 36, 32, 8, 128, False)}


def qwen3(vocab: int, width: int = 256, mlp_width: int = 0, layers: int = 6, heads: int = 8, kv_heads: int = 4,
          head_dim: int = 32, tied: bool = True) -> dict:
    """The config.json of such a model; by default of the small student of these benchmarks. mlp_width 0: 3 * width."""
    return dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=vocab, hidden_size=width,
                intermediate_size=mlp_width or 3 * width, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=40_960, rms_norm_eps=1e-6,
                rope_theta=1e6, tie_word_embeddings=tied, hidden_act="silu", attention_bias=False,
                bos_token_id=None, eos_token_id=None)


def shape(name: str | None, vocab: int | None, **default) -> dict:
    """The config.json of a name in QWEN3, or of qwen3(**default) without one."""
    return qwen3(vocab or 151_936, *QWEN3[name]) if name else qwen3(vocab or 4096, **default)


def with_layers(raw: dict, layers: int) -> dict:
    return {**raw, "num_hidden_layers": layers}


def ragged_lengths(rng: np.random.Generator, size, most: int) -> np.ndarray:
    """Lognormal, of mean exp(mu + sigma^2 / 2): 94 at most = 256 once the tail is cut."""
    return rng.lognormal(np.log(most / 2.35) - 0.32, 0.8, size).clip(4, most).astype(int)


def random_checkpoint(folder: Path, raw: dict, seed: int = 0) -> Path:
    """A model with fresh weights on disk, for every implementation to load. raw: its config.json."""
    Transformer(ModelConfig.from_dict(raw)).init_weights(seed).save(folder)
    return folder


def random_model(raw: dict, dtype: torch.dtype, compute_dtype: torch.dtype, device: torch.device) -> Transformer:
    """The same without a disk, drawn on the device."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(raw), compute_dtype).to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.02)
    for faster in offers("on_model"):
        faster(model)
    return model


def compile_models(models: set[Transformer]) -> None:
    """What train.py's --compile does to the models of a run."""
    run = SimpleNamespace(cfg=SimpleNamespace(compile=True), student=next(iter(models)), models=lambda: models,
                          before_first_step=[])
    compile_extra.attach(run)


def interleaved(variants: dict, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each variant, one call of every variant per round, so that a slow minute of the machine hits
    them all. The first round is a warm-up and is not counted. On a CPU, seconds of processor time: with one
    thread that is the wall clock of a machine that does nothing else."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, call in variants.items():
            wait(device)
            start = clock()
            call()
            wait(device)
            if number:
                seconds[name].append(clock() - start)
    return seconds


def in_own_process(label: str, *flags: str) -> dict | None:
    """What this script, run again with these flags more, prints as its last line of JSON. None, and a printed
    sentence, where it fails."""
    run = subprocess.run([sys.executable, *sys.argv, *flags], capture_output=True, text=True)
    if run.returncode:
        reason = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "killed"
        print(f"{label:>13}: failed ({reason})")
        return None
    return json.loads(run.stdout.strip().splitlines()[-1])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def reset_peak(device: torch.device) -> int:
    """Forget the peak so far; return what is held now. Linux or CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")
