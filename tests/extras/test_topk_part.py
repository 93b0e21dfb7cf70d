"""A teacher known by its top k and tail: each loss that is let through equals that of the whole vocabulary."""
from types import SimpleNamespace

import pytest
import torch
from helpers import close, settings

from extras.topk_part import SUPPORTS, TopKPart, rules_for_topk, watch
from losses import DIVERGENCES, LossArgs, Rows
from support.metrics import diagnostics, observe

N, V, K = 40, 53, 9


@pytest.fixture
def sides():
    """(student logits, teacher log-probs, tokens, behaviour), float64; a third of the tokens outside the top K."""
    rng = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = (3 * torch.randn(N, V, generator=rng, dtype=torch.float64) for _ in range(2))
    token_N = torch.randint(V, (N,), generator=rng)
    return student_NV, teacher_NV.log_softmax(-1), token_N, torch.randn(N, generator=rng, dtype=torch.float64)


def told(teacher_NV, token_N, k, entropy=False):
    """The part that tells k tokens of it."""
    logp_NK, id_NK = teacher_NV.topk(k)
    outside_NV = teacher_NV.scatter(1, id_NK, -torch.inf)
    entropy_N = -(teacher_NV.exp() * teacher_NV).sum(1) if entropy else None
    token_logp_N = teacher_NV.gather(1, token_N[:, None]).squeeze(1)
    return TopKPart(torch.zeros(1), id_NK, logp_NK, outside_NV.logsumexp(1), token_logp_N, entropy_N)


def loss_and_gradient(make_rows, logits_NV, divergence, args):
    leaf_NV = logits_NV.clone().requires_grad_()
    loss_N = DIVERGENCES[divergence](make_rows(leaf_NV), args)
    return loss_N.detach(), torch.autograd.grad(loss_N.sum(), leaf_NV)[0]


CASES = [(divergence, LossArgs(topk=topk, support=support, topk_form=form))
         for divergence in ("topk_reverse_kl", "topk_forward_kl") for topk in (1, 5, K) for support in SUPPORTS
         for form in ("renormalised", "truncated", "tail")] + [("k2", LossArgs()), ("policy_gradient", LossArgs())]


@pytest.mark.parametrize("divergence, args", CASES)
@pytest.mark.parametrize("k", [K, V])
def test_what_is_let_through_equals_the_loss_over_the_vocabulary(sides, divergence, args, k):
    """fails if: the tail loses the mass of the token drawn, or what is told and not in a smaller support is left out of
    its tail"""
    student_NV, teacher_NV, token_N, behavior_N = sides
    part, row_n = told(teacher_NV, token_N, k), torch.arange(N)
    mine = {"token_N": token_N, "behavior_logp_N": behavior_N, "advantage_N": behavior_N}
    known = loss_and_gradient(lambda x_NV: part.rows(x_NV, mine | part.fields(row_n)), student_NV, divergence, args)
    whole = loss_and_gradient(lambda x_NV: Rows(x_NV.log_softmax(-1), teacher_NV=teacher_NV, **mine), student_NV,
                              divergence, args)
    close(known[0], whole[0], 1e-11)
    close(known[1], whole[1], 1e-11)


def test_where_all_are_alike_the_told_stay_the_likeliest():
    """fails if: rounding lifts the even share above a token that was told, and another support is chosen"""
    for mass in (0.9, 0.999):
        logp_NV = torch.full((1, 50), mass / 50).log()      # rounded down: what is left is a little more than it should
        token_N = logp_NV.topk(10).indices[0, :1]
        part = told(logp_NV, token_N, 10)
        part.tail_logp_N = torch.tensor([1 - mass / 5]).log()
        rows = part.rows(torch.zeros(1, 50), {"token_N": token_N} | part.fields(torch.arange(1)))
        assert set(rows.teacher_NV.topk(10).indices[0].tolist()) == set(part.id_NK[0].tolist())


def test_only_the_token_drawn_may_be_known(sides):
    """fails if: a part without any top k cannot make rows, or k2 reads something else than log q(a)"""
    student_NV, teacher_NV, token_N, behavior_N = sides
    logp_N = teacher_NV.gather(1, token_N[:, None]).squeeze(1)
    part = TopKPart(torch.zeros(1), torch.empty(N, 0, dtype=torch.int64), teacher_NV[:, :0], torch.zeros(N), logp_N)
    rows = part.rows(student_NV, {"token_N": token_N, "behavior_logp_N": behavior_N} | part.fields(torch.arange(N)))
    close(rows.teacher_logp_N(), logp_N, 1e-12)
    close(rows.teacher_NV.exp().sum(1), torch.ones(N), 1e-9)


@pytest.mark.parametrize("k, entropy", [(16, False), (16, True), (K, False)])
def test_metrics_say_what_is_known_and_nothing_else(sides, k, entropy):
    """fails if: a metric of the invented tail is reported as the teacher's, or one that is known is withheld"""
    student_NV, teacher_NV, token_N, behavior_N = sides
    part, run = told(teacher_NV, token_N, k, entropy), SimpleNamespace(observe=observe)
    watch(run)
    fields = {"token_N": token_N, "behavior_logp_N": behavior_N} | part.fields(torch.arange(N))
    noted = run.observe(part.rows(student_NV, fields), part.top_ids(student_NV, fields))
    true = diagnostics(Rows(student_NV.log_softmax(-1), token_N, teacher_NV))
    known = {"student_entropy", "topk_mass_student"} | ({"teacher_entropy", "entropy_gap"} if entropy else set())
    known |= set() if k < 16 else {"overlap_ratio", "overlap_mass_student", "overlap_mass_teacher",
                                   "overlap_advantage", "topk_mass_teacher"}
    for name, value_N in true.items():
        if name in known:
            torch.testing.assert_close(noted[name], value_N, rtol=0, atol=1e-9, equal_nan=True)
        else:
            assert noted[name].isnan().all(), name
    assert ((noted["reverse_kl_at_least"] <= true["reverse_kl"] + 1e-9) & (noted["reverse_kl_at_least"] > 0)).all()


@pytest.mark.parametrize("flags, name", [
    (dict(divergence="reverse_kl"), "use --divergence topk_reverse_kl --support teacher"),
    (dict(divergence="forward_kl"), "use --divergence topk_forward_kl --support teacher"),
    (dict(divergence="jsd"), "use --divergence topk_reverse_kl --support teacher"),
    (dict(divergence="eopd"), "use --divergence policy_gradient"),
    (dict(divergence="topk_reverse_kl"), "--support student"),
    (dict(divergence="topk_reverse_kl", support="union"), "--support union"),
    (dict(divergence="topk_reverse_kl", support="teacher", topk=21), "--topk 21 must not be above"),
    (dict(divergence="policy_gradient", weight="fire"), "teacher_entropy_N"),
    (dict(divergence="policy_gradient", weight="tip"), "reverse_kl_N")])
def test_everything_else_is_refused_with_what_to_use(command, flags, name):
    """fails if: a loss or a rule that reads more than is told gets through"""
    cfg = settings(command, **flags)
    refused = [message for holds, message in rules_for_topk(cfg, "--teacher x", most=20) if not holds]
    assert refused and name in refused[0] and "\n" not in refused[0]


@pytest.mark.parametrize("flags", [
    dict(divergence="policy_gradient"), dict(divergence="k2"), dict(divergence="topk_forward_kl", support="teacher"),
    dict(divergence="topk_reverse_kl", support="intersection", topk_form="tail"), dict(recipe="uni"),
    dict(recipe="reopold"), dict(recipe="lsm"), dict(recipe="minillm")])
def test_what_the_top_k_determines_is_let_through(command, flags):
    """fails if: a loss that is exact here is refused"""
    assert all(holds for holds, _ in rules_for_topk(settings(command, **flags), "--teacher x", most=20))


def test_entropy_opens_the_weight_that_reads_it(command):
    """fails if: a part that tells its entropy still refuses the FiRe weight"""
    cfg = settings(command, recipe="fire")
    assert all(holds for holds, _ in rules_for_topk(cfg, "--cache_topk 16", most=16, entropy=True))
