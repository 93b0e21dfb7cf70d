"""--privileged sibling: who is shown to whom, and who is not learned from."""
import pytest
import torch
from conftest import END
from helpers import one_step, predictions, ready

from extras.teachers import SHOWN_SOLUTION, privileged_prompt
from support.responses import from_responses
from teacher import Batch

PROMPT = "{solution};{problem}"


def ids(run, text, stop=True):
    return run.tokenizer.encode(text) + [END] * stop


def siblings(command, template=PROMPT, **flags):
    """A step with eight responses to three problems, and who may be shown to whom."""
    run = ready(command, recipe="sdpo", teacher="self", teacher_prompt=template, samples=4, **flags)
    texts = ["3", "0+3=3", "4", "+3", "4", "5", "1", "2"]           # problem 0 wants 3, problem 1 wants 4
    asked, finished = [0, 0, 0, 0, 1, 1, 2, 2], [True, True, True, False, True, True, True, True]
    rollout = from_responses([run.prompts[i] for i in asked],
                             [ids(run, text, done) for text, done in zip(texts, finished)],
                             finished, "cpu")
    allowed = [{1}, {0}, {0, 1}, {0, 1}, set(), {4}, set(), set()]

    def batch(step):
        return Batch(rollout, asked, [run.train[i] for i in asked], True, step, run.tokenizer, run.cfg.verifier)
    return run, texts, batch, allowed


@pytest.mark.parametrize("template", [PROMPT, ""])
def test_a_sibling_is_a_right_finished_response_of_another_sample(command, template):
    """fails if: a response is shown to itself, a cut or wrong one or another problem's is shown, always the
    first is taken, or an empty --teacher_prompt shows nothing"""
    run, texts, batch, allowed = siblings(command, template)
    assert batch(0).texts == texts and batch(0).reward_B.tolist() == [1, 1, 0, 1, 1, 0, 0, 0]
    shown = [set() for _ in range(8)]
    for step in range(30):
        seen, again = (run.teacher.prompts(batch(step)) for _ in range(2))
        assert run.teacher.usable_B.tolist() == [float(bool(who)) for who in allowed]
        assert seen == again
        for b in range(8):
            shown[b].add(tuple(seen[b]))
    for b, i in enumerate(batch(0).asked):
        prompt, form = run.train[i].prompt, template or SHOWN_SOLUTION
        expected = {tuple(run.tokenizer.prompt_ids(privileged_prompt(prompt, texts[c], form)))
                    for c in allowed[b]}
        assert shown[b] == (expected or {tuple(run.prompts[i])})


def test_a_sample_without_a_sibling_is_not_learned_from(command):
    """fails if: usable_B does not reach the weights, or its tokens stay in the denominator"""
    run, texts, batch, allowed = siblings(command, divergence="reverse_kl")
    run.sources = [(lambda step: True, lambda run, step: batch(step))]
    rollout, asked, seen = batch(0).rollout, batch(0).asked, run.teacher.prompts(batch(0))
    kl = [(p.exp() * (p - q)).sum(-1) for p, q in (
        (predictions(run.student, run.prompts[i], rollout.response(b)),
         predictions(run.kind.models[0], seen[b], rollout.response(b)))
        for b, i in enumerate(asked))]
    kept = torch.cat([kl_n for kl_n, who in zip(kl, allowed) if who])
    loss = kept.mean()
    gradients = torch.autograd.grad(loss, list(run.student.parameters()))
    expected = torch.stack([g.norm() for g in gradients]).norm()
    record = one_step(run)
    assert record["kept"] == len(kept) / len(torch.cat(kl))
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert record["grad_norm"] == pytest.approx(expected.item(), rel=1e-3)
