"""Problems from a second file: a share of every step's, duplicates of the first file left out."""
import math
from collections import Counter, defaultdict
from dataclasses import dataclass

from support.errors import UserError
from support.flags import opt
from support.problems import Problem, load_problems


@dataclass(frozen=True)
class Flags:
    mix_data: str = opt("", "a second file of problems; those also in --data, exactly or nearly, are left out")
    mix: float = opt(0.0, "share of each step's problems drawn from --mix_data", high=1)


def rules(cfg) -> list[tuple[bool, str]]:
    return [(bool(cfg.mix_data) == (cfg.mix > 0), "--mix and --mix_data go together")]


def problems(cfg, train: list[Problem], need_answer: bool) -> list[Problem]:
    """Those of --mix_data that are not in --data already."""
    if not cfg.mix_data:
        return []
    others = load_problems(cfg.mix_data, need_answer=need_answer)
    known = near_duplicates(others, train)
    kept = [problem for i, problem in enumerate(others) if i not in known]
    if not kept:
        raise UserError(f"{cfg.mix_data}: every problem is also in {cfg.data}; choose another --mix_data")
    print(f"data    {len(train)} problems of {cfg.data}, {len(kept)} of {cfg.mix_data} ({len(known)} duplicates left "
          f"out)")
    return kept


def attach(run) -> None:
    if run.cfg.mix:
        first, total = run.first, len(run.train)
        run.order = lambda run, places: pick_mixed(run.pick, first, total - first, run.cfg.mix, places, run.cfg.seed)


def pick_mixed(pick, first: int, second: int, share: float, places: range, seed: int) -> list[int]:
    """train.pick where in the long run `share` of the list is from the second file, whose indices start at `first`."""
    start, stop = (math.floor(place * share) for place in (places.start, places.stop))
    ours = pick(first, range(places.start - start, places.stop - stop), seed)
    return ours + [first + i for i in pick(second, range(start, stop), seed + 2**31)]


def problem_text(problem: Problem) -> str:
    prompt = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    return " ".join(str(prompt).lower().split())


def near_duplicates(problems: list[Problem], others: list[Problem], threshold: float = 0.6) -> set[int]:
    """Indices of `problems` whose text is that of one of `others`, or nearly: Jaccard similarity of their sets of
    character 5-grams at least `threshold` (case and white space folded).

    Exact, and far from quadratic: two sets that similar must share one of each other's |A| - ceil(t |A|) + 1 rarest
    members, so only those are looked up (prefix filtering, Chaudhuri 2006).
    """
    def grams(problem: Problem) -> set[str]:
        text = problem_text(problem)
        return {text[i:i + 5] for i in range(max(1, len(text) - 4))}
    mine, theirs = [grams(p) for p in problems], [grams(p) for p in others]
    frequency = Counter(gram for one in mine + theirs for gram in one)

    def rarest(one: set[str]) -> list[str]:
        ordered = sorted(one, key=lambda gram: (frequency[gram], gram))
        return ordered[:len(one) - math.ceil(threshold * len(one)) + 1]
    index = defaultdict(list)
    for number, one in enumerate(theirs):
        for gram in rarest(one):
            index[gram].append(number)
    found = set()
    for number, one in enumerate(mine):
        candidates = {other for gram in rarest(one) for other in index.get(gram, ())}
        if any(len(one & theirs[other]) >= threshold * len(one | theirs[other]) for other in candidates):
            found.add(number)
    return found
