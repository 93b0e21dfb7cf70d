"""Settings: every flag of the core that is not a knob of one loss (those stand in losses.py), with default, meaning and
range; and the groups in which --help shows them.
"""
import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from losses import ADVANTAGES, DIVERGENCES, WEIGHTS, LossArgs
from support.errors import UserError
from support.flags import Parser, opt
from support.verifier import VERIFIERS, grade

TOY = str(Path(__file__).resolve().parents[1] / "toy") + "/"


@dataclass(frozen=True)
class Core(LossArgs):
    recipe: str = opt("opd", "a row of the recipes; the flags that follow override it")
    # models
    student: str = opt(TOY + "student", "the model that learns: a checkpoint folder or a hub id")
    teacher: str = opt(TOY + "teacher", "the model that scores: a checkpoint folder, a hub id, or none")
    # loss: one entry of each table of losses.py
    divergence: str = opt("reverse_kl", "what is differentiated", DIVERGENCES)
    advantage: str = opt("opd", "credit per token, for policy_gradient", ADVANTAGES)
    weight: str = opt("none", "weight per token; 0 drops it", WEIGHTS)
    reduction: str = opt("token", "token: mean over all tokens of the step; sequence: mean of the sequences' means",
                         ("token", "sequence"))
    # data and sampling
    data: str = opt(TOY + "train.jsonl", "training problems: JSON lines, a JSON array or parquet")
    eval_data: str = opt(TOY + "test.jsonl", "held-out problems; without answers the distance to the teacher is "
                                             "measured")
    problems: int = opt(64, "problems per step", low=1, high=10**6)
    samples: int = opt(1, "responses per problem", low=1, high=10**6)
    max_new_tokens: int = opt(40, "longest response; longer ones are cut", low=1)
    temperature: float = opt(1.0, "used to sample and to score, for both sides", low=0.01, high=100)
    slots: int = opt(0, "sequences decoded side by side: memory, not mathematics; 0 = what fits")
    stop_ids: str = opt("", "comma-separated ids that end a response; empty: the checkpoint's own, and where a teacher "
                            "has others, those of both as one event")
    chat_template: str = opt("auto", "auto: the student checkpoint's own; plain: none; or a .jinja file")
    template_vars: str = opt("", "comma-separated name=value pairs for the template, e.g. enable_thinking=false")
    verifier: str = opt("auto", "how answers are graded", ("auto", "boxed", "hash", "number", "exact", "math-verify"))
    # optimization
    steps: int = opt(120, "optimizer steps", low=1)
    lr: float = opt(1e-4, "AdamW learning rate after warm-up (a real model wants 1e-6 to 1e-5; LoRA 1e-4)", high=100)
    warmup_steps: int = opt(5, "steps over which the learning rate rises linearly")
    schedule: str = opt("constant", "learning rate after warm-up", ("constant", "cosine"))
    weight_decay: float = opt(0.0, "AdamW weight decay")
    max_grad_norm: float = opt(1.0, "the gradient is scaled down to this norm; inf never", high=math.inf)
    updates: int = opt(1, "optimizer steps per rollout; past the first the policy_gradient ratio clip can act", low=1,
                       high=1000)
    micro_batch_tokens: int = opt(0, "tokens per forward pass, padding included: memory, not mathematics; 0 = what "
                                    "fits")
    chunk_rows: int = opt(0, "rows projected to the vocabulary at a time: memory, not mathematics; 0 = by vocabulary")
    # evaluation
    eval_every: int = opt(20, "steps between evaluations; 0 = only before and after")
    eval_k: int = opt(8, "answers per held-out problem", low=1, high=10**6)
    eval_temperature: float = opt(1.0, "sampling temperature of the evaluation; 0 = greedy", high=100)
    eval_max_new_tokens: int = opt(0, "longest answer in evaluation; 0 = max_new_tokens")
    eval_limit: int = opt(0, "use only the first so many held-out problems; 0 = all")
    eval_teacher: bool = opt(True, "evaluate the teacher once, for the summary")
    # run
    name: str = opt("", "folder under --runs; empty: made from the recipe and the flags given")
    runs: str = opt("runs", "where run folders live")
    save_every: int = opt(20, "steps between checkpoints", low=1)
    fresh: bool = opt(False, "delete the run folder of this name and start again")
    device: str = opt("auto", "auto: cuda if there is one, else cpu; mps on request", ("auto", "cpu", "cuda", "mps"))
    dtype: str = opt("auto", "of products; auto: bfloat16 on cuda, else float32. Trained weights stay float32",
                     ("auto", "float32", "bfloat16"))
    threads: int = opt(0, "CPU threads; 0 = one for models under 10 million weights, which more threads only slow down",
                       high=1000)
    seed: int = opt(0, "fixes data order, samples and adapters", high=2**31 - 1)
    quiet: bool = opt(False, "print evaluations, not steps")
    plan: bool = opt(False, "print the memory estimate and stop: exit status 0 when it fits, 1 when it does not")
    plan_memory: str = opt("", "plan for a device that is not here: its memory, as in --device cuda --plan_memory "
                               "24GiB")
    wandb: bool = opt(False, "also log to Weights & Biases")
    tensorboard: bool = opt(False, "also log to TensorBoard, inside the run folder")


HELP = {    # the groups of --help; the knobs of the loss variants follow under their names
    "what everyone uses": "student teacher data eval_data recipe steps lr problems samples max_new_tokens temperature "
                          "micro_batch_tokens slots device name",
    "loss": "divergence advantage weight reduction skip_first loss_first_n skip_tokens",
    "text": "stop_ids chat_template template_vars verifier",
    "optimization": "warmup_steps schedule weight_decay max_grad_norm updates chunk_rows dtype threads seed",
    "evaluation": "eval_every eval_k eval_temperature eval_max_new_tokens eval_limit eval_teacher",
    "run": "runs save_every fresh quiet plan plan_memory wandb tensorboard",
}


def eval_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line of eval.py."""
    parser = Parser(allow_abbrev=False, description="Sample, grade, print metrics as JSON.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--model", required=True, help="folder or hub id of a checkpoint in Hugging Face layout")
    flag("--data", required=True, help="file of problems, with answers or without")
    flag("--teacher", default="none", help="folder or hub id: also the distance to this model, on the samples")
    flag("--k", type=int, default=8, help="samples per problem")
    flag("--temperature", type=float, default=0.7, help="0 = greedy, then --k 1")
    flag("--max_new_tokens", type=int, default=512, help="a sample is cut here; watch truncation_rate")
    flag("--seed", type=int, default=0, help="seed of the sampler")
    flag("--verifier", choices=VERIFIERS, default="auto", help="where the answer is looked for")
    flag("--limit", type=int, help="only the first LIMIT problems")
    flag("--out", type=Path, help=".jsonl file that gets one line per sample; replaced only if eval.py wrote it")
    flag("--slots", type=int, default=64, help="sequences decoded at once; changes memory and speed only")
    flag("--device", default="auto", help="auto = cuda if there is one, else cpu; mps must be asked for")
    flag("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
         help="auto = bfloat16 on cuda, else float32")
    flag("--chat_template", default="auto", help="auto (the checkpoint's own), plain, or a .jinja file")
    flag("--template_vars", default="", metavar="NAME=VALUE,...",
         help="comma-separated variables for the chat template, such as enable_thinking=false")
    flag("--template_var", action="append", default=[], metavar="NAME=VALUE",
         help="one more of them, whose value may hold a comma; may be repeated")
    return parser.parse_args(argv)


def check_eval_settings(k: int, temperature: float, max_new_tokens: int, slots: int, verifier: str | None) -> None:
    """UserError for a setting that makes no sense, before a model is loaded."""
    for name, value in (("k", k), ("max_new_tokens", max_new_tokens), ("slots", slots)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature must be 0 or a positive number, not {temperature}")
    if temperature == 0 and k > 1:
        raise UserError(f"temperature 0 gives the same response {k} times: use k 1 or a temperature above 0")
    if verifier is not None:
        grade("", "", verifier)
