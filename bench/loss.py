"""Exact divergences over a large vocabulary: what losses.chunked_backward costs in time and memory.

    python bench/loss.py                                # 2,048 rows x 151,936 words, width 256, float32
    python bench/loss.py --rows 1024 --divergence jsd --variants chunked materialised

    chunked         losses.chunked_backward, as train.py calls it
    materialised    all logits of both sides at once, the same divergence, plain torch
    trl             the same through TRL's GKDTrainer.generalized_jsd_loss
    trl_chunked     TRL's DistillationTrainer
    liger           Liger's LigerFusedLinearJSDLoss

All start from hidden states and heads and end with the gradients of the student's; loss and gradient norms are
printed, so that it can be seen that they compute the same. Each runs in its own process. peak: resident memory
at most, less what was there before (with the head's gradient, vocabulary x width, which nobody can avoid).
seconds: processor time of one thread on a CPU, so that other programs do not count. Ends with one JSON line.
"""
import argparse
import json
import subprocess
import sys
import time

import torch
from common import peak_memory, reset_peak

import losses
from support.memory import auto_chunk
from support.used_memory import give_back_freed_memory
from teacher import Part
from train import Config

VARIANTS = ("chunked", "materialised", "trl", "trl_chunked", "liger")
TRL_BETA = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}


def chunked(states_ND, head_VD, teacher_ND, teacher_VD, divergence, chunk_rows):
    N, head_grad_VD = len(states_ND), torch.zeros_like(head_VD)
    every_N, scale_N = torch.arange(N), torch.full((N,), 1 / N)
    fields_N = {"token_N": torch.zeros(N, dtype=torch.int64), "behavior_logp_N": torch.zeros(N)}
    cfg = Config(chunk_rows=chunk_rows)
    part = Part(every_N[:1], every_N, teacher_ND, teacher_VD, fields_N["token_N"], cfg)
    loss_N, _ = losses.chunked_backward(
        states_ND * 1.0, every_N, (head_VD.detach(), head_grad_VD), part, fields_N, scale_N,
        losses.DIVERGENCES[divergence], cfg, lambda rows, top_NK: {})
    head_VD.grad = head_grad_VD
    return (loss_N * scale_N).sum()


def materialised(states_ND, head_VD, teacher_ND, teacher_VD, divergence, _):
    with torch.no_grad():
        teacher_NV = (teacher_ND @ teacher_VD.T).log_softmax(-1)
    token_N = torch.zeros(len(states_ND), dtype=torch.int64)
    rows = losses.Rows((states_ND @ head_VD.T).log_softmax(-1), token_N, teacher_NV)
    loss = losses.DIVERGENCES[divergence](rows, losses.LossArgs()).mean()
    loss.backward()
    return loss


def trl(states_ND, head_VD, teacher_ND, teacher_VD, divergence, _):
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    with torch.no_grad():
        teacher_NV = teacher_ND @ teacher_VD.T
    labels = torch.zeros(1, len(states_ND), dtype=torch.int64)
    loss = GKDTrainer.generalized_jsd_loss((states_ND @ head_VD.T)[None], teacher_NV[None], labels,
                                           beta=TRL_BETA[divergence])
    loss.backward()
    return loss


def trl_chunked(states_ND, head_VD, teacher_ND, teacher_VD, divergence, _):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
    loss, _, _ = _chunked_divergence_loss(states_ND[None], teacher_ND[None], head_VD, teacher_VD,
                                          torch.ones(1, len(states_ND)), TRL_BETA[divergence])
    loss.backward()
    return loss


def liger(states_ND, head_VD, teacher_ND, teacher_VD, divergence, _):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    function = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=TRL_BETA[divergence],
                                       compiled=False)
    loss = function(states_ND, head_VD, teacher_ND, teacher_VD, torch.zeros(len(states_ND), dtype=torch.int64))
    loss.backward()
    return loss


def measure(variant: str, rows: int, vocab: int, width: int, divergence: str) -> dict:
    cpu = torch.device("cpu")
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    states_ND, teacher_ND = (torch.randn(rows, width, generator=rng) for _ in range(2))
    head_VD, teacher_VD = (torch.randn(vocab, width, generator=rng) / width ** 0.5 for _ in range(2))
    args = argparse.Namespace(chunk_rows=0)
    chunk_rows = auto_chunk(args, vocab, cpu, torch.float32)
    function = globals()[variant]
    if variant == "chunked":        # as train.py does; it gave the others nothing
        give_back_freed_memory()
    # imports and warm-up on a few rows: they belong to no step
    few = [x[:64].clone().requires_grad_(i % 2 == 0 and i < 2)
           for i, x in enumerate((states_ND, head_VD, teacher_ND, teacher_VD))]
    few[1].requires_grad_()
    function(*few, divergence, chunk_rows)
    states_ND.requires_grad_(), head_VD.requires_grad_()
    before, start = reset_peak(cpu), time.process_time()
    loss = function(states_ND, head_VD, teacher_ND, teacher_VD, divergence, chunk_rows)
    return {"peak": peak_memory(cpu) - before, "seconds": time.process_time() - start, "loss": loss.item(),
            "gradients": [states_ND.grad.norm().item(), head_VD.grad.norm().item()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--divergence", default="reverse_kl", choices=tuple(TRL_BETA))
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.rows, args.vocab, args.width, args.divergence)))
        return
    unit, results = args.rows * args.vocab * 4, {}
    for variant in args.variants:
        run = subprocess.run([sys.executable, *sys.argv, "--only", variant], capture_output=True, text=True)
        if run.returncode:
            why = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "out of memory"
            print(f"{variant:>13}: failed ({why})", flush=True)
            continue
        results[variant] = found = json.loads(run.stdout.splitlines()[-1])
        print(f"{variant:>13}: {found['peak'] / 2**30:6.2f} GiB = {found['peak'] / unit:5.2f} logits tensors, "
              f"{found['seconds']:6.1f} s, loss {found['loss']:.6f}, gradient norms "
              + ", ".join(f"{norm:.6f}" for norm in found["gradients"]), flush=True)
    ours = results.pop("chunked", None)
    if ours and results:
        print(json.dumps({"name": f"loss_{args.divergence}",
                          "ratio": ours["seconds"] / min(r["seconds"] for r in results.values()),
                          "peak_in_logits_tensors": ours["peak"] / unit, "rows": args.rows, "vocab": args.vocab,
                          "peak_ratios": {name: ours["peak"] / found["peak"] for name, found in results.items()},
                          "seconds_ratios": {name: ours["seconds"] / found["seconds"]
                                             for name, found in results.items()}}))


if __name__ == "__main__":
    main()
