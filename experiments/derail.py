"""FiRe-OPD's filter where it was meant to help: students that derail, teachers that have not read such texts.

    python experiments/derail.py                # a quarter of an hour on two cores, after eight minutes for checkpoints
    python experiments/derail.py --quick --seeds 2      # two minutes, and three for the checkpoints: a rough picture

Claim      Responses that the teacher finds unlikely are beyond its competence: what it says of them is worthless or
           wrong, so dropping them helps.
Paper      FiRe-OPD, arXiv:2606.02684, equation 4 and table 5 (the filter matters most).
Design     toy/made.py makes students that derail: after some steps they write the last result over and over (`=2=2=2`),
           or letters, until they are cut; their teacher has read right calculations only. Other students write six
           letters and go on rightly, where another teacher, a fifth of whose texts were broken like this, is sure of
           wrong results. `random` drops as many responses blindly, `oracle` the derailed ones and no other, `without
           tails` only what follows the first three characters of a derailment. All share the sampled policy gradient
           and its reduction; `exact` is the reverse KL over the vocabulary. The learning rate of each arm is the best
           of two for another student.
Against    the filter no better than no filter, or than random; not even the oracle better than no filter.
"""
import json
import random
import re
import string
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import compare
from compare import TOY, arguments, columns, differences, number, options, percent, ready, records, run_all, table
import losses
import train
from extras.report import student_batch
from losses import DIVERGENCES, WEIGHTS, Signals, asks, permutation, sequence_mean
from support.start import start
from teacher import log_probs

sys.path.insert(0, str(TOY))
import made  # noqa: E402

ARMS = {
    "no filter": "fire --weight none",
    "filter": "fire --fire_alpha 0 --fire_beta 0",
    "fire": "fire",
    "random": "fire --weight fewer",
    "oracle": "fire --weight not_derailed",
    "without tails": "fire --weight without_tails",
    "exact": "opd --reduction sequence",
    "exact, filter": "opd --reduction sequence --weight fire --fire_alpha 0 --fire_beta 0",
    "exact, oracle": "opd --reduction sequence --weight not_derailed"}
FEW, QUICK = ["no filter", "filter", "random", "oracle"], ["no filter", "filter", "oracle", "exact", "exact, filter"]
PAIRS = {"derails20": ("clean", list(ARMS)), "breaks20": ("damaged", [*FEW, "exact", "exact, filter"]),
         "derails10": ("clean", FEW), "derails40": ("clean", FEW)}      # student: its teacher, and the arms
RATES, OTHER = (1e-4, 3e-4), 9          # OTHER: the seed of the teachers, and of the student that rates are chosen on
FLAGS = "--steps 30 --problems 48 --eval_every 0 --eval_k 4 --no-eval_teacher --save_every 1000"


def stages(runs: Path, rates: dict[str, float] | None = None) -> dict[str, tuple[dict[str, str], str]]:
    """name -> (arms, flags of all its arms). rates: arm -> learning rate."""
    WEIGHTS.update(OWN_WEIGHTS)
    plan = {student: ({label: f"{ARMS[label]} --lr {(rates or {}).get(label, 3e-4)}" for label in labels},
                      f"{FLAGS} --teacher {made.MADE / teacher}-{OTHER} --student {made.MADE / student}-{{seed}}")
            for student, (teacher, labels) in PAIRS.items()}
    tried = {f"{label} {lr:g}": f"{command} --lr {lr}" for label, command in ARMS.items() for lr in RATES}
    return plan | {"rates": (tried, plan["derails20"][1].replace("{seed}", str(OTHER)))}


# Weights that know which responses derail

LOOP, STRANGE, ENTRY = re.compile(r"(=.)\1\1"), re.compile(r"[^-0-9+*=;#.]"), 3      # ENTRY: characters of a beginning
CHARACTERS = [made.make.Tokenizer(TOY / "student").decode([i])[:1] or "." for i in range(259)]  # `.`: the stop token


def place(text: str) -> int:
    """Where it derails: the first strange character, or the second `=2` of three. Its length where it does not."""
    loop, strange = LOOP.search(text), STRANGE.search(text)
    return min(loop.start() + 2 if loop else len(text), strange.start() if strange else len(text))


def texts(s: Signals) -> list[str]:
    return ["".join(CHARACTERS[i] for i in token_t.tolist()) for token_t in s.token_N.split(s.length_B.tolist())]


def kinds(s: Signals) -> dict[str, Tensor]:
    """(N,) bool each: tokens of straight responses; of derailed ones those before, at the beginning, and beyond it."""
    place_B = torch.tensor([place(text) for text in texts(s)])
    after_N, off_N = s.position_N - place_B[s.sequence_N], (place_B < s.length_B)[s.sequence_N]
    return {"straight": ~off_N, "before": off_N & (after_N < 0), "entry": (after_N >= 0) & (after_N < ENTRY),
            "tail": after_N >= ENTRY}


OWN_WEIGHTS = {
    "fewer": asks()(lambda s, args: (permutation(len(s.length_B), s) >= 0.2 * len(s.length_B))[s.sequence_N].float()),
    "not_derailed": asks()(lambda s, args: kinds(s)["straight"].float()),
    "without_tails": asks()(lambda s, args: (~kinds(s)["tail"]).float())}


def defaults(run) -> None:
    """train.py's; and each step's record says how many responses were derailed, dropped, and both."""
    train.defaults(run)
    weigh, step, seen = run.weigh, run.step, {}

    def noting(run, s):
        weight_N = weigh(run, s)
        off_B, out_B = sequence_mean(kinds(s)["straight"].float(), s) == 0, sequence_mean(weight_N, s) == 0
        seen.update(derailed=off_B.sum().item(), dropped=out_B.sum().item(), both=(off_B & out_B).sum().item())
        return weight_N
    run.weigh, run.step = noting, lambda *args: step(*args) | seen


# What the teacher says of the first step, and where that takes the student

def gradient(run, add) -> Tensor:
    losses.zero_gradients(run.student)
    add()
    return torch.cat([parameter.grad.flatten() for _, parameter in run.student.trainable()])


def ways_back(s: Signals) -> Tensor:
    """(N,) int64: the token that would lead back to the calculation, 0 where there is none: in place of a further `=` a
    `;`, of a letter the last result, with which the next step begins."""
    back = []
    for text, at in ((text, place(text)) for text in texts(s)):
        way = {"=": ";"} if LOOP.match(text, at - 2) else dict.fromkeys(string.ascii_lowercase, text[max(0, at - 2)])
        back += [CHARACTERS.index(way[one]) if i >= at and one in way else 0 for i, one in enumerate(text)]
    return torch.tensor(back)


def look(line: list[str]) -> dict[str, list[float]]:
    """Kind of token -> its share; the teacher's log-prob of what was written, its entropy, what it gives to the way
    back; the norm of this part of the step's gradient, its cosine with the cross-entropy's on right solutions."""
    run = ready([*line, "--problems", "512"])
    batch = student_batch(run)
    (part,) = parts = run.teacher.parts(batch)
    s, found = train.signals(run, batch, parts), {}
    back_N, advantage_N = ways_back(s), losses.opd(s, run.cfg)
    tokens_BT, mask_BT = made.make.batch(made.CHECKPOINTS["clean"].phases[0], random.Random(0), run.tokenizer, ())
    right = gradient(run, lambda: F.cross_entropy(
        run.student.logits(run.student.response_hidden(tokens_BT, mask_BT)), tokens_BT[mask_BT]).backward())
    q_N = log_probs(part.hidden_nE[part.place_N], part.head_VE, 1.0).gather(1, back_N[:, None]).squeeze(1).exp()
    fields_N = dict(token_N=s.token_N, behavior_logp_N=s.behavior_logp_N, advantage_N=advantage_N)
    scale_N = losses.row_scale(s, torch.ones_like(advantage_N), run.cfg.reduction)
    for name, mask_N in kinds(s).items():
        mine = gradient(run, lambda: losses.backward(run.student, batch.rollout, parts, fields_N, scale_N * mask_N,
                                                     DIVERGENCES[run.cfg.divergence], run.cfg, run.observe))
        found[name] = [mask_N.double().mean().item(), s.teacher_logp_N[mask_N].mean().item(),
                       s.teacher_entropy_N[mask_N].mean().item(), q_N[mask_N & (back_N > 0)].mean().item(),
                       mine.norm().item(), F.cosine_similarity(mine, right, dim=0).item()]
    return found


# Tables

def outcome(folder: Path, when: int = -1) -> list[float]:
    """At an evaluation (0 before, -1 after): accuracy, that of straight responses, share of derailed ones. Over all
    steps: share of dropped responses that were derailed (precision), of derailed ones that were dropped (recall)."""
    file = sorted((folder / "samples").glob("step-*.jsonl"))[when]
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    straight = [one["correct"] for one in samples if place(one["text"]) == len(one["text"])]
    off, out, both = (sum(record.get(key, 0) for record in records(folder)) for key in ("derailed", "dropped", "both"))
    return [sum(one["correct"] for one in samples) / len(samples), sum(straight) / max(1, len(straight)),
            1 - len(straight) / len(samples), *(both / count if out else float("nan") for count in (out, off))]


def cells(values: list[list[float]], form) -> list[str]:
    return ["" if any(x != x for x in column) else form(column) for column in columns(values)]


def print_arms(student: str, arms: dict[str, str], found: dict[str, list[Path]]) -> None:
    plain = [outcome(folder)[0] for folder in found["no filter"]]
    rows = [["before", "", *cells([outcome(folder, 0) for folder in found["no filter"]], percent), ""]]
    for label, folders in found.items():
        gain = differences([outcome(folder)[0] for folder in folders], plain)
        rows.append([label, arms[label].split()[-1], *cells(map(outcome, folders), percent),
                     percent(gain, "+") if label != "no filter" else ""])
    table([f"{student} <- {PAIRS[student][0]}", "lr", "accuracy", "of straight ones", "derailed", "precision", "recall",
           "against no filter"], rows)


def main() -> None:
    args = options(__doc__, "derail", seeds=5, quick="five arms of one pair at one learning rate")
    compare.PROGRAM, runs = Path(__file__).resolve(), args.runs / ("quick" if args.quick else "")
    seeds, students, rates = args.seeds, ["derails20"] if args.quick else list(PAIRS), {}
    made.made(students, list(range(seeds)))
    made.made(["clean"] if args.quick else ["clean", "damaged", "derails20"], [OTHER])
    if not args.quick:
        found = run_all(*stages(runs)["rates"], 1, runs / "rates")
        right = {label: outcome(folder)[0] for label, (folder,) in found.items()}
        rates = {arm: max(RATES, key=lambda lr: right[f"{arm} {lr:g}"]) for arm in ARMS}
    for student in students:
        arms, flags = stages(runs, rates)[student]
        arms = {label: command for label, command in arms.items() if not args.quick or label in QUICK}
        print_arms(student, arms, run_all(arms, flags, seeds, runs / student))
        looks = [look(arguments(ARMS["filter"], flags, seed, runs / "look")) for seed in range(seeds)]
        table([f"{student}, first step", "tokens", "teacher: log-prob", "entropy", "way back", "gradient", "cosine"],
              [[kind, *cells([one[kind] for one in looks], number)] for kind in looks[0]])


if __name__ == "__main__":
    WEIGHTS.update(OWN_WEIGHTS)
    sys.exit(start(sys.argv[1:], train.SETTINGS, defaults, train.train) if "--recipe" in sys.argv else main())
