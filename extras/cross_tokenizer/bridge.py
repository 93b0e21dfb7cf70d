"""Bridge: the settings of a teacher with another tokenizer, and which teachers need to be read through one.

Not here: how a text is read through it (align.py), and what the teacher then says of it (crossing.py).
"""
from dataclasses import dataclass

from extras.cross_tokenizer.align import Bridge
from extras.cross_tokenizer.chunk_credit import CREDIT
from support.errors import UserError
from support.flags import opt
from support.tokenizer import Tokenizer

ONE_VOCABULARY = ("k2", "eopd")     # divergences that need the student's tokenizer


@dataclass(frozen=True)
class Flags:
    align: str = opt("auto", "read the student's text through the teacher's tokenizer: when they differ, or always",
                     ("auto", "always"))
    chunk_credit: str = opt("chunk", "how a chunk's log-ratio becomes credit of its tokens", tuple(CREDIT))
    chunk_clamp: float = opt(0.0, "a chunk's log-ratio (prop: a token's) is kept within +- this; 0 = off")
    max_chunk: int = opt(0, "chunks of more tokens than this on either side get no credit (the paper's code: 6); "
                            "0 = off")
    mask_whitespace: bool = opt(False, "no credit for tokens of white space alone")
    min_coverage: float = opt(0.7, "do not start when the loss can learn from a smaller share of the student's tokens: "
                                   "those with credit, or (strict, dense losses) with a teacher token of their own",
                                high=1)
    max_dropped: float = opt(0.01, "do not start when a larger share of the responses cannot be read", high=1)


def find_bridge(cfg, student: Tokenizer, theirs: Tokenizer) -> Bridge | None:
    """None when a teacher with the tokenizer `theirs` reads the student's ids as they are."""
    folder = theirs.folder
    if student.vocab() == theirs.vocab() and cfg.align == "auto":
        return None
    if cfg.divergence in ONE_VOCABULARY or cfg.weight == "tip":
        what = f"weight {cfg.weight}" if cfg.weight == "tip" else f"divergence {cfg.divergence}"
        raise UserError(f"{what} needs a teacher with the student's tokenizer, and {folder} has another one; use "
                        f"policy_gradient, or a divergence over the vocabulary")
    if student.vocab() != theirs.vocab() and cfg.chunk_credit == "chunk" and cfg.discount and (
            cfg.divergence == "policy_gradient" and cfg.advantage == "opd"):
        raise UserError(f"--discount {cfg.discount:g} adds up the credit of later tokens, and --chunk_credit chunk "
                        f"gives all of a chunk's to each of its tokens; use --chunk_credit prefix")
    own_template = student.vocab() != theirs.vocab() and cfg.chat_template != "auto"    # the student's is not for it
    return Bridge(student, Tokenizer(folder) if own_template else theirs)
