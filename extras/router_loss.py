"""Load balancing of a student with experts: a loss of its own beside that of the step.

    L = coef E sum_e f_e P_e        f_e how many of a token's k experts are e, on average; P_e the mean probability of e

Both means run over the tokens of the whole step, prompts included, and over all layers with a router (Fedus 2021,
arXiv:2101.03961, eq. 4, in the form of transformers, which takes them over a micro-batch). f has no gradient. It is
least, k coef, when all experts get as much. Costs two more passes over the step: one counts f, one has the gradient.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from extras.families.qwen3_moe import Router
from support import memory
from support.errors import UserError
from support.flags import opt


@dataclass(frozen=True)
class Flags:
    router_aux_loss: float = opt(0.0, "a student with experts: weight of the loss that balances their load (1e-3 in "
                                      "pre-training); 0 = off")


def rules(cfg) -> list[tuple[bool, str]]:
    return [(not cfg.router_aux_loss or memory.processes() == 1,
             "--router_aux_loss runs in one process, which sees all tokens of a step; leave it out")]


def attach(run) -> None:
    if not run.cfg.router_aux_loss:
        return
    if not any(isinstance(module, Router) for module in run.student.modules()):
        raise UserError("--router_aux_loss balances the experts of a student, and this one has none; leave it out")
    run.gradients.append(balance)


class Shares:
    """Inside, notes what every router of a model gives each real token."""

    def __init__(self, model, real_BT: Tensor):
        self.found, self.real_n = [], real_BT.flatten()
        self.routers = [module for module in model.modules() if isinstance(module, Router)]

    def __enter__(self):
        self.hooks = [router.register_forward_hook(self.note) for router in self.routers]
        return self

    def note(self, router: Router, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        share_nE = router.shares(inputs[0])[self.real_n]
        chosen_nk = output[0][self.real_n]
        self.found.append((share_nE.sum(0), torch.bincount(chosen_nk.flatten(), minlength=share_nE.shape[1])))

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def total(self) -> tuple[Tensor, Tensor]:
        """(E,) each: probabilities, and how often it was chosen, over tokens and layers."""
        return tuple(torch.stack(part).sum(0) for part in zip(*self.found))


def balance(run, batch) -> dict[str, float]:
    """Adds the gradient of L to the student's, and returns L and the load of the busiest expert over the mean load."""
    passes, model = list(batch.rollout.micro_batches(batch.rollout.every_B, run.cfg.micro_batch_tokens)), run.student

    def shares(tokens_bt: Tensor, mask_bt: Tensor) -> tuple[Tensor, Tensor]:
        real_bt = mask_bt.flip(1).cumsum(1).flip(1) > 0     # up to the last response token
        with Shares(model, real_bt) as noted:
            model(tokens_bt)
        return noted.total()
    with torch.no_grad():
        share_E, chosen_E = map(sum, zip(*(shares(tokens_bt, mask_bt) for tokens_bt, mask_bt, _ in passes)))
    experts = len(chosen_E)
    tokens = share_E.sum()                      # times layers: the probabilities of each add up to 1
    weight_E = run.cfg.router_aux_loss * experts * chosen_E / tokens ** 2
    for tokens_bt, mask_bt, _ in passes:
        (shares(tokens_bt, mask_bt)[0] * weight_E).sum().backward()
    return {"router_loss": (weight_E * share_E).sum().item(),
            "busiest_expert": (chosen_E.max() * experts / chosen_E.sum()).item()}
