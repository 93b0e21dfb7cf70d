"""experiments/: their statistics are right, and train.py takes every command line that they would run.

Not here: what the experiments find (README), how a run goes (core/, test_toy.py).
"""
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import compare  # noqa: E402
import losses  # noqa: E402
import train  # noqa: E402
from support.flags import check_ranges, parse  # noqa: E402
from support.setup import check_combinations  # noqa: E402
from support.start import NOT_THE_RUN  # noqa: E402


def settings(line):
    cfg, _ = parse(line, train.SETTINGS)
    check_ranges(cfg)
    check_combinations(cfg)
    return cfg


@pytest.fixture(autouse=True)
def weights_of_scripts_leave_again():
    """derail.py adds to the table of weights; other tests count its entries."""
    before = dict(losses.WEIGHTS)
    yield
    losses.WEIGHTS.clear()
    losses.WEIGHTS.update(before)


SCRIPTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "compare")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_arm_is_a_command_that_train_takes(name, tmp_path):
    """fails if: a flag, a recipe, a choice or a shipped file that an experiment names does not exist."""
    script = importlib.import_module(name)
    lines = [(label, command, flags) for arms, flags in script.stages(tmp_path).values()
             for label, command in arms.items()]
    assert lines
    for label, command, flags in lines:
        cfg = settings(compare.arguments(command, flags, 3, tmp_path / compare.slug(label)))
        assert cfg.seed == 3 and "{" not in f"{cfg.student} {cfg.teacher}" and Path(cfg.data).is_file()
        for folder in [cfg.student, *(part.rpartition("=")[2] for part in cfg.teacher.split(","))]:
            # an earlier stage makes it, or toy/made.py does
            made = str(tmp_path) in folder or str(ROOT / "runs/made") in folder or folder in ("self", "none")
            assert made or (Path(folder) / "model.safetensors").is_file(), f"{label}: {folder}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_labels_of_a_stage_do_not_share_a_folder(name, tmp_path):
    """fails if: two arms would be taken for one finished run."""
    for arms, _ in importlib.import_module(name).stages(tmp_path).values():
        assert len({compare.slug(label) for label in arms}) == len(arms)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_tests(name):
    """fails if: a docstring lacks the claim, its source, the design, or what would speak against it."""
    doc = importlib.import_module(name).__doc__
    assert [word for word in ("Claim", "Paper", "Design", "Against") if f"\n{word}" not in doc] == []


def test_interval_is_students_t():
    """1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.303.
    fails if: the deviation is divided by n, or the normal quantile stands in for t."""
    mean, half = compare.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3 ** 0.5, rel=1e-3)
    assert compare.percent([0.5, 0.5]) == "50.0% ± 0.0%" and compare.percent([0.25], "+") == "+25.0%"
    assert compare.differences([3.0, 5.0], [1.0, 1.0]) == [2.0, 4.0]


def test_a_finished_run_is_found_again_only_by_the_same_command(tmp_path):
    """fails if: a run that has not ended, or one with another flag, stands in for this one."""
    line = compare.arguments("opd --lr 0.001", "", 0, tmp_path / "a")
    write_run(tmp_path / "a", {key: value for key, value in vars(settings(line)).items()
                               if key not in NOT_THE_RUN}, [])
    assert compare.finished(tmp_path / "a", line)
    assert not compare.finished(tmp_path / "a", compare.arguments("opd --lr 0.002", "", 0, tmp_path / "a"))
    (tmp_path / "a/summary.json").unlink()
    assert not compare.finished(tmp_path / "a", line)


def write_run(folder, config, lines, samples=()):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps({"after": {"avg@4": 0, "avg@4_ci": [0, 0]}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"config": {}}, *lines]))
    (folder / "samples").mkdir()
    for step, answers in samples:
        text = "".join(json.dumps({"problem": p, "correct": c}) + "\n" for p, c in answers)
        (folder / "samples" / f"step-{step:06d}.jsonl").write_text(text)


@pytest.mark.parametrize("flags,teacher", [("opd", 30), ("grpo", 0), ("sft", 0), ("sft --responses teacher", 30),
                                           ("grpo --weight fire", 30), ("opd --cold_start_steps 1", 23)])
def test_tokens_are_counted_for_those_who_wrote_or_read_them(flags, teacher, tmp_path):
    """Steps of 10 and 20 tokens, the first of them not the student's; three teacher tokens on file for the cold
    start. fails if: given solutions count as the teacher's, or a verifier as a reader."""
    config = dict(vars(parse(["--recipe", *flags.split()], train.SETTINGS)[0]))
    lines = [{"step": 0, "eval": {"avg@4": 0.1}}, {"step": 1, "tokens": 10, "on_policy": 0},
             {"step": 2, "tokens": 20, "on_policy": 1}, {"step": 2, "eval": {"avg@4": 0.5}}]
    write_run(tmp_path / "a", config, lines)
    if config["cold_start_steps"]:
        (tmp_path / "a/teacher_responses.json").write_text(json.dumps({"7": [[1, 2], [3]]}))
    assert compare.curve(tmp_path / "a")[-1] == (2, 0.5, 20, teacher)


def test_accuracy_by_kind_is_over_the_problems_of_that_kind(tmp_path):
    """fails if: samples are matched with the wrong problem, or another step's are read."""
    (tmp_path / "test.jsonl").write_text('{"kind": "x"}\n{"kind": "y"}\n{"kind": "x"}\n')
    write_run(tmp_path / "a", {"eval_data": str(tmp_path / "test.jsonl")}, [],
              [(0, [(0, False), (1, False), (2, False)]),
               (9, [(0, True), (0, True), (1, False), (2, True), (2, False)])])
    assert compare.accuracy_by(tmp_path / "a", lambda r: r["kind"]) == {"x": 0.75, "y": 0.0}
    assert compare.accuracy_by(tmp_path / "a", lambda r: r["kind"], 0) == {"x": 0.0, "y": 0.0}


def test_cost_to_reach_interpolates_the_first_crossing():
    """fails if: a later crossing, the next evaluation, or a target never reached is reported."""
    reach = compare.cost_to_reach
    points = [(0, 0.2, 0), (15, 0.4, 1000), (30, 0.3, 2000), (45, 0.5, 3000)]
    assert [reach(points, target) for target in (0.3, 0.45, 0.5)] == pytest.approx([500, 2750, 3000])
    assert reach(points, 0.2) == 0 and reach(points, 0.1) == 0 and reach(points, 0.51) == float("inf")


def test_gap_recovery_and_regression_are_shares_of_the_right_gap():
    """fails if: a share is of the accuracy instead of the gap, or an empty gap is divided by."""
    dynamics = importlib.import_module("dynamics")
    assert dynamics.gap_recovery(0.25, 0.5, 0.75) == 0.5
    assert dynamics.regression(1.0, 0.5, 0.25) == pytest.approx(2 / 3)
    assert str(dynamics.gap_recovery(0.5, 0.6, 0.5)) == str(dynamics.regression(0.2, 0.1, 0.2)) == "nan"


def test_auroc_is_the_chance_of_the_right_order():
    """fails if: ties count as wins, or the order is reversed."""
    import torch
    auroc = importlib.import_module("fire").auroc
    assert auroc(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])) == 0.875


def evaluated(folder, step, problems):
    """A run with one evaluation more: which of the problems were answered rightly, and in which notation."""
    (folder / f"samples/step-{step:06d}.jsonl").write_text("".join(
        json.dumps({"problem": i, "correct": right, "text": text}) + "\n" for i, (right, text) in enumerate(problems)))


def test_skills_are_told_apart_by_the_kind_of_the_problem(tmp_path):
    """fails if: new and old are swapped or mixed, an earlier evaluation is read, or a response in another notation
    counts as one in the first."""
    why = importlib.import_module("why")
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"kind": kind}) + "\n" for kind in ("new", "old", "old")))
    write_run(tmp_path / "a", {"eval_data": str(tmp_path / "held.jsonl")}, [])
    evaluated(tmp_path / "a", 0, [(False, "1+1=2"), (False, ""), (False, "")])
    evaluated(tmp_path / "a", 60, [(True, "1+1=2#2"), (True, "1+1:2#2"), (False, "#2")])
    assert why.measured(tmp_path / "a") == (1.0, 0.5, 1 / 3)
    assert why.measured(tmp_path / "a", 0) == (0.0, 0.0, 1 / 3)


def test_the_goal_counts_for_the_worst_kind_and_tokens_whoever_wrote_them(tmp_path):
    """Old skill at 100 % throughout, new from 50 to 100 % over 30 tokens and 3 seconds: 90 % after 24 tokens, 2.4 s.
    fails if: the mean of the kinds counts, off-policy tokens are free, evaluations cost seconds, or a student that is
    there before its first step gets it for nothing."""
    board = importlib.import_module("board")
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"kind": kind}) + "\n" for kind in ("new", "new", "old")))
    lines = [{"step": 0, "eval": {"seconds": 9}},
             {"step": 1, "tokens": 10, "on_policy": 0, "seconds": 1.0},
             {"step": 2, "tokens": 20, "on_policy": 1, "seconds": 2.0}, {"step": 2, "eval": {"seconds": 9}}]
    write_run(tmp_path / "a", {"eval_data": str(tmp_path / "held.jsonl")}, lines)
    evaluated(tmp_path / "a", 0, [(False, ""), (True, ""), (True, "")])
    evaluated(tmp_path / "a", 2, [(True, ""), (True, ""), (True, "")])
    found = board.points(tmp_path / "a")
    assert board.costs(found, 0.9) == pytest.approx((24, 2.4))
    assert found[-1][1:] == ({"new": 1.0, "old": 1.0}, 30, 3.0)
    assert board.costs(found, 1.01) == board.costs(found, 0.5) == (float("inf"),) * 2


def test_a_price_is_of_the_seeds_that_got_there():
    """fails if: a seed that never reached the goal makes the mean infinite, or is left out without a word."""
    board, never = importlib.import_module("board"), (float("inf"), float("inf"))
    assert board.priced([(1000, 2.0), (3000, 4.0)]) == ["2,000 ± 12,710", "3.0 ± 12.7"]
    assert board.priced([(1000, 2.0), never]) == ["1,000 (1 of 2)", "2.0 (1 of 2)"]
    assert board.priced([never, never]) == ["-", "-"]


def test_a_student_is_followed_if_a_verifier_finds_it_right_now_and_then(tmp_path):
    """fails if: a student that is never right, or often, is followed, or under another student's name or seed."""
    why = importlib.import_module("why")
    (tmp_path / "held.jsonl").write_text('{"kind": "new"}\n' * 100 + '{"kind": "old"}\n')

    def run(name, right):
        write_run(tmp_path / name, {"eval_data": str(tmp_path / "held.jsonl")}, [])
        evaluated(tmp_path / name, 0, [(i < right, "1+1=2") for i in range(101)])
        return tmp_path / name
    folders = {lesson: {why.OWN: [run(f"{lesson}-{seed}", right) for seed, right in enumerate(starts)]}
               for lesson, starts in (("rare", (0, 3)), ("seen5", (6, 7)), ("seen20", (50, 1)))}
    assert why.found_now_and_then(folders) == [("seen2", 1), ("seen5", 0), ("seen20", 1)]


def test_slips_are_counted_where_nobody_was_taught_and_right_answers_by_their_length(tmp_path):
    """fails if: the two kinds or two lengths are mixed, slips among the taught count, or an earlier evaluation is
    read."""
    slips = importlib.import_module("slips")
    from families import FAMILIES, records
    taught, others = FAMILIES[0], FAMILIES[2]
    asked = [one for one in records()["families_test"] if one["problem"][0] in (taught[1], others[3], others[4])]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    write_run(tmp_path / "a", {"eval_data": str(tmp_path / "held.jsonl"), "steps": 9}, [])
    slip = f"{others[1]}>{others[2]}"
    evaluated(tmp_path / "a", 0, [(False, ""), (False, ""), (False, "")])
    evaluated(tmp_path / "a", 9, [(True, f"{slip};"), (True, f"{slip}!{asked[1]['solution']}"),
                                  (True, f"{slip}!{slip};#{others[0]}")])
    assert slips.measured(tmp_path / "a") == {"taught": 0, "taught 1 to 3": 0, "others": 0.5, "others 1 to 3": 1,
                                              "others 4 to 6": 0, "slips": 3 / 6, "seen": 2 / 3, "left": 1 / 6}
    before = slips.measured(tmp_path / "a", 0)
    assert before["others"] == before["slips"] == before["seen"] == 0


def test_the_picture_has_a_point_for_each_arm_number_and_skill():
    """fails if: the skills are swapped, an arm or an N is left out, or a share is drawn at the wrong height."""
    why = importlib.import_module("why")
    means = {f"N = {count}": {"before": (0.5, 1.0), **{label: (0.25 * i, 0.1 * count) for i, label in
                                                       enumerate(why.HANDS)}} for count in (1, 2, 4, 8)}
    dots = [tuple(map(float, dot)) for dot in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', why.picture(means))]
    middle = (why.PANELS[0][1] + why.PANELS[1][0]) / 2

    def heights(share):
        return why.BOTTOM - (why.BOTTOM - why.TOP) * share
    new, old = ([y for x, y in dots if (x > middle) == right] for right in (False, True))
    assert new == pytest.approx([heights(0.25 * i) for i in range(4) for _ in range(4)], abs=0.06)
    assert old == pytest.approx([heights(0.1 * count) for _ in range(4) for count in (1, 2, 4, 8)], abs=0.06)


def test_the_picture_of_slips_has_a_point_for_each_arm_and_length():
    """fails if: taught and others are swapped, lengths are mixed, or the mean over seeds is not what is drawn."""
    slips = importlib.import_module("slips")
    values = {row: {f"{kind} {length}": [share + 0.1 * at, share + 0.1 * at + 0.02]
                    for kind, share in (("taught", 0.5), ("others", 0.1)) for at, length in enumerate(slips.LENGTHS)}
              for row in ("before", *slips.ARMS)}
    svg = slips.picture(values)
    dots = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', svg)]
    panel = importlib.import_module("why")
    wanted = [panel.BOTTOM - (panel.BOTTOM - panel.TOP) * (share + 0.1 * at + 0.01)
              for share in (0.5, 0.1) for _ in range(5) for at in range(4)]
    assert dots == pytest.approx(wanted, abs=0.06)
    assert [label for label in slips.ARMS if label.replace("'", "&#x27;") in svg] == [
        label for label in slips.ARMS if label not in (slips.GRPO, slips.MENDED)]


def test_estimates_on_stale_text_have_the_gradients_that_are_said_of_them():
    """Over every token that the writer b could have drawn, where the student p has moved on. Without its clip the
    sampled loss has the gradient of KL(p||q) - KL(p||b): nothing in its credit holds the student back.
    fails if: an estimate takes the wrong ratio, or credit with a gradient of its own."""
    import torch
    from losses import Rows
    stale = importlib.import_module("stale")
    rng = torch.Generator().manual_seed(0)
    logits, teacher, writer = (torch.randn(6, 5, dtype=torch.float64, generator=rng) for _ in range(3))
    logits.requires_grad_()
    p, q, b = logits.log_softmax(-1), teacher.log_softmax(-1), writer.log_softmax(-1)

    def kl(x, y):
        return torch.autograd.grad((x.exp() * (x - y)).sum(), logits, retain_graph=True)[0]
    expected = {stale.credit_anew: kl(p, q), stale.without_clip: kl(p, q) - kl(p, b), stale.sampled_forward: kl(q, p)}
    for loss, wanted in expected.items():
        found = 0.0
        for a in range(5):
            rows = Rows(p, torch.full((6,), a), q, b[:, a], q[:, a] - b[:, a])
            found = found + torch.autograd.grad((b[:, a].exp() * loss(rows, None)).sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_independent_halves_take_the_noise_out_of_a_cosine():
    """The same direction twice as long, seen through noise in 4,000 dimensions. fails if: a half is squared, or a pair
    of halves is left out."""
    import torch
    rng = torch.Generator().manual_seed(0)
    true = torch.randn(4000, dtype=torch.float64, generator=rng)
    fresh, stale = ([scale * true + 2 * torch.randn(4000, dtype=torch.float64, generator=rng) for _ in range(2)]
                    for scale in (1, 2))
    cosine, ratio = importlib.import_module("stale").compared(stale, fresh)
    assert cosine == pytest.approx(1, abs=0.1) and ratio == pytest.approx(2, abs=0.2)
    assert torch.cosine_similarity(stale[0], fresh[0], dim=0) < 0.5


def test_derailed_tokens_are_told_apart():
    """A straight response, a loop and letters, the last token of each its stop or the cut. fails if: a repeated digit
    or step counts as a loop, the derailment begins a character off, or a derailed response has straight tokens."""
    import torch
    derail = importlib.import_module("derail")
    texts = ["2*1=2;2*1=2#2.", "3+8=1;1*2=2=2=2=2=", "3+8=1;qwert"]
    assert [derail.place(text) for text in texts] == [len(texts[0]), 11, 6]
    lengths = [len(text) for text in texts]
    s = derail.Signals(token_N=torch.tensor([derail.CHARACTERS.index(one) for text in texts for one in text]),
                       length_B=torch.tensor(lengths), sequence_N=torch.arange(3).repeat_interleave(
                           torch.tensor(lengths)), position_N=torch.cat([torch.arange(n) for n in lengths]))
    found = {name: mask_N.split(lengths) for name, mask_N in derail.kinds(s).items()}
    assert [[int(part.sum()) for part in found[name]] for name in ("straight", "before", "entry", "tail")] == [
        [14, 0, 0], [0, 11, 6], [0, 3, 3], [0, 4, 2]]
    assert [derail.CHARACTERS[i] for i in derail.ways_back(s).tolist() if i] == [";"] * 4 + ["1"] * 5
