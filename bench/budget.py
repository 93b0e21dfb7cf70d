"""A budget on paper: what a decode step, scoring and an update cost on a GPU that need not be there.

    python bench/budget.py                              # Qwen3 shapes on four GPUs, goals, kernels per layer
    python bench/budget.py --models qwen3-0.6b --operators      # and operator by operator: what to fuse
    python bench/budget.py --compiled                   # and what --compile makes of the first model (minutes)
    python bench/budget.py --measure                    # on a GPU: measured beside predicted

This project's own code runs on tensors without memory (ledger.py), and every kernel is noted with its bytes and FLOPs.
A kernel takes the longer of its two times, at the share of the data sheet's rates that such kernels attain, plus a
fixed time; launched one by one, at least what the host needs to launch it. What is predicted is the sum. The table
CARDS has every number, its source beside it; the shares and fixed times are estimates until --measure has been run.

Decode steps are averaged over responses of up to --new tokens: everything grows evenly with the length. The floor is
roofline.py's: bytes at the rate of a large copy, FLOPs at the rate of a large product. share = floor / predicted.
Scoring is the teacher's pass and the product of its head with every response token, chunk by chunk; the update does the
latter by itself, so a step has it once. An update is the backward pass with nothing recomputed, clipping, AdamW and
the means for the log. A step is refreshing the sampling copy, prefill, --new decode steps, the teacher's pass and an
update. Whether a model fits a card is not asked here (train.py --plan). Ends with one JSON line.
"""
import argparse
import json
from collections import Counter
from dataclasses import dataclass
from unittest import mock

from common import QWEN3, Transformer, shape, with_layers  # isort: skip

import torch

import fused
import losses
import roofline
from extras.fast import flash
from ledger import GPU, Kernel, paper_gpu, paper_model
from phases import Phases
from rollout import assemble
from support.model_config import ModelConfig
from teacher import Batch
from train import Config

PAIRS = {"qwen3-0.6b": "qwen3-4b", "qwen3-1.7b": "qwen3-8b", "qwen3-4b": "qwen3-8b", "qwen3-8b": "qwen3-8b"}
BATCHES = 64, 256


@dataclass(frozen=True)
class Card:
    """A GPU: two rates from its data sheet, and what kernels attain of them."""
    bandwidth: float        # bytes per second, data sheet
    rate: float             # dense bfloat16 FLOPs per second, data sheet
    copy: float             # share of the bandwidth that a large copy attains, and kernels that only move bytes
    weights: float          # share of it that products of few rows attain, and attention that reads a cache
    product: float          # share of the rate that a large product attains
    products: float         # share of that which the products of a model attain: smaller ones, of odd sizes
    attention: float        # share of the rate that flash attention attains
    fixed: float = 2e-6     # seconds of the shortest kernel and the gap behind it, in a CUDA graph
    host: float = 7e-6      # seconds the host needs to launch one operator


# bandwidth, rate   NVIDIA's data sheets "H200 Tensor Core GPU", "H100 Tensor Core GPU" (SXM), "A100 80GB Tensor Core
#                   GPU" (SXM; without sparsity: half of the figure with a star), "Ada GPU architecture" (RTX 4090,
#                   bfloat16 with float32 sums)
# product           measured by others: "maximum achievable matmul FLOPS" in github.com/stas00/ml-engineering,
#                   compute/accelerator (H100 0.80, A100 0.86); H200 as the H100; RTX 4090: estimate
# attention         flash attention 2, which torch's operator is: arXiv:2307.08691 for the A100 (50-73 %),
#                   arXiv:2407.08608 for the H100 (35 %); backward passes are at the lower end; RTX 4090: estimate
# copy, weights, products, fixed, host    estimates
CARDS = {
    "H200": Card(4.80e12, 989e12, copy=0.90, weights=0.80, product=0.80, products=0.85, attention=0.33),
    "H100": Card(3.35e12, 989e12, copy=0.90, weights=0.80, product=0.80, products=0.85, attention=0.33),
    "A100": Card(2.039e12, 312e12, copy=0.88, weights=0.80, product=0.86, products=0.90, attention=0.55),
    "RTX 4090": Card(1.008e12, 165.2e12, copy=0.92, weights=0.85, product=0.95, products=0.90, attention=0.60),
}


# Counting

def all_rows(args) -> list[int]:
    return list(dict.fromkeys((*BATCHES, args.batch)))


def decode_step(actor: Transformer, rows: int, args, ledger) -> Counter:
    """A step of rollout.Slots at the mean length of the responses: what a CUDA graph records."""
    pool = fused.slots(actor, rows, args.prompt, args.new)
    pool.cache.longest = args.prompt + args.new // 2
    pool.cache.length_B.fill_(pool.cache.longest)
    ledger.take()
    pool.step(rows)
    return ledger.take()


def responses(args) -> Batch:
    """args.batch responses of args.new tokens."""
    parts = [[torch.zeros(args.new, dtype=dtype) for _ in range(args.batch)]
             for dtype in (torch.int64, torch.float32, torch.float32)]
    written = assemble([[0] * args.prompt] * args.batch, *parts, [False] * args.batch, GPU)
    return Batch(written, list(range(args.batch)), [None] * args.batch, True, 0)


def phases_of(student: dict, teacher: dict, args, fused_loss: bool = False) -> dict[str, Counter]:
    """The kernels of every phase of a step."""
    found = {}
    with paper_gpu() as ledger, mock.patch.object(losses, "few_rows", fused.paper_rows(ledger) if fused_loss else
                                                  losses.few_rows):
        one = Phases(paper_model(student, torch.float32, torch.bfloat16, trained=True),
                     paper_model(teacher, torch.bfloat16, torch.bfloat16),
                     Config(micro_batch_tokens=args.micro_batch_tokens), student["vocab_size"])
        ledger.take()
        one.refresh()
        found["refresh"] = ledger.take()
        with torch.no_grad():
            pool = fused.slots(one.actor, args.batch, args.prompt, args.new)
            ledger.take()
            pool.admit(list(range(args.batch)))
            found["prefill"] = ledger.take()
            for rows in all_rows(args):
                found[f"decode {rows}"] = decode_step(one.actor, rows, args, ledger)
        one.batch = responses(args)
        losses.zero_gradients(one.student)      # from the second step on they are there, and so are the moments
        for name, phase in (("scoring", one.scoring), ("backward", one.backward), ("optimizer", one.update)):
            if name == "optimizer":
                phase()
            ledger.take()
            phase()
            found[name] = ledger.take()
        for row_n in torch.arange(args.batch * args.new, device=GPU).split(one.cfg.chunk_rows):
            one.parts[0].fields(row_n)
        found["teacher's head"] = ledger.take()
    return found


def grown(one: Counter, two: Counter, layers: int) -> Counter:
    """The kernels of `layers` layers from those of one and of two: all layers are alike."""
    return Counter({kernel: one[kernel] + (layers - 1) * (two[kernel] - one[kernel]) for kernel in one | two})


def count(student: dict, teacher: dict, args, fused_loss: bool = False) -> tuple[dict, dict]:
    """Phase -> its kernels, and phase -> those of one of its layers: the student's, in scoring the teacher's."""
    one, two = (phases_of(with_layers(student, n), with_layers(teacher, n), args, fused_loss) for n in (1, 2))
    layer = {phase: Counter({kernel: two[phase][kernel] - one[phase][kernel] for kernel in one[phase] | two[phase]})
             for phase in one}
    return {phase: grown(one[phase], two[phase], layers(phase, student, teacher)) for phase in one}, layer


def layers(phase: str, student: dict, teacher: dict) -> int:
    return (teacher if phase == "scoring" else student)["num_hidden_layers"]


def compiled(student: dict, teacher: dict, args) -> tuple[dict, dict]:
    """`count` with --compile. In a layer the products and the attention stay, and what adds up gradients over the
    micro-batches; what is between them is what inductor makes of it."""
    found, layer = count(student, teacher, args, fused_loss=True)
    with torch.device("cpu"):
        rows = all_rows(args)
        between = dict(zip([f"decode {n}" for n in rows], fused.decode_kernels(student, rows)))
        for phase, raw in (("scoring", teacher), ("backward", student)):
            between[phase] = together(*fused.layer_kernels(raw, micro_batches(args), trained=phase == "backward"))
    gathered = gathering(student)
    for phase, kernels in between.items():
        stay = Counter({kernel: n for kernel, n in layer[phase].items()
                        if kernel.kind != "other" or (kernel.operator, kernel.bytes) in gathered})
        change = Counter(kernels)
        change.subtract(layer[phase] - stay)
        found[phase].update({kernel: layers(phase, student, teacher) * n for kernel, n in change.items()})
        layer[phase] = together(stay, kernels)
    return found, layer


def micro_batches(args) -> list[int]:
    """Tokens of each."""
    length = args.prompt + args.new
    groups = flash.groups(range(args.batch), [length] * args.batch, args.micro_batch_tokens)
    return [length * len(group) for group in groups]


def gathering(raw: dict) -> set[tuple[str, int]]:
    """(operator, bytes) of what zeroes and adds up the float32 gradient of each parameter of a layer."""
    with torch.device("meta"):
        layer = Transformer(ModelConfig.from_dict(with_layers(raw, 1))).model.layers[0]
    sizes = {4 * parameter.numel() for parameter in layer.parameters()}
    return {("zero", size) for size in sizes} | {("add", 3 * size) for size in sizes}


def total(kernels: Counter, what: str) -> int:
    """Bytes, FLOPs or launches of all."""
    return sum(times * getattr(kernel, what) for kernel, times in kernels.items())


# Predicting

def seconds(kernels: Counter, card: Card, launched: bool = True) -> float:
    """launched: one by one, not from a CUDA graph."""
    rates = {"product": card.product * card.products * card.rate, "attention": card.attention * card.rate}

    def one(kernel: Kernel) -> float:
        bandwidth = card.bandwidth * (card.copy if kernel.kind == "other" else card.weights)
        work = max(kernel.bytes / bandwidth, kernel.flops / rates.get(kernel.kind, card.rate))
        taken = work + kernel.launches * card.fixed
        return max(taken, kernel.launches * card.host) if launched else taken
    return sum(times * one(kernel) for kernel, times in kernels.items())


def floors(student: dict, teacher: dict, args, card: Card, rows: int) -> dict[str, float]:
    """roofline.floors at what a large copy and a large product attain."""
    sizes = argparse.Namespace(batch=rows, prompt=args.prompt, new=args.new, gradient_checkpointing=False)
    return roofline.floors(sizes, ModelConfig.from_dict(student), ModelConfig.from_dict(teacher), 2,
                           card.bandwidth * card.copy, card.rate * card.product)


def together(*parts: Counter) -> Counter:
    """Their sum. Counter's own + would leave out what `grown` takes away."""
    whole = Counter()
    for part in parts:
        whole.update(part)
    return whole


def phases(found: dict[str, Counter], args) -> dict[str, Counter]:
    """The kernels of what is predicted, by its name in the table."""
    rollout = Counter({kernel: args.new * n for kernel, n in found[f"decode {args.batch}"].items()})
    update = together(found["backward"], found["optimizer"])
    return {**{f"decode {rows}": found[f"decode {rows}"] for rows in all_rows(args)},
            "scoring": together(found["scoring"], found["teacher's head"]), "backward": found["backward"],
            "update": update, "step": together(found["refresh"], found["prefill"], rollout, found["scoring"], update)}


def predicted(found: dict[str, Counter], student: dict, teacher: dict, args, card: Card) -> dict[str, tuple]:
    """Phase -> (seconds, floor)."""
    kernels, floor = phases(found, args), floors(student, teacher, args, card, args.batch)
    out = {}
    for rows in all_rows(args):
        least = floors(student, teacher, args, card, rows)["decode step"]
        for more, launched in (("", False), (", no graph", True)):
            out[f"decode {rows}{more}"] = seconds(kernels[f"decode {rows}"], card, launched), least
    for name in ("scoring", "backward", "update"):
        out[name] = seconds(kernels[name], card), floor["scoring" if name == "scoring" else "update"]
    others = together(found["refresh"], found["prefill"], found["scoring"], kernels["update"])
    out["step"] = (seconds(others, card) + args.new * out[f"decode {args.batch}"][0],
                   args.new * floor["decode step"] + floor["scoring"] + floor["update"])
    return out


# Measuring

def measured(name: str, teacher: str, args) -> dict[str, float]:
    """Seconds of the phases on the GPU that is here, by roofline.py."""
    out = {}
    for rows in all_rows(args):
        more = [] if rows == args.batch else ["--decode_only"]
        found, _ = roofline.measure(roofline.arguments([
            "--device", "cuda", "--dtype", "bfloat16", "--student", name, "--teacher", teacher, "--batch", str(rows),
            "--prompt", str(args.prompt), "--new", str(args.new), "--rounds", "1", "--micro_batch_tokens",
            str(args.micro_batch_tokens), *more]))
        out[f"decode {rows}"] = found["decode step"]
        # roofline's scoring is the teacher's pass without its head, its update the backward pass
        out |= {ours: found[theirs] for ours, theirs in (("teacher's pass", "scoring"), ("backward", "update"),
                                                         ("step", "step")) if theirs in found}
    return out


# Printing

def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def lines(name: str, kernels: dict[str, Counter], times: dict[str, dict]) -> list[list[str]]:
    """A line of the table for each phase of a model."""
    rows = []
    for phase in times["H200"]:
        whole = kernels[phase.removesuffix(", no graph")]
        cells = [f"{1e3 * taken:,.2f} / {1e3 * floor:,.2f} ({floor / taken:.2f})"
                 for taken, floor in (times[card][phase] for card in CARDS)]
        rows.append([name, phase, f"{total(whole, 'launches'):,}", f"{total(whole, 'bytes') / 1e9:,.1f}",
                     f"{total(whole, 'flops') / 1e12:,.2f}", *cells])
    return rows


def by_operator(kernels: Counter, card: Card, launched: bool) -> list[list[str]]:
    """Operator by operator, the longest first."""
    parts: dict[str, Counter] = {}
    for kernel, times in kernels.items():
        if times:
            parts.setdefault(kernel.operator, Counter())[kernel] += times
    whole, rows = seconds(kernels, card, launched), []
    for name, part in sorted(parts.items(), key=lambda item: -seconds(item[1], card, launched)):
        taken = seconds(part, card, launched)
        rows.append([name, f"{total(part, 'launches')}", f"{total(part, 'bytes') / 1e9:.3f}",
                     f"{total(part, 'flops') / 1e12:.3f}", f"{1e3 * taken:.3f}", f"{taken / whole:.1%}"])
    return rows


def print_operators(name: str, found: dict[str, Counter], layer: dict[str, Counter], card: str) -> None:
    decode = f"decode {BATCHES[0]}"
    shown = {decode: found[decode], f"a layer of {decode}": layer[decode],
             **{phase: found[phase] for phase in ("scoring", "backward", "optimizer")}}
    for phase, kernels in shown.items():
        graph = decode in phase
        print(f"{name}, {phase}, operator by operator on {card}{' in a CUDA graph' if graph else ''}:\n")
        print(table(["operator", "kernels", "GB", "TFLOP", "ms", "of the phase"],
                    by_operator(kernels, CARDS[card], not graph)))


def goals(sides: list[tuple[dict[str, tuple], dict[str, Counter]]]) -> list[list[str]]:
    """sides: (what is predicted, the kernels of a layer), as it is and, where that was counted, compiled."""
    share = [{phase: floor / taken for phase, (taken, floor) in times.items()} for times, _ in sides]
    a_layer = [total(layer[f"decode {BATCHES[0]}"], "launches") for _, layer in sides]
    rows = [[f"decode step of {n} rows, share of its floor", *(f"{one[f'decode {n}']:.2f}" for one in share), ">= 0.60"]
            for n in BATCHES]
    return [*rows,
            ["kernels per layer of a decode step", *map(str, a_layer), "<= 16, compiled <= 12"],
            ["scoring, share of the matrix rate", *(f"{one['scoring']:.2f}" for one in share), ">= 0.60"],
            ["update, share of the matrix rate", *(f"{one['update']:.2f}" for one in share), ">= 0.45"],
            ["a step over the sum of its floors", *(f"{1 / one['step']:.2f}" for one in share), "<= 1.50"]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=list(PAIRS), choices=list(PAIRS), help="students; each has the "
                        "teacher of PAIRS")
    parser.add_argument("--batch", type=int, default=64, help="responses of a step")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=1024)
    parser.add_argument("--micro_batch_tokens", type=int, default=16_384)
    parser.add_argument("--operators", action="store_true", help="operator by operator, of the first model")
    parser.add_argument("--compiled", action="store_true", help="what --compile makes of the first model (minutes)")
    parser.add_argument("--measure", action="store_true", help="measured beside predicted, of the first model")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.measure and not torch.cuda.is_available():
        raise SystemExit("--measure needs a CUDA GPU, and there is none; without it the budget is predicted alone")
    rows, first = [], args.models[0]
    for name in args.models:
        student, teacher = shape(name, None), shape(PAIRS[name], None)
        found, layer = count(student, teacher, args)
        times = {card: predicted(found, student, teacher, args, CARDS[card]) for card in CARDS}
        rows += lines(name, phases(found, args), times)
        if name == first:
            found_first, layer_first, times_first, pair = found, layer, times, (student, teacher)
    sides = [(times_first["H200"], layer_first)]
    if args.compiled:
        found, layer = compiled(*pair, args)
        times = {card: predicted(found, *pair, args, CARDS[card]) for card in CARDS}
        sides.append((times["H200"], layer))
        rows += lines(f"{first}, compiled", phases(found, args), times)
    print(f"Estimated, {args.batch} responses of {args.prompt} + {args.new} tokens: milliseconds / floor (share)\n")
    print(table(["model", "phase", "kernels", "GB", "TFLOP", *CARDS], rows))
    print(f"Goals on an H200, {first} under {PAIRS[first]}, estimated\n")
    print(table(["what", "found", *["compiled"] * args.compiled, "goal"], goals(sides)))
    if args.operators:
        print_operators(first, found_first, layer_first, "H200")
    decode = f"decode {BATCHES[0]}"
    result = {"name": f"budget_{first}", "ratio": None,
              "predicted": {card: {phase: round(taken, 6) for phase, (taken, _) in times.items()}
                            for card, times in times_first.items()},
              "kernels_per_layer": [total(layer[decode], "launches") for _, layer in sides]}
    if args.measure:
        compare(first, found_first, times_first, args, result)
    print(json.dumps(result))


def compare(name: str, kernels: dict[str, Counter], times: dict[str, dict], args, result: dict) -> None:
    """Measured beside predicted, for the card of the table that is here."""
    here = torch.cuda.get_device_name()
    card = next((card for card in CARDS if card in here), None)
    found = measured(name, PAIRS[name], args)
    told = {}
    if card:
        told = {phase: taken for phase, (taken, _) in times[card].items()}
        told["teacher's pass"] = seconds(kernels["scoring"], CARDS[card])
    else:
        print(f"{here} is not in CARDS: measured alone")
    rows = [[phase, f"{1e3 * taken:,.2f}", *([f"{1e3 * told[phase]:,.2f}", f"{taken / told[phase]:.2f}"] if card else
                                             ["", ""])] for phase, taken in found.items()]
    print(f"{here}, {name} under {PAIRS[name]}, not compiled: milliseconds\n")
    print(table(["phase", "measured", "predicted", "ratio"], rows))
    result["measured"] = {phase: round(taken, 6) for phase, taken in found.items()}
    if card:
        result["ratio"] = round(found["step"] / told["step"], 3)


if __name__ == "__main__":
    main()
