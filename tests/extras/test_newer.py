"""extras/newer.py: each rule equals its formula written out, in float64; expectations are enumerated."""

import pytest
import torch
from helpers import adamw, one_step, ready

import losses
from extras.newer import horizon, iw, opsa, power, sdpg, tropd, veto, vopd
from losses import DIVERGENCES, Rows, Signals
from support.errors import UserError
from train import Config

LENGTHS, V = (3, 1, 4), 7
ARGS = Config(steps=10)


def a_step(seed=0, **more):
    """Three responses with random log-probs of both sides."""
    rng, N = torch.Generator().manual_seed(seed), sum(LENGTHS)
    q, b = (torch.rand(N, dtype=torch.float64, generator=rng).log() for _ in "qb")
    return Signals(token_N=torch.arange(N), behavior_logp_N=b, teacher_logp_N=q,
                   sequence_N=torch.tensor([b for b, n in enumerate(LENGTHS) for _ in range(n)]),
                   position_N=torch.tensor([t for n in LENGTHS for t in range(n)]), length_B=torch.tensor(LENGTHS),
                   group_B=torch.tensor([0, 0, 1]), finished_B=torch.ones(3, dtype=torch.bool), seed=0, **more)


def rows(seed=0, N=5, behavior=None, **more):
    rng = torch.Generator().manual_seed(seed)
    z, teacher = (2 * torch.randn(N, V, dtype=torch.float64, generator=rng) for _ in "pq")
    z.requires_grad_()
    p = z.log_softmax(-1)
    token_N = torch.randint(V, (N,), generator=rng)
    b = p.detach().gather(1, token_N[:, None])[:, 0] if behavior is None else behavior
    return z, Rows(p, token_N, teacher.log_softmax(-1), b, **more)


def gradient(loss_N, z):
    return torch.autograd.grad(loss_N.sum(), z)[0]


def test_iw_counts_what_is_still_to_come():
    """fails if: the token's own disagreement is counted as past, or sequences run into each other."""
    s = a_step()
    size = (s.teacher_logp_N - s.behavior_logp_N).abs().tolist()
    wanted, start = [], 0
    for n in LENGTHS:
        part = size[start:start + n]
        wanted += [1 + 0.7 * (1 - sum(part[:t]) / sum(part)) for t in range(n)]
        start += n
    wanted = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(iw(s, Config(iw_gain=0.7)), wanted, rtol=1e-12, atol=1e-12)
    same = s.replace(teacher_logp_N=s.behavior_logp_N)
    assert torch.equal(iw(same, Config(iw_gain=0.7)), torch.full((8,), 1.7, dtype=torch.float64))


def test_power_is_bounded_and_has_the_sign_of_the_log_ratio():
    """fails if: student and teacher are swapped, or the exponent is applied to the log."""
    s = a_step()
    s.teacher_logp_N[0], s.behavior_logp_N[1] = -700.0, -700.0
    found = power(s, Config(power_exponent=3.0))
    q, b = s.teacher_logp_N.exp(), s.behavior_logp_N.exp()
    torch.testing.assert_close(found, q ** 3 - b ** 3, rtol=1e-12, atol=1e-14)
    assert (found.abs() <= 1).all() and torch.equal(found.sign(), losses.log_ratio(s).sign())


def test_vopd_has_the_expected_gradient_of_opd_and_less_variance():
    """Over every token that could be drawn, weighted by p, at 300 random prefixes.
    fails if: the mean has the wrong sign, or is KL(q||p)."""
    z, r = rows(N=300)
    p_NV, q_NV = r.student_NV.detach(), r.teacher_NV
    kl_N = (p_NV.exp() * (p_NV - q_NV)).sum(-1)
    sums = {}
    for name in ("opd", "vopd"):
        first, second = 0.0, 0.0
        for a in range(V):
            token_N = torch.full((300,), a)
            b_N = p_NV[:, a]
            s = Signals(teacher_logp_N=q_NV[:, a], behavior_logp_N=b_N, reverse_kl_N=kl_N)
            advantage_N = vopd(s, ARGS) if name == "vopd" else losses.log_ratio(s)
            drawn = r._replace(token_N=token_N, behavior_logp_N=b_N, advantage_N=advantage_N)
            loss_N = losses.policy_gradient(drawn, ARGS)
            grad = torch.autograd.grad(loss_N.sum(), z, retain_graph=True)[0]
            weight = p_NV[:, a:a + 1].exp()
            first, second = first + weight * grad, second + weight * grad.square()
        sums[name] = first, (second - first.square()).sum(-1)
    exact = torch.autograd.grad(losses.reverse_kl(r, ARGS).sum(), z)[0]
    for first, _ in sums.values():
        torch.testing.assert_close(first, exact, rtol=1e-10, atol=1e-12)
    variance = {name: second for name, (_, second) in sums.items()}
    assert variance["vopd"].mean() < 0.8 * variance["opd"].mean()
    assert 0.6 < (variance["vopd"] < variance["opd"]).double().mean() < 1     # not at every prefix


def test_opsa_pushes_down_the_least_likely_share_alone():
    """fails if: the most likely are chosen, or the share is rounded down to none."""
    s = a_step()
    found = opsa(s, Config(opsa_share=0.3, opsa_push=2.0))
    lowest = s.behavior_logp_N.argsort()[:3]
    wanted = torch.zeros(8, dtype=torch.float64)
    wanted[lowest] = -2.0
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("progress, factor", [(0.0, 0.0), (0.05, 0.5), (0.3, 1.0), (0.5, 1.0), (0.75, 0.5), (1.0, 0.0)])
def test_sdpg_adds_the_teacher_where_a_response_beats_its_group(progress, factor):
    """fails if: the weight does not rise or fall, or reaches responses below their group's mean."""
    s = a_step(progress=progress, reward_B=torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    cfg = Config(sdpg_coef=0.4, sdpg_warm=0.1, sdpg_decay=0.5, grpo_std=False)
    ratio, wanted = losses.log_ratio(s), torch.zeros(8, dtype=torch.float64)
    wanted[:3] = 0.5 + 0.4 * factor * ratio[:3]
    wanted[3] = -0.5
    torch.testing.assert_close(sdpg(s, cfg), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.8])
def test_veto_imitates_the_product_of_both(beta):
    """fails if: the target has a gradient, is not normalised, or leaves the student out."""
    z, r = rows()
    p, q = r.student_NV.detach().exp(), r.teacher_NV.exp()
    t = q * p ** beta
    t = t / t.sum(-1, keepdim=True)
    loss_N = veto(r, Config(veto_beta=beta))
    torch.testing.assert_close(loss_N.detach(), (t * (t.log() - p.log())).sum(-1), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient(loss_N, z), p - t, rtol=1e-10, atol=1e-13)
    if beta == 0:
        torch.testing.assert_close(veto(r, Config(veto_beta=0.0)), losses.forward_kl(r, ARGS))


def test_veto_rests_where_its_docstring_says():
    """At p = q^(1/(1-beta)). fails if: the fixed point is the teacher."""
    z = torch.randn(4, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    teacher = z.log_softmax(-1)
    mine = (teacher / 0.7).log_softmax(-1).requires_grad_()
    loss_N = veto(Rows(mine.log_softmax(-1), torch.zeros(4, dtype=torch.int64), teacher), Config(veto_beta=0.3))
    assert gradient(loss_N, mine).abs().max() < 1e-12 and loss_N.abs().max() < 1e-12


@pytest.mark.parametrize("outside", ["imitate", "mask"])
def test_tropd_blends_by_the_trust_in_the_token(outside):
    """Value and gradient against the two parts, the trust held fixed. fails if: trust has a gradient or is p/q."""
    z, r = rows(advantage_N=torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    cfg = Config(tropd_outside=outside, topk=3)
    p, q = r.student_NV.detach().exp(), r.teacher_NV.exp()
    at = torch.arange(5), r.token_N
    trust = (q[at] / p[at]).clamp(max=1)
    top = q.topk(3).indices
    imitate_N = (q.gather(1, top) * (q.gather(1, top).log() - r.student_NV.gather(1, top))).sum(-1)
    pg_N = losses.policy_gradient(r, cfg)
    wanted_N = trust * pg_N + (1 - trust) * imitate_N * (outside == "imitate")
    found_N = tropd(r, cfg)
    torch.testing.assert_close(found_N, wanted_N, rtol=1e-12, atol=1e-13)
    (found,) = torch.autograd.grad(found_N.sum(), z, retain_graph=True)
    torch.testing.assert_close(found, gradient(wanted_N, z), rtol=1e-10, atol=1e-13)
    assert 0 < trust.min() < 1 == trust.max()


def test_the_horizon_grows_to_the_whole():
    """fails if: it starts at the whole, shrinks, or never gets there."""
    cfg = Config(steps=100, max_new_tokens=40, topd_start=0.1, topd_until=0.5)
    found = [horizon(cfg, step) for step in range(100)]
    assert found[0] == 4 and found[25] == 22 and found[50:] == [40] * 50 and found == sorted(found)


def test_a_run_with_a_horizon_writes_no_longer_responses(command):
    """What --recipe topd does. fails if: responses are cut after they are paid for, or the flag outlives the step."""
    run = ready(command, topd_start=0.2, topd_until=1.0, steps=4, max_new_tokens=6, problems=6)
    optimizer = adamw(run)
    for step, most in ((0, 1), (1, 2), (2, 4), (3, 5)):
        record = one_step(run, optimizer, step)
        assert record["horizon"] == most == run.batch.rollout.length_B.max() and run.cfg.max_new_tokens == 6


@pytest.mark.parametrize("name", ["iw", "power", "vopd", "opsa", "sdpg"])
def test_a_rule_reads_what_it_asks_for_and_nothing_else(name):
    """fails if: a signal leaves @asks, or one is asked for in vain."""
    rule = (losses.WEIGHTS | losses.ADVANTAGES)[name]
    more = {"reverse_kl_N": torch.ones(8, dtype=torch.float64), "reward_B": torch.tensor([1.0, 0, 1]), "progress": 0.3}
    full, always = a_step(**more), {"token_N", "behavior_logp_N", "sequence_N", "position_N", "length_B", "group_B",
                                    "finished_B", "seed", "progress"}
    few = Signals(**{key: value for key, value in vars(full).items() if key in always | set(rule.asks)})
    assert torch.equal(rule(few, ARGS), rule(full, ARGS))
    for missing in rule.asks:
        with pytest.raises(UserError, match=missing):
            rule(Signals(**{key: value for key, value in vars(few).items() if key != missing}), ARGS)


def test_every_entry_is_in_its_table():
    assert {"veto", "tropd"} <= DIVERGENCES.keys() and {"power", "vopd", "opsa", "sdpg"} <= losses.ADVANTAGES.keys()
