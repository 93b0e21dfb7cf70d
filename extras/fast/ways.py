"""Ways: the faster functions that stand in place of plain ones, and which of them stand aside.

    @way("packed_head", instead_of=rollout.head_product)
    def head_product(...): ...

    put("packed_head", rollout, "head_product", head_product)

Put in its place, the decorated function is the fast one, or the plain one while its name is in `aside`: because
--plain names it, or because the proof at start (proof.py) found it missing or wrong on this machine.
"""
import functools
from contextlib import contextmanager

from support.errors import UserError, one_line

WAYS = {        # every way there is, and what it takes the place of; later ones build on earlier ones
    "packed_head": "rollout.head_product, on a CPU",
    "packed_step": "model.Transformer.forward of a decode step, of a small float32 model on a CPU",
    "grouped_attention": "model.masked_attention, in bfloat16 on a CPU",
    "merged_layers": "model.Layer.forward, on a GPU",
    "borrowed_copy": "model.Linear.forward of a student that trains in float32 and multiplies in less",
    "flash_rows": "model.Transformer.read, on a GPU in half precision",
    "flash_cache": "model.KVCache, on a GPU in half precision",
    "graphs": "rollout.Slots.decode, with flash_cache",
    "compiled_layers": "model.Transformer.forward over whole sequences, with --compile",
    "compiled_decode": "model.Transformer.forward of a decode step, with --compile",
    "turned_products": "model.Linear.forward in a compiled decode step, on a CPU",
    "compiled_loss": "losses.few_rows, with --compile",
}
SAMPLING = {    # those that a pass over whole sequences does not meet
    "packed_head", "packed_step", "grouped_attention", "flash_cache", "graphs", "compiled_decode", "turned_products"}
placed: set[str] = set()        # those that this run put in their place
aside: set[str] = set()         # those that stand aside: their callers get the plain function


def way(name: str, instead_of):
    """Decorates a fast function that takes the place of the plain one `instead_of`, with the same arguments."""
    assert name in WAYS

    def mark(fast):
        @functools.wraps(fast)
        def chosen(*args, **kwargs):
            return (instead_of if name in aside else fast)(*args, **kwargs)
        return chosen
    return mark


def put(name: str, owner, attribute: str, function) -> None:
    """The way `name` in its place."""
    setattr(owner, attribute, function)
    placed.add(name)


def begin(text: str) -> None:
    """A run begins; text: what its --plain says. UserError for a name that no way has."""
    names = set(WAYS) if text == "all" else {part.strip() for part in text.split(",") if part.strip()}
    if unknown := sorted(names - set(WAYS)):
        raise UserError(f"--plain {text}: there is no faster way called {unknown[0]!r}; choose from all, "
                        f"{', '.join(WAYS)}")
    placed.clear()
    aside.clear()
    aside.update(names)


def in_use() -> list[str]:
    return [name for name in WAYS if name in placed - aside]


def stand_aside(name: str, why) -> None:
    """The plain function from here on, said once. why: a sentence, or the exception that the way raised."""
    if isinstance(why, Exception):
        why = f"it raised {type(why).__name__}: {one_line(why)[:200]}"
    aside.add(name)
    print(f"fast    {name} stands aside in this run, the plain way takes its place: {why}")


@contextmanager
def only(names):
    """Inside, every way but these stands aside."""
    before = set(aside)
    aside.update(set(WAYS) - set(names))
    try:
        yield
    finally:
        aside.clear()
        aside.update(before)
