"""What an optimizer remembers is stored by the names of the parameters: any torch optimizer resumes as if it had never
stopped, and several of them go as one."""
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train  # noqa: E402
from support.checkpoint import RunFolder  # noqa: E402
from model import Transformer
from support.model_config import ModelConfig  # noqa: E402
from support.optimizers import Optimizers, kinds  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402

MARKED = {"recipe": "opd", "student": "s", "teacher": "t", "steps": 4}
ADAMW = torch.optim.AdamW


def two_groups(model, names=("mlp", "")):
    """AdamW over the parameters whose name holds names[0], then the rest, at another learning rate."""
    first = [p for name, p in model.named_parameters() if names[0] in name]
    rest = [p for p in model.parameters() if not any(p is other for other in first)]
    return ADAMW([{"params": rest[::-1], "lr": 0.03}, {"params": first, "weight_decay": 0.5}], lr=0.01)


def muon_and_adamw(model):
    """Matrices of the layers by Muon, all else by AdamW."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for p in model.parameters() if not any(p is other for other in matrices)]
    return Optimizers(torch.optim.Muon(matrices, lr=0.02), ADAMW(others, lr=0.01))


class Counting(torch.optim.Optimizer):
    """Keeps numbers of every kind, as older optimizers do."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p]
                s.setdefault("step", 0)
                s.setdefault("rate", 1 / 3)
                s |= {"step": s["step"] + 1, "rate": s["rate"] * 0.7, "odd": s["step"] % 2 == 0, "nothing": None}
                p.data.add_(p.grad, alpha=-s["rate"] / s["step"] - s["odd"])


MAKERS = {
    "two groups": two_groups,
    "muon and adamw": muon_and_adamw,
    "numbers": lambda model: Counting(model.parameters()),
    **{name: lambda model, name=name: getattr(torch.optim, name)(model.parameters(), lr=0.01)
       for name in ("Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "Adafactor", "ASGD", "Rprop",
                    "RMSprop")},
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "sgd without momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
}
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
CASES = [pytest.param(name, marks=[needs_muon] if "muon" in name else []) for name in MAKERS]


def tiny() -> Transformer:
    """Square matrices: moments in another order would fit, and be wrong unnoticed."""
    return Transformer(ModelConfig.from_dict(dict(
        model_type="llama", vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=2,
        num_attention_heads=1))).init_weights(0)


def go(model, optimizer, steps) -> None:
    for step in steps:
        for number, parameter in enumerate(model.parameters()):
            torch.manual_seed(100 * step + number)
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("name", CASES)
def test_any_optimizer_goes_on_as_if_it_had_never_stopped(tmp_path, pair, name):
    """fails if: moments are stored by their place, a number among them is lost, or one loses its kind."""
    model = tiny()
    optimizer = MAKERS[name](model)
    go(model, optimizer, range(3))
    run = RunFolder(tmp_path / "a", MARKED)
    run.save(3, model, Tokenizer(pair / "student"), optimizer, {}, best=False)
    rates = [group["lr"] for group in optimizer.param_groups]
    go(model, optimizer, range(3, 5))
    again = tiny()
    resumed = MAKERS[name](again)
    assert run.resume(again, resumed) == {"step": 3}
    assert [group["lr"] for group in resumed.param_groups] == rates
    go(again, resumed, range(3, 5))
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        wanted, found = optimizer.state.get(mine, {}), resumed.state.get(theirs, {})
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            assert type(found[key]) is type(value)          # 1, 1.0 and True are equal
            assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value


def test_groups_may_be_cut_otherwise(tmp_path, pair):
    """fails if: moments follow the order of the groups."""
    model = tiny()
    optimizer = two_groups(model)
    go(model, optimizer, range(2))
    run = RunFolder(tmp_path / "a", MARKED)
    run.save(2, model, Tokenizer(pair / "student"), optimizer, {}, best=False)
    again = tiny()
    other = two_groups(again, names=("q_proj", ""))
    run.resume(again, other)
    names = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], other.state[names[name]]["exp_avg"]), name


def test_what_cannot_be_right_is_one_sentence(tmp_path, pair):
    """Another kind of optimizer; a parameter outside the student; a state that is no tensor and no number."""
    model, tokenizer, run = tiny(), Tokenizer(pair / "student"), RunFolder(tmp_path / "a", MARKED)
    optimizer = two_groups(model)
    go(model, optimizer, range(1))
    run.save(1, model, tokenizer, optimizer, {}, best=False)
    with pytest.raises(UserError, match="was trained with AdamW, now it is SGD"):
        run.resume(tiny(), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UserError, match=r"a parameter of shape \(3,\) that the student does not hold"):
        run.save(2, model, tokenizer, torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1), {}, best=False)
    optimizer.state[next(model.parameters())]["list"] = [1]
    with pytest.raises(UserError, match="AdamW keeps a list as list"):
        run.save(3, model, tokenizer, optimizer, {}, best=False)
    assert run.steps() == [1]


# several as one

def test_several_optimizers_look_like_one():
    model = tiny()
    one, parts = two_groups(model), [ADAMW(group["params"], lr=group["lr"], weight_decay=group["weight_decay"])
                                     for group in two_groups(model).param_groups]
    several = Optimizers(*parts)
    go(model, one, range(1))
    go(model, several, range(1))
    assert kinds(several) == "AdamW + AdamW" and several.state.keys() == one.state.keys()
    mine, theirs = several.state_dict(), one.state_dict()
    assert mine["state"].keys() == theirs["state"].keys()
    assert [group["params"] for group in mine["param_groups"]] == [group["params"] for group in theirs["param_groups"]]
    several.param_groups[1]["lr"] = 7.0         # the very groups, so a schedule reaches them
    assert parts[1].param_groups[0]["lr"] == 7.0
    several.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="belongs to two optimizers"):
        Optimizers(ADAMW(model.parameters()), ADAMW(model.parameters()))


@needs_muon
def test_a_run_with_muon_and_adamw_resumes_to_the_byte(command, tmp_path, monkeypatch):
    """Through train.py, killed after step 3. fails if: anything in the loop knows only one kind of optimizer."""
    def both(parameters, **settings):
        parameters = list(parameters)
        matrices = [p for p in parameters if p.ndim == 2]
        return Optimizers(torch.optim.Muon(matrices, lr=settings["lr"]),
                          ADAMW([p for p in parameters if p.ndim != 2], **settings))
    monkeypatch.setattr(torch.optim, "AdamW", both)
    flags = dict(steps=5, save_every=1, lr=0.01)
    assert train.main(command(**flags, runs=tmp_path / "calm")) == 0
    real, calls = train.train_step, []

    def train_step(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train, "train_step", train_step)
    assert [train.main(command(**flags)), train.main(command(**flags))] == [130, 0] and len(calls) == 6
    for file in ("model.safetensors", "trainer.safetensors"):
        assert (tmp_path / "runs/a/last" / file).read_bytes() == (tmp_path / "calm/a/last" / file).read_bytes()
    assert os.path.getsize(tmp_path / "runs/a/last/trainer.safetensors") > 0
