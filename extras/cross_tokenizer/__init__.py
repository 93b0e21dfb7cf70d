"""Another tokenizer: a teacher that reads the student's text cut into its own tokens (arXiv:2606.09456).

    token_bytes.py, align.py    which tokens of both sides hold the same bytes: chunks
    chunk_credit.py             from the log-ratio of a chunk to the credit of its tokens
    bridge.py                   the settings, and which teachers are read that way
    rows.py, crossing.py        what the teacher says of the student's tokens, as a Part like any other
    baselines.py                ULD and GOLD
    gate.py                     how well two tokenizers fit, said before the first step
"""
from extras.cross_tokenizer import baselines, gate  # noqa: F401  (baselines adds its rows to losses.DIVERGENCES)
from extras.cross_tokenizer.bridge import Flags  # noqa: F401
from extras.cross_tokenizer.crossing import attach_crossing
from extras.teachers import Teachers
from support.flags import recipe
from support.settings import TOY

RECIPES = {
    "xtok": recipe("a teacher with another tokenizer: chunks of equal bytes, credit per chunk (2606.09456)",
                   teacher=TOY + "teacher_sp", divergence="policy_gradient"),
}


def attach(run) -> None:
    if isinstance(run.kind, Teachers) and any(run.kind.bridges):
        attach_crossing(run)
        run.before_first_step.append(gate.check_tokenizers)
