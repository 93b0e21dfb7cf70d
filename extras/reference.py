"""The reference: the model that an advantage extrapolates from, the student as it was at the start unless one is named.

Provides the signal reference_logp_N (log r(a)) for exopd and sg. With LoRA no second copy is needed: the student with
its adapters off is its own start.
"""
from contextlib import nullcontext
from dataclasses import dataclass

import teacher as teacher_file
from extras.lora import lora_off
from extras.teachers import Panel
from support.flags import opt, recipe
from support.weights import checkpoint_folder, load_config, load_model


@dataclass(frozen=True)
class Flags:
    reference: str = opt("", "exopd and sg: the model extrapolated from; empty: the initial student")


RECIPES = {
    "exopd": recipe("extrapolation past the teacher (G-OPD / ExOPD 2602.12125)", divergence="policy_gradient",
                    advantage="exopd"),
}


def wanted(cfg) -> bool:
    return cfg.divergence in ("policy_gradient", "eopd") and (
        cfg.advantage == "exopd" or cfg.advantage == "sg" and cfg.sg_form == "reference")


def own_model(cfg) -> bool:
    """Is a second copy loaded?"""
    return wanted(cfg) and bool(cfg.reference or not cfg.lora_rank)


def references(cfg, setup) -> list:
    """The configs of what is loaded beside student and teacher, for the memory plan."""
    return [load_config(checkpoint_folder(cfg.reference, weights=not cfg.plan) if cfg.reference else setup.folder)
            ] if wanted(cfg) else []


def attach(run) -> None:
    if own_model(run.cfg):
        folder = checkpoint_folder(run.cfg.reference) if run.cfg.reference else run.tokenizer.folder
        model = load_model(folder, dtype=run.student.compute_dtype, device=run.student.device).requires_grad_(False)
        model.title, model.vocab_size = "the reference", run.student.vocab_size
        run.more_models["reference"] = model


def reference_logp(run, batch, parts):
    """(N,) log r(a); NaN where the run never looks at it."""
    if not wanted(run.cfg):
        return batch.rollout.rows(batch.rollout.logp_BT) * float("nan")
    model = run.more_models.get("reference", run.student)
    with nullcontext() if model is not run.student else lora_off(model):
        part = teacher_file.Teacher(model, run.cfg).read(batch, batch.rollout.every_B)
    panel = run.teacher if isinstance(run.teacher, Panel) else None
    part = panel.in_its_words(part) if panel else part
    reference_N = teacher_file.told("teacher_logp_N")(run, batch, [part])
    return panel.spread(reference_N) if panel else reference_N


teacher_file.SIGNALS["reference_logp_N"] = reference_logp
