"""Top-k: what a teacher on another machine says of a token in few bytes (--teacher_topk K): its K most likely words
with their log-probs, the log of the mass of all others, and the log-prob of the token drawn and the entropy over the
whole vocabulary. 8 K + 12 bytes a token instead of 2 or 4 for each column of its hidden states.

Nothing is made up for the words that were not sent. A row has no teacher_NV; top-k losses read it over K + 1 words, the
K and the rest, on both sides. So these are exact, value and gradient:

    advantages and weights from log q(a) and H(q), k2           the server computed them over the whole vocabulary
    top-k losses on the teacher's --topk <= K words, or         renormalised and truncated see those words alone; tail
    on their intersection with the student's                    sees the rest as one, and its mass is known

and whatever needs q elsewhere is refused before anything is loaded: full-vocabulary divergences, and supports with
words of the student's own.
"""
from typing import NamedTuple

import torch
from torch import Tensor

import losses
from extras.remote_wire import NOTHING
from extras.teachers import Teachers
from losses import Rows, Support, top_ids, upcast
from support.errors import UserError
from support.setup import asked_signals
from teacher import Part

ON_DRAWN = ("policy_gradient", "k2", "cross_entropy")
ON_TOP = ("topk_reverse_kl", "topk_forward_kl")
SUPPORTS = ("teacher", "intersection")
plain_support, PLAIN = losses.choose_support, {name: losses.DIVERGENCES[name] for name in ON_TOP}


def rules(cfg) -> list[tuple[bool, str]]:
    if not (k := cfg.teacher_topk):
        return []
    flag, on_top = f"--teacher_topk {k}", cfg.divergence in ON_TOP
    instead = f"--divergence topk_reverse_kl --support teacher --topk_form tail --topk {min(k, 16)}"
    return [
        (on_top or cfg.divergence in ON_DRAWN,
         f"--divergence {cfg.divergence} needs the teacher's whole distribution, and {flag} sends {k} words of it; use "
         f"{instead}, or leave out --teacher_topk"),
        (not on_top or cfg.support in SUPPORTS,
         f"--support {cfg.support}: {flag} says nothing of words that only the student likes; use --support teacher or "
         f"intersection"),
        (not on_top or cfg.topk <= k,
         f"--topk {cfg.topk} asks for more words than {flag} sends; lower the one or raise the other"),
        ("reverse_kl_N" not in asked_signals(cfg),
         f"--weight {cfg.weight} needs the teacher's whole distribution; leave out --teacher_topk"),
        (not cfg.report_only, "--report_only compares whole distributions; leave out --teacher_topk"),
    ]


def columns(k: int) -> int:
    return 2 * k + 3


class Short:
    """How the rows of such a teacher are asked for and read; it stands where other parts have a head. A row is float32,
    which holds every id of a vocabulary exactly: K log-probs, K ids, log of the rest, log q(a), H(q)."""

    def __init__(self, cfg, vocab_size: int):
        self.k, self.temperature = min(cfg.teacher_topk, vocab_size), cfg.temperature
        self.columns, self.bytes = columns(self.k), 8 * self.k + 12

    def asked(self) -> dict[str, Tensor]:
        return {"topk": torch.tensor(self.k), "temperature": torch.tensor(self.temperature, dtype=torch.float64)}

    def wanted(self, rows: int) -> dict[str, tuple]:
        one, many = (rows,), (rows, self.k)
        return {"top_NK": (torch.float32, many), "id_NK": (torch.int32, many), "tail_N": (torch.float32, one),
                "logp_N": (torch.float32, one), "entropy_N": (torch.float32, one)}

    def joined(self, found: dict[str, Tensor]) -> Tensor:
        return torch.cat([found["top_NK"], found["id_NK"].float(), torch.stack(
            [found[name] for name in ("tail_N", "logp_N", "entropy_N")], 1)], 1)

    def cut(self, row_NC: Tensor) -> tuple[Tensor, ...]:
        """(top_NK, id_NK, tail_N, logp_N, entropy_N)"""
        top_NK, id_NK, more_N3 = row_NC.split([self.k, self.k, 3], 1)
        return top_NK, id_NK.long(), *more_N3.unbind(1)


class TopkRows(NamedTuple):
    """losses.Rows without the teacher's distribution, and what is known of it. Gradient flows through student_NV."""
    student_NV: Tensor          # log p
    token_N: Tensor             # a
    top_NK: Tensor              # log q of its K likeliest words, the likeliest first
    id_NK: Tensor               # which they are
    tail_N: Tensor              # log of the mass of all others
    drawn_N: Tensor             # log q(a)
    entropy_N: Tensor           # H(q) over the vocabulary
    behavior_logp_N: Tensor | None = None
    advantage_N: Tensor | None = None
    teacher_NV: None = None     # whoever asks for it learns that there is none

    student_logp_N = Rows.student_logp_N

    def teacher_logp_N(self) -> Tensor:
        return self.drawn_N

    def coarse(self) -> "CoarseRows":
        """Both sides over K + 1 words: the K, and the rest as one."""
        rest_N = self.student_NV.scatter(1, self.id_NK, NOTHING).logsumexp(-1)
        student_NV = torch.cat([self.student_NV.gather(1, self.id_NK), rest_N[:, None]], 1)
        teacher_NV = torch.cat([self.top_NK, self.tail_N[:, None]], 1).to(student_NV.dtype)
        return CoarseRows(student_NV, teacher_NV, self.id_NK, self.student_NV)


class CoarseRows(NamedTuple):
    """What a top-k loss reads of such rows."""
    student_NV: Tensor          # log p, log q, over K + 1 words
    teacher_NV: Tensor
    id_NK: Tensor
    student_all_NV: Tensor      # log p over the vocabulary


class TopkPart(Part):
    """The rows that such a teacher scored. head_VE is Short."""

    def fields(self, row_n: Tensor) -> dict[str, Tensor]:
        return {"told_NC": self.hidden_nE[self.place_N[row_n]]}

    def rows(self, logits_NV: Tensor, fields: dict[str, Tensor]) -> TopkRows:
        own = {name: value for name, value in fields.items() if name != "told_NC"}
        known = dict(zip(("top_NK", "id_NK", "tail_N", "drawn_N", "entropy_N"), self.head_VE.cut(fields["told_NC"])))
        return TopkRows(upcast(logits_NV).log_softmax(-1), **known, **own)

    def top_ids(self, logits_NV: Tensor, fields: dict[str, Tensor]) -> None:
        return None

    def tell(self, row_n: Tensor) -> dict[str, Tensor]:
        """Signals that others have added to teacher.TOLD are not among what was sent: NaN."""
        *_, drawn_N, entropy_N = self.head_VE.cut(self.hidden_nE[self.place_N[row_n]])
        return {"teacher_logp_N": drawn_N, "teacher_entropy_N": entropy_N}


def choose_support(r: Rows, args) -> Support:
    """losses.choose_support; of K + 1 words never the last, which is many."""
    if not isinstance(r, CoarseRows):
        return plain_support(r, args)
    k = min(args.topk, r.id_NK.shape[1])
    keep_NK = torch.ones_like(r.id_NK[:, :k], dtype=torch.bool)
    if args.support == "intersection":
        student_id_NK = top_ids(r.student_all_NV.detach(), args.topk)
        keep_NK = (r.id_NK[:, :k, None] == student_id_NK[:, None, :]).any(2)
    at_NK = torch.arange(k, device=keep_NK.device).expand_as(keep_NK)
    return Support(r.student_NV[:, :k], r.teacher_NV[:, :k], keep_NK, at_NK)


def of_either_rows(name: str):
    """The top-k loss `name`, also of such rows."""
    def loss(r: Rows | TopkRows, args) -> Tensor:
        return PLAIN[name](r.coarse() if isinstance(r, TopkRows) else r, args)
    return loss


# In a run

def attach(run) -> None:
    kind, observe, parts = run.kind, run.observe, run.teacher.parts
    if isinstance(kind, Teachers) and (any(kind.bridges) or kind.one_stop):
        what = "another tokenizer" if any(kind.bridges) else "other stop tokens"
        hint = "leave out --teacher_topk" + ("" if any(kind.bridges) else ", or pass --stop_ids")
        raise UserError(f"--teacher_topk {run.cfg.teacher_topk}: a teacher with {what} has to say more than its "
                        f"likeliest words; {hint}")
    put_in_place()
    kind.compares = lambda problems: False      # distances are those of whole distributions
    run.teacher.parts = lambda batch: [topk_part(part) for part in parts(batch)]
    run.observe = lambda rows, top_ids_NK: noted(rows) if isinstance(rows, TopkRows) else observe(rows, top_ids_NK)


def put_in_place() -> None:
    losses.choose_support = choose_support
    losses.DIVERGENCES.update({name: of_either_rows(name) for name in ON_TOP})


def topk_part(part: Part) -> Part:
    if not isinstance(part.head_VE, Short):
        return part
    return TopkPart(part.sequence_b, part.place_N, part.hidden_nE, part.head_VE, part.token_N, part.cfg)


def noted(rows: TopkRows) -> dict[str, Tensor]:
    """What is exact of support.metrics.diagnostics; coarse_kl: KL(p||q) over the K + 1 words, at most reverse_kl."""
    p, q, *_ = rows.coarse()
    entropy_N = -torch.linalg.vecdot(rows.student_NV.exp(), rows.student_NV)
    return {"coarse_kl": (p.exp() * (p - q)).sum(-1), "student_entropy": entropy_N, "teacher_entropy": rows.entropy_N,
            "entropy_gap": (rows.entropy_N - entropy_N).abs(),
            "sampler_gap": (rows.student_logp_N() - rows.behavior_logp_N).abs()}
