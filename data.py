"""Data: which problems a step asks, and what student and teacher read of them.

Place in the loop:  [DATA] -> rollout -> teacher -> credit -> losses.

Order comes from (seed, step) alone, so a resumed run sees the same problems. What a problem and a right
answer are is said in support/.
"""
import math
import re
from collections import Counter, defaultdict

import numpy as np

from support.problems import Problem


def pick(total: int, places: range, seed: int) -> list[int]:
    """The problems at these places of an endless list: every epoch is a new permutation of all of them."""
    orders = {epoch: np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(total)
              for epoch in {place // total for place in places}}
    return [int(orders[place // total][place % total]) for place in places]


def pick_mixed(first: int, second: int, share: float, places: range, seed: int) -> list[int]:
    """The same list when in the long run `share` of it comes from the second file, whose indices start at
    `first`."""
    start, stop = (math.floor(place * share) for place in (places.start, places.stop))
    ours = pick(first, range(places.start - start, places.stop - stop), seed)
    return ours + [first + i for i in pick(second, range(start, stop), seed + 2**31)]


# What the teacher reads when it knows more than the student

SHOWN_SOLUTION = (
    "Problem: {problem}\n\nA reference solution of this problem follows.\n--- reference begins ---\n{solution}\n"
    "--- reference ends ---\n\nFirst make sure that you understand every step of the reference, without copying or "
    "rephrasing it. Then reach the same final answer to the problem above with reasoning of your own. Think step by "
    "step, try more than one way, and go back wherever needed.")


def privileged_prompt(prompt: str | list[dict], solution: str, template: str) -> str | list[dict]:
    """The student's prompt with `template` in place of its last user message (of its last one, if no user
    speaks); {problem} and {solution} are filled in one pass, so braces inside the problem stay text.  OPSD,
    arXiv:2601.18734 v3: the structure of its code's prompt, in our words.

    >>> privileged_prompt("2+2?", "four", "{solution} | {problem}")
    'four | 2+2?'
    """
    if isinstance(prompt, list):
        last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=len(prompt) - 1)
        content = privileged_prompt(prompt[last]["content"], solution, template)
        return [*prompt[:last], {**prompt[last], "content": content}, *prompt[last + 1:]]
    return re.sub(r"\{(problem|solution)\}", lambda found: prompt if found[1] == "problem" else solution, template)


# Filters

def degenerate(text: str) -> bool:
    """Does a response run in circles?  The cold-start filters of Rethinking OPD's code (arXiv:2604.13016): a
    line of at least 20 characters five times; a window of 100 characters (every 10th) three times; in texts
    over 5,000 characters a block of at least 50 repeated three times in a row."""
    lines = Counter(line for line in text.splitlines() if len(line) >= 20)
    windows = Counter(text[start:start + 100] for start in range(0, len(text) - 99, 10))
    if max(lines.values(), default=0) >= 5 or max(windows.values(), default=0) >= 3:
        return True
    return len(text) > 5000 and re.search(r"(.{50,500}?)\1\1", text, re.DOTALL) is not None


def problem_text(problem: Problem) -> str:
    prompt = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    return " ".join(str(prompt).lower().split())


def near_duplicates(problems: list[Problem], others: list[Problem], threshold: float = 0.6) -> set[int]:
    """Indices of `problems` whose text is that of one of `others`, or nearly: Jaccard similarity of their
    sets of character 5-grams at least `threshold` (case and white space folded).

    Exact, and far from quadratic: two sets that similar must share one of each other's |A| - ceil(t |A|) + 1
    rarest members, so only those are looked up (prefix filtering, Chaudhuri 2006).
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
