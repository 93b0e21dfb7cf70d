"""Tokens per second of rollout.generate() against transformers' generate(), and vLLM's where it is installed.

    python bench/generate.py                                    # 96 requests of lognormal lengths, 16 slots
    python bench/generate.py --lengths equal --batch 64 --vocab 151936 --dtype bfloat16
    python bench/generate.py --device cuda --model Qwen/Qwen3-0.6B --dtype bfloat16 --requests 512 --batch 128

Sampling at temperature 1 from the whole vocabulary; random weights unless --model is given. A response ends at a
length drawn beforehand, the same for every implementation: `equal` lengths measure the decode step, `ragged` ones
(lognormal, mean 94, at most 256) also what becomes of a batch whose sequences end at different times. transformers
gets the requests in batches of --batch, as a training loop would; this project and vLLM get them all and keep
--batch of them alive. Only tokens that belong to a response count. Variants take turns; medians over --rounds.
Ends with one JSON line: `ratio` is this project over the better of transformers' two caches; the others likewise.
"""
import argparse
import json
import math
import os
import tempfile
from pathlib import Path

from common import QWEN3, compile_models, interleaved, medians, ragged_lengths, random_checkpoint, shape  # isort: skip

import numpy as np
import torch

from rollout import generate
from support.used_memory import give_back_freed_memory
from support.weights import checkpoint_folder, load_model


def workload(args, vocab: int) -> tuple[list[list[int]], list[int]]:
    """(prompts, response lengths), the same for the same arguments."""
    rng = np.random.default_rng(0)
    if args.lengths == "equal":
        prompt_lengths = np.full(args.requests, args.prompt)
        lengths = np.full(args.requests, args.new)
    else:
        prompt_lengths = rng.lognormal(np.log(args.prompt) - 0.32, 0.8, args.requests)
        prompt_lengths = prompt_lengths.clip(4, 4 * args.prompt).astype(int)
        lengths = ragged_lengths(rng, args.requests, args.new)
    return [rng.integers(vocab, size=n).tolist() for n in prompt_lengths], lengths.tolist()


def ours(model, prompts, lengths, batch):
    return lambda: generate(model, prompts, max_new_tokens=lengths, stop_ids=(), slots=batch)


def transformers_generate(folder: Path, dtype, device, prompts, lengths, batch: int, cache: str):
    """Batches of left-padded prompts, each run until its longest response is complete."""
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None

    class AtItsLength(StoppingCriteria):
        def __init__(self, start: int, lengths_B):
            self.start, self.lengths_B = start, lengths_B

        def __call__(self, input_ids, scores, **_):
            return input_ids.shape[1] - self.start >= self.lengths_B

    def run():
        for first in range(0, len(prompts), batch):
            group, limits = prompts[first:first + batch], lengths[first:first + batch]
            longest = max(map(len, group))
            tokens_BT, mask_BT = (torch.tensor([[0] * (longest - len(p)) + row(p) for p in group], device=device)
                                  for row in (list, lambda p: [1] * len(p)))
            stop = AtItsLength(longest, torch.tensor(limits, device=device))
            model.generate(tokens_BT, attention_mask=mask_BT, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                           max_new_tokens=max(limits), cache_implementation=cache, pad_token_id=0,
                           stopping_criteria=StoppingCriteriaList([stop]))
    return run


def vllm_generate(folder: Path, dtype, prompts, lengths, batch: int):
    from vllm import LLM, SamplingParams
    engine = LLM(str(folder), dtype=str(dtype).removeprefix("torch."), max_num_seqs=batch, skip_tokenizer_init=True,
                 gpu_memory_utilization=0.5)
    params = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
    return lambda: engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", help=f"a checkpoint folder or hub id, or one of {', '.join(QWEN3)} with random "
                                        f"weights; default: random, width 256, 6 layers")
    parser.add_argument("--vocab", type=int, help="of the random model; default 4,096, of the Qwen3 shapes 151,936")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", default="ragged", choices=("ragged", "equal"))
    parser.add_argument("--requests", type=int, help="default: 96 ragged, one batch equal")
    parser.add_argument("--batch", type=int, default=16, help="sequences decoded side by side")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens: the mean, or of all")
    parser.add_argument("--new", type=int, help="new tokens: the most (default 256), or of all (default 64)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also this project with train.py's --compile")
    parser.add_argument("--peers", nargs="*", default=["dynamic", "static", "vllm"])
    args = parser.parse_args()
    args.requests = args.requests or (96 if args.lengths == "ragged" else args.batch)
    args.new = args.new or (256 if args.lengths == "ragged" else 64)
    torch.set_num_threads(args.threads)
    give_back_freed_memory()
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        if args.model and args.model not in QWEN3:
            folder = checkpoint_folder(args.model)
        else:
            folder = random_checkpoint(Path(scratch) / "model", shape(args.model, args.vocab))
        model = load_model(folder, dtype=dtype, device=device)
        prompts, lengths = workload(args, model.config.vocab_size)
        work = prompts, lengths, args.batch
        variants = {"ours": ours(model, *work)}
        if args.compile:
            compiled = load_model(folder, dtype=dtype, device=device)
            compile_models({compiled})
            variants["compiled"] = ours(compiled, *work)
        for cache in ("dynamic", "static"):
            if cache in args.peers:
                variants[cache] = transformers_generate(folder, dtype, device, *work, cache)
        if "vllm" in args.peers and device.type == "cuda":
            try:
                variants["vllm"] = vllm_generate(folder, dtype, *work)
            except ImportError:
                print("vllm is not installed: left out")
        seconds = medians(interleaved(variants, args.rounds, device))
    rate = {name: sum(lengths) / taken for name, taken in seconds.items()}
    print(f"{args.requests} requests, {sum(lengths)} response tokens, {args.lengths}, vocabulary "
          f"{model.config.vocab_size}, {args.dtype}, batch {args.batch}")
    for name, value in rate.items():
        print(f"{name:>10}: {value:9.0f} tokens/s   {value / rate['ours']:5.2f} of ours")
    best = max((rate[name] for name in ("dynamic", "static") if name in rate), default=math.nan)
    print(json.dumps({"name": f"generate_{args.lengths}_{model.config.vocab_size}_{args.dtype}_{args.batch}",
                      "ratio": round(rate["ours"] / best, 3),
                      **{name: round(value / best, 3) for name, value in rate.items() if name != "ours"},
                      "tokens_per_second": round(rate["ours"], 1)}))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "0")
    main()
