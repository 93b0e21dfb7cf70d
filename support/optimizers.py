"""Optimizers: several torch optimizers as one, and what any of them remembers, stored by the names of the parameters.

torch numbers a parameter's moments by its place in the optimizer's groups. A checkpoint must not: groups are cut and
ordered in other ways (matrices here, the rest there) and moments of equal shape would then change hands unnoticed.
"""
import torch
from torch import Tensor, nn

from support import tensors as tensors_file
from support.errors import UserError


class Optimizers:
    """Optimizers(torch.optim.Muon(matrices), torch.optim.AdamW(others)) steps, is saved and resumed like one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        own = [id(p) for group in self.param_groups for p in group["params"]]
        if len(own) != len(set(own)):
            raise ValueError("a parameter belongs to two optimizers: both would move it")

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict:
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """As one optimizer with all groups would give it: parameters are numbered through."""
        state, groups, first = {}, [], 0
        for part in self.parts:
            own = part.state_dict()
            state |= {first + number: moments for number, moments in own["state"].items()}
            groups += [{**group, "params": [first + number for number in group["params"]]}
                       for group in own["param_groups"]]
            first += sum(len(group["params"]) for group in part.param_groups)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, whole: dict) -> None:
        state, groups, first = whole["state"], list(whole["param_groups"]), 0
        for part in self.parts:
            size = sum(len(group["params"]) for group in part.param_groups)
            own, groups = groups[:len(part.param_groups)], groups[len(part.param_groups):]
            part.load_state_dict({
                "state": {number: state[first + number] for number in range(size) if first + number in state},
                "param_groups": [{**group, "params": [number - first for number in group["params"]]} for group in own]})
            first += size


def kinds(optimizer) -> str:
    """AdamW, or Muon + AdamW."""
    return " + ".join(type(part).__name__ for part in getattr(optimizer, "parts", [optimizer]))


def named(model: nn.Module, optimizer) -> list[tuple[str, nn.Parameter]]:
    """The optimizer's parameters in the order of its groups, each with its name in the model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if foreign := [parameter for parameter in parameters if parameter not in names]:
        raise UserError(f"the optimizer trains a parameter of shape {tuple(foreign[0].shape)} that the student does "
                        f"not hold, so it cannot be saved; make it a parameter of the student")
    return [(names[parameter], parameter) for parameter in parameters]


def moments(model: nn.Module, optimizer) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """What the optimizer remembers: {"exp_avg/<name of the parameter>": tensor}, and {name: {key: number}}."""
    tensors, numbers, state = {}, {}, optimizer.state
    for name, parameter in named(model, optimizer):
        for key, value in state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = tensors_file.on_host(value)
            elif value is None or isinstance(value, (bool, int, float)):
                numbers.setdefault(name, {})[key] = value
            else:
                raise UserError(f"{kinds(optimizer)} keeps a {type(value).__name__} as {key}, which cannot be saved; "
                                f"use an optimizer whose state is tensors and numbers")
    return tensors, numbers


def restore_moments(tensors: dict[str, Tensor], numbers: dict[str, dict], model: nn.Module, optimizer) -> None:
    """What moments() returned, back into an optimizer of the same kinds over parameters of the same names."""
    own = named(model, optimizer)
    state: dict[str, dict] = {name: {} for name, _ in own}
    shapes = dict(own)
    for key, tensor in tensors.items():
        key, name = key.split("/", 1)
        state[name][key] = tensors_file.like(tensor, shapes[name])
    for name, found in numbers.items():
        state[name] |= found
    # learning rate and schedule belong to the configuration, not to the checkpoint
    optimizer.load_state_dict({"state": {number: state[name] for number, (name, _) in enumerate(own) if state[name]},
                               "param_groups": optimizer.state_dict()["param_groups"]})
