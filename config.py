"""Config: every setting, its default and its meaning; the recipes; the command line; what is refused at once.

Place in the loop: before it. Config is the only place where defaults live: a flag is a field, a recipe a row of
overrides. Settings that belong to one component stand beside it (CreditArgs, LossArgs, AcrossArgs) and are
inherited.
"""
import argparse
import importlib.util
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

import losses
from across import AcrossArgs
from credit import ADVANTAGES, WEIGHTS, CreditArgs
from eval import Parser
from losses import DIVERGENCES, LossArgs, opt
from prepare import needs
from tokenizer import UserError

TOY = Path(__file__).resolve().parent / "toy"


@dataclass(frozen=True)
class Config(AcrossArgs, CreditArgs, LossArgs):
    recipe: str = opt("opd", "a row of RECIPES; the flags that follow override it")
    # models
    student: str = opt(str(TOY / "student"), "the model that learns: a checkpoint folder or a hub id")
    teacher: str = opt(str(TOY / "teacher"), "the model that scores: a checkpoint folder, a hub id, none, "
                                             "self (the student), "
                       "or several as tag=folder,tag=folder")
    route: str = opt("teacher", "several teachers: the field of a problem that names its teacher's tag")
    self_teacher: str = opt("initial", "--teacher self: the student as it was at the start, a running "
                                       "average, or as it is",
                            ("initial", "ema", "live"))
    ema: float = opt(0.99, "--self_teacher ema: share of the average kept at each step")
    privileged: str = opt("none", "what else the teacher is shown: the solution, or a right response of "
                                  "another sample",
                          ("none", "solution", "sibling"))
    teacher_prompt: str = opt("", "template of the privileged prompt with {problem} and {solution}; empty: "
                                  "data.SHOWN_SOLUTION")
    teacher_template_vars: str = opt("", "like template_vars, for the teacher's side; empty: the same")
    reference: str = opt("", "exopd and sg: the model extrapolated from; empty: the initial student")
    lora_rank: int = opt(0, "train adapters of this rank on all seven projections instead of all weights; 0 = off")
    lora_alpha: float = opt(32.0, "LoRA: the adapter's output is scaled by lora_alpha / lora_rank")
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, a "
                                              "third slower")
    offload_optimizer: bool = opt(False, "keep AdamW's moments in host memory between steps: a GPU saves eight "
                                         "bytes a weight and waits for two transfers a step")
    compile: bool = opt(False, "torch.compile the decode step, the layers and the loss: a minute or two once, then "
                               "faster")
    # loss: one entry of each table of losses.py
    divergence: str = opt("reverse_kl", "what is differentiated", tuple(DIVERGENCES))
    advantage: str = opt("opd", "credit per token, for policy_gradient", tuple(ADVANTAGES))
    weight: str = opt("none", "weight per token; 0 drops it", tuple(WEIGHTS))
    reduction: str = opt("token", "token: mean over all tokens of the step; sequence: mean of the sequences' means",
                         ("token", "sequence"))
    lmbda: float = opt(1.0, "GKD: probability that a step learns on the student's own samples; else on given "
                            "responses")
    responses: str = opt("solution", "given responses: the data's solutions, or written by the teacher",
                         ("solution", "teacher"))
    cold_start_steps: int = opt(0, "first so many steps: cross-entropy on filtered responses of the teacher")
    pts_weight: float = opt(0.0, "phased teacher sampling: weight of cross-entropy on verified teacher "
                                 "responses; 0 = off")
    pts_hold: float = opt(0.1, "phased teacher sampling: share of the run at full weight")
    pts_end: float = opt(0.4, "phased teacher sampling: share of the run after which, on a cosine, the weight is 0")
    pts_samples: int = opt(4, "teacher responses tried per problem, for cold start and phased teacher sampling")
    # data and sampling
    data: str = opt(str(TOY / "train.jsonl"), "training problems: JSON lines, a JSON array or parquet")
    eval_data: str = opt(str(TOY / "test.jsonl"), "held-out problems; without answers the distance to the teacher "
                                                  "takes the place of accuracy")
    mix_data: str = opt("", "a second file of problems; those also in --data, exactly or nearly, are left out")
    mix: float = opt(0.0, "share of each step's problems drawn from --mix_data")
    problems: int = opt(64, "problems per step")
    samples: int = opt(1, "responses per problem")
    max_new_tokens: int = opt(40, "longest response; longer ones are cut")
    temperature: float = opt(1.0, "used to sample and to score, for both sides")
    slots: int = opt(0, "sequences decoded side by side: memory, not mathematics; 0 = what fits")
    stop_ids: str = opt("", "comma-separated ids that end a response; empty: the checkpoint's own, and where a teacher "
                            "has others, those of both as one event")
    chat_template: str = opt("auto", "auto: the student checkpoint's own; plain: none; or a .jinja file")
    template_vars: str = opt("", "comma-separated name=value pairs for the template, e.g. enable_thinking=false")
    verifier: str = opt("auto", "how answers are graded",
                        ("auto", "boxed", "hash", "number", "exact", "math-verify"))
    # optimization
    steps: int = opt(120, "optimizer steps")
    lr: float = opt(1e-4, "AdamW learning rate after warm-up (a real model wants 1e-6 to 1e-5; LoRA 1e-4)")
    warmup_steps: int = opt(5, "steps over which the learning rate rises linearly")
    schedule: str = opt("constant", "learning rate after warm-up", ("constant", "cosine"))
    weight_decay: float = opt(0.0, "AdamW weight decay")
    max_grad_norm: float = opt(1.0, "the gradient is scaled down to this norm")
    updates: int = opt(1, "optimizer steps per rollout; past the first the policy_gradient ratio clip can act")
    micro_batch_tokens: int = opt(0, "tokens per forward pass, padding included: memory, not mathematics; "
                                     "0 = what fits")
    chunk_rows: int = opt(0, "rows projected to the vocabulary at a time: memory, not mathematics; 0 = by vocabulary")
    # evaluation
    eval_every: int = opt(20, "steps between evaluations; 0 = only before and after")
    eval_k: int = opt(8, "answers per held-out problem")
    eval_temperature: float = opt(1.0, "sampling temperature of the evaluation")
    eval_max_new_tokens: int = opt(0, "longest answer in evaluation; 0 = max_new_tokens")
    eval_limit: int = opt(0, "use only the first so many held-out problems; 0 = all")
    eval_teacher: bool = opt(True, "evaluate the teacher once, for the summary")
    # run
    name: str = opt("", "folder under --runs; empty: made from the recipe and the flags given")
    runs: str = opt("runs", "where run folders live")
    save_every: int = opt(20, "steps between checkpoints")
    fresh: bool = opt(False, "delete the run folder of this name and start again")
    device: str = opt("auto", "auto: cuda if there is one, else cpu; mps on request", ("auto", "cpu", "cuda", "mps"))
    dtype: str = opt("auto", "of products; auto: bfloat16 on cuda, else float32. Trained weights stay float32",
                     ("auto", "float32", "bfloat16"))
    threads: int = opt(0, "CPU threads; 0 = one for models under 10 million weights, which more threads only "
                          "slow down")
    seed: int = opt(0, "fixes data order, samples and adapters")
    report_only: bool = opt(False, "print how well teacher and student match before any step, and stop")
    compare_teacher: str = opt("", "--report_only: a second teacher, compared with the first on the same "
                                   "student tokens")
    plan: bool = opt(False, "print the memory estimate and stop: exit status 0 when it fits, 1 when it does not")
    plan_memory: str = opt("", "plan for a device that is not here: its memory, as in --device cuda --plan_memory 24GiB")
    self_check: bool = opt(False, "first make the student its own teacher: loss and gradient must be 0")
    wandb: bool = opt(False, "also log to Weights & Biases")
    tensorboard: bool = opt(False, "also log to TensorBoard, inside the run folder")


PG = dict(divergence="policy_gradient")
GROUPS = dict(problems=8, samples=8)        # methods that compare the responses to one problem
SELF = dict(student=str(TOY / "self"), teacher="self", teacher_prompt="{solution}|{problem}", lr=1e-4, steps=60,
            eval_every=15)

RECIPES = {     # name -> overrides of Config; the paper beside it
    "opd": dict(divergence="reverse_kl"),                       # MiniLLM 2306.08543 without long part; GKD at lmbda 1
    "gkd": dict(divergence="jsd", lmbda=0.5),                   # GKD 2306.13649, eq. 1 and algorithm 1
    "topk": dict(divergence="topk_reverse_kl"),                 # Rethinking OPD 2604.13016, code form of eq. 5
    "lsm": dict(divergence="topk_reverse_kl", support="teacher",
                topk_form="renormalised"),                      # 2603.25562, teacher top-k
    "sft": dict(divergence="cross_entropy", lmbda=0.0),         # cross-entropy on given responses
    "grpo": dict(advantage="grpo", teacher="none", **PG, **GROUPS),     # GRPO 2402.03300
    "minillm": dict(advantage="opd", discount=1.0, **PG),       # MiniLLM 2306.08543: return-to-go
    "fire": dict(weight="fire", reduction="sequence", **PG),    # FiRe-OPD 2606.02684, eqs. 4-9
    "multi": dict(teacher=f"low={TOY / 'teacher_low'},high={TOY / 'teacher_high'}", route="kind",
                  data=str(TOY / "mixed_train.jsonl"),
                  eval_data=str(TOY / "mixed_test.jsonl")),     # FiRe-OPD 2606.02684, routing
    "xtok": dict(teacher=str(TOY / "teacher_sp"), **PG),        # DPCA 2606.09456; credit of whole chunks: ours
    "opsd": dict(privileged="solution", divergence="forward_kl", entry_clip=0.05,
                 **SELF),                                       # OPSD 2601.18734 v3, eq. 8, section 3.2; its mean is
                                                                # over responses (--reduction sequence), ours over tokens
    "sdft": dict(privileged="solution", self_teacher="ema", skip_first=3, **SELF),              # SDFT 2601.19897
    "sdpo": dict(privileged="sibling", self_teacher="ema", ema=0.95, divergence="topk_reverse_kl", topk_form="tail",
                 **SELF, **GROUPS),                             # SDPO 2601.20802: sibling solution, top-k and tail
    "sg": dict(advantage="sg", pts_weight=0.1, **PG, **GROUPS),         # SG-OPD 2606.09304: sign gate, phased sampling
    "exopd": dict(advantage="exopd", **PG),                     # G-OPD / ExOPD 2602.12125
    "opdvr": dict(advantage="opdvr", **PG, **GROUPS),           # OPDVR 2608.24696
    "kdrl": dict(advantage="kdrl", **PG, **GROUPS),             # KDRL 2506.02208
    "uni": dict(advantage="uni", **PG, **GROUPS),               # Uni-OPD 2605.03677, margin
    "rlsd": dict(advantage="rlsd", privileged="solution", **PG, **SELF, **GROUPS),              # RLSD 2604.03128
    "scope": dict(advantage="scope", **PG, **GROUPS),           # SCOPE 2604.10688
    "eopd": dict(divergence="eopd", advantage="opd"),           # EOPD 2603.07079
    "tip": dict(divergence="reverse_kl", weight="tip"),         # TIP 2604.14084
    "reopold": dict(advantage="reopold", weight="reopold", **PG),       # REOPOLD 2603.11137
}


# Command line

def parse(argv: list[str]) -> tuple[Config, list[str]]:
    """(Config, the flags that were given). Defaults, then the recipe's row, then the flags."""
    parser = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS, description=(
        "On-policy distillation: the student writes, the teacher scores every token, the student moves."))
    for f in fields(Config):
        kind = {"type": f.type, "metavar": f.name.upper()}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        choices = f.metadata["choices"]
        text = f.metadata["help"] + (f" [{' '.join(choices)}]" if choices else "")
        parser.add_argument(f"--{f.name}", **kind, help=f"{text} (default: {f.default!r})".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    if given.get("plan_memory"):        # asks for a plan
        given["plan"] = True
    recipe = given.get("recipe", Config.recipe)
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}; known are {', '.join(RECIPES)}")
    return Config(**{**RECIPES[recipe], **given}), sorted(given)


# flags that say where and how a run is watched: they may change when it goes on, and no result depends on
# them
NOT_THE_RUN = ("name", "runs", "fresh", "wandb", "tensorboard", "plan", "plan_memory", "self_check", "report_only",
               "compare_teacher")


def run_name(cfg: Config, given: list[str]) -> str:
    """recipe,flag=value,...: the same command finds the same run, another flag makes another run. Of a path
    only the last part is shown; should two paths share it, the configurations differ and the run folder says
    so."""
    parts = [f"{key}={str(getattr(cfg, key)).rstrip('/').rsplit('/', 1)[-1]}" for key in given
             if key not in ("recipe", *NOT_THE_RUN)]
    return re.sub(r"[^\w.=+,-]+", "_", ",".join([cfg.recipe, *parts])).encode()[:200].decode(errors="ignore")


AT_LEAST = {
    1: ("problems", "samples", "max_new_tokens", "steps", "updates", "eval_k", "save_every", "topk", "pts_samples"),
    0: ("slots", "micro_batch_tokens", "lora_rank", "warmup_steps", "chunk_rows", "eval_every", "eval_max_new_tokens",
        "eval_limit", "seed", "threads", "weight_decay", "eval_temperature", "clip", "entry_clip", "token_clip",
        "cold_start_steps", "pts_weight", "skip_first", "loss_first_n", "fire_alpha", "fire_beta", "chunk_clamp",
        "max_chunk"),
}
AT_MOST = {     # far above what makes sense: past these a run would only fill memory, or the clock would never end it
    10**3: ("threads", "pts_samples", "updates"),
    10**4: ("lora_rank", "topk"),
    10**6: ("problems", "samples", "eval_k"),
    10**9: ("steps", "max_new_tokens", "eval_max_new_tokens", "warmup_steps", "cold_start_steps", "slots", "chunk_rows",
            "micro_batch_tokens", "eval_every", "eval_limit", "save_every", "skip_first", "loss_first_n", "max_chunk"),
}
LOWEST_TEMPERATURE = 0.01
LARGEST = 1e30      # of a number with a fraction: float32 products of larger ones overflow
SHARES = ("mix", "ema", "fire_drop", "tip_keep", "keep", "reopold_entropy", "min_coverage", "max_dropped")


def check(cfg: Config) -> None:
    """Settings that cannot work are refused here, before anything is loaded."""
    for f in fields(cfg):
        value, choices = getattr(cfg, f.name), f.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"--{f.name} {value}: choose from {', '.join(choices)}")
    for least, names in AT_LEAST.items():
        for name in names:
            if not getattr(cfg, name) >= least:
                raise UserError(f"--{name} must be at least {least}, not {getattr(cfg, name)}")
    for most, names in AT_MOST.items():
        for name in names:
            if not getattr(cfg, name) <= most:
                raise UserError(f"--{name} must be at most {most:,}, not {getattr(cfg, name)}")
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if f.type is float and not abs(value) <= LARGEST and not (f.name == "max_grad_norm" and value == math.inf):
            raise UserError(f"--{f.name} must be a finite number, at most {LARGEST:g}, not {value}")
    for name in ("wandb", "tensorboard"):
        if getattr(cfg, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"--{name}: that package is not installed; pip install {name}, or leave the flag out")
    for holds, message in ranges(cfg) + combinations(cfg):
        if not holds:
            raise UserError(message)


def ranges(cfg: Config) -> list[tuple[bool, str]]:
    """Values that cannot be right, whatever the other flags say: (whether it holds, what to say if not)."""
    return [
        (0 < cfg.lr <= 100, "--lr must be above 0 and at most 100: AdamW moves every weight by about this much a step"),
        (cfg.lora_alpha > 0, "--lora_alpha must be above 0"),
        (cfg.lr * cfg.weight_decay < 1,
         "--lr times --weight_decay must be below 1: AdamW multiplies every weight by 1 minus that at each step"),
        (cfg.problems * cfg.samples <= 10**6, "--problems times --samples must be at most a million responses a step"),
        (cfg.max_grad_norm > 0, "--max_grad_norm must be above 0; inf never clips"),
        (cfg.seed < 2**31, "--seed must be below 2**31"),
        (LOWEST_TEMPERATURE <= cfg.temperature <= 1 / LOWEST_TEMPERATURE,
         f"--temperature must lie between {LOWEST_TEMPERATURE:g} and {1 / LOWEST_TEMPERATURE:g}: a greedy rollout is no "
         f"sample of the student, and logits are divided by it"),
        (cfg.eval_temperature == 0 or LOWEST_TEMPERATURE <= cfg.eval_temperature <= 1 / LOWEST_TEMPERATURE,
         f"--eval_temperature must be 0 (greedy) or lie between {LOWEST_TEMPERATURE:g} and {1 / LOWEST_TEMPERATURE:g}"),
        (0 <= cfg.lmbda <= 1, "--lmbda is a probability between 0 and 1"),
        (0 <= cfg.skew < 1, "--skew must be at least 0 and below 1"),
        *((0 <= getattr(cfg, name) <= 1, f"--{name} is a share between 0 and 1") for name in SHARES),
        (0 < cfg.reopold_share < 1, "--reopold_share must lie strictly between 0 and 1"),
        (cfg.scope_temperature > 0, "--scope_temperature must be above 0"),
        (0 <= cfg.pts_hold <= cfg.pts_end <= 1,
         "--pts_hold and --pts_end are shares of the run, the first not above the second"),
        (not cfg.teacher_prompt or "{solution}" in cfg.teacher_prompt and "{problem}" in cfg.teacher_prompt,
         "--teacher_prompt must contain {problem} and {solution}"),
    ]


def combinations(cfg: Config) -> list[tuple[bool, str]]:
    """Flags that contradict each other; rules as those of ranges."""
    return [
        (cfg.eval_temperature > 0 or cfg.eval_k == 1,
         "--eval_temperature 0 gives the same answer every time: use --eval_k 1"),
        (cfg.divergence != "jsd" or 0 < cfg.beta < 1,
         "--beta must lie strictly between 0 and 1: jsd is 0 at both ends; use --divergence forward_kl or "
         "reverse_kl for those"),
        (cfg.lmbda == 1 or cfg.divergence not in losses.ON_SAMPLES_ONLY,
         f"{cfg.divergence} is only right on the student's own samples: keep --lmbda 1"),
        (cfg.divergence != "k2" or cfg.updates == 1,
         "k2 is only right on fresh samples: keep --updates 1, or use --divergence policy_gradient"),
        (cfg.divergence != "cross_entropy" or cfg.lmbda < 1,
         "cross_entropy on the student's own samples has zero expected gradient: lower --lmbda"),
        (cfg.weight == "none" or cfg.lmbda == 1,
         f"weight {cfg.weight} reads the student's own samples: keep --lmbda 1"),
        (not needs(cfg, "group") or cfg.samples > 1,
         f"recipe {cfg.recipe} compares the responses to one problem: --samples must be at least 2"),
        (not needs(cfg, "teacher") or cfg.teacher != "none", f"--teacher none: recipe {cfg.recipe} needs a teacher"),
        (not needs(cfg, "reward") or cfg.verifier, f"recipe {cfg.recipe} needs a verifier"),
        (cfg.privileged == "none" or cfg.teacher != "none",
         f"--privileged {cfg.privileged} shows it to a teacher; there is none"),
        (cfg.privileged != "sibling" or cfg.lmbda == 1,
         "--privileged sibling needs the student's own samples: keep --lmbda 1"),
        (bool(cfg.mix_data) == (cfg.mix > 0), "--mix and --mix_data go together"),
        (not cfg.compare_teacher or cfg.report_only, "--compare_teacher belongs to --report_only"),
        (not cfg.report_only or cfg.teacher != "none",
         "--report_only compares the student with a teacher; there is none"),
    ]
