"""SG-OPD and its relatives past the ceiling of a teacher that is wrong about something.

    python experiments/sg.py                    # about 8 minutes on two idle cores

Claim      Extrapolating past the teacher where it agrees with the verifier, and only there, beats OPD in
           single answers and more so in coverage (pass@k); the sign of the agreement is what makes a large
           extrapolation safe.
Paper      SG-OPD, arXiv:2606.09304: gate with factors 1.8 and 1; controls are ours. ExOPD,
           arXiv:2602.12125: gate `all`. OPDVR, arXiv:2608.24696: no teacher where the verifier disagrees.
Design     toy/teacher_unreliable takes 7 for 8 and 8 for 7 in products and knows everything else. While a
           student is far below its teacher all arms are distillation and cannot be told apart, so each
           seed's student is first distilled for 60 steps (exact reverse KL). By then it is above the
           teacher: it knew those products better before, and has not unlearned them yet. From there every
           arm goes on for 80 steps on the same groups of eight. Both forms of the factor; the reference is
           toy/student, not the distilled one, which would leave nothing to extrapolate from. `outside` are
           the problems with a product by 7 or 8 in their calculation.
Against    sg not above opd; the random gate as good as the sign gate; no arm above its start outside the
           teacher's competence.
"""
import re
from pathlib import Path

from compare import TOY, accuracy_by, columns, differences, mean_by, options, percent, run_all, summary, table
from eval import evaluate
from support.problems import load_problems
from support.tokenizer import Tokenizer
from support.weights import load_model

TEACHER = f"--teacher {TOY / 'teacher_unreliable'}"
START = {"start": f"opd --steps 60 {TEACHER}"}
GROUPS = "sg --pts_weight 0"            # the sampled policy gradient on 8 problems x 8 responses
ARMS = {
    "opd": f"{GROUPS} --advantage opd",
    "sg, reference": GROUPS,
    "sg, reference, random gate": f"{GROUPS} --sg_gate random",
    "sg, reference, no gate": f"{GROUPS} --sg_gate all",
    "sg, scale": f"{GROUPS} --sg_form scale",
    "sg, reference, teacher sampling": "sg",
    "opdvr": f"{GROUPS} --advantage opdvr",
    "grpo": f"{GROUPS} --advantage grpo"}


def stages(runs: Path) -> dict[str, tuple[dict[str, str], str]]:
    """name -> (arms, flags of all its arms). `past` starts from the runs of `start`."""
    start = runs.resolve() / "start" / "start-{seed}" / "last"
    return {"start": (START, "--eval_every 0"),
            "past": (ARMS, f"{TEACHER} --student {start} --reference {TOY / 'student'} --steps 80 --eval_every 0 "
                           f"--no-eval_teacher")}


def competence(record: dict) -> str:
    return "outside" if re.search(r"\*[78]", record["problem"]) else "inside"


def of_teacher() -> list[float]:
    """The measures of the teacher itself, on the same problems."""
    folder = TOY / "teacher_unreliable"
    problems = load_problems(TOY / "test.jsonl", need_answer=True)
    found, samples = evaluate(load_model(folder), Tokenizer(folder), problems, k=8, temperature=1.0,
                              max_new_tokens=40, seed=0, slots=128)
    by = mean_by(competence, [problem.fields for problem in problems], samples)
    return [found["avg@8"], found["pass@8"], by["inside"], by["outside"]]


def measures(folder: Path, when: str = "after") -> list[float]:
    """avg@8, pass@8, accuracy inside and outside the teacher's competence."""
    found = summary(folder)[when]
    by = accuracy_by(folder, competence, 0 if when == "before" else None)
    return [found["avg@8"], found["pass@8"], by["inside"], by["outside"]]


def main() -> None:
    args = options(__doc__, "sg", seeds=4)
    plan = stages(args.runs)
    _, past = (run_all(arms, flags, args.seeds, args.runs / name) for name, (arms, flags) in plan.items())
    rows = [["the teacher", *(f"{value:.1%}" for value in of_teacher()), ""]]
    before = [measures(folder, "before") for folder in past["opd"]]
    rows.append(["before", *map(percent, columns(before)), ""])
    baseline = [measures(folder)[0] for folder in past["opd"]]
    for label, folders in past.items():
        found = [measures(folder) for folder in folders]
        gain = percent(differences([one[0] for one in found], baseline), "+") if label != "opd" else ""
        rows.append([label, *map(percent, columns(found)), gain])
    table(["arm", "avg@8", "pass@8", "inside", "outside", "avg@8 against opd"], rows)


if __name__ == "__main__":
    main()
