"""Token bytes: what every id of a tokenizer stands for, and how it cuts a text that nothing changed before.

Used by align.py. Everything is said of tokenizer.json as it is in use. UserError for tokenizers that do not give back
the bytes they read (WordPiece, nmt_nfkc).
"""
import json
from operator import itemgetter
from typing import NamedTuple

import torch
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend
from torch import Tensor

from support.errors import UserError
from support.tokenizer import Tokenizer

MODELS = ("BPE", "Unigram")
NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "Prepend")
PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts")
DECODERS = ("ByteLevel", "Metaspace", "ByteFallback", "Fuse", "Strip")


class TokenBytes(NamedTuple):
    """What every id of a tokenizer stands for."""
    bytes: list[bytes | None]   # by id; None: no such id
    special: frozenset[int]     # control tokens: events that no text spells
    added: dict[bytes, int]     # tokens that are matched whole, special or not: content -> id
    fallback: frozenset[int]    # <0x00> ... <0xFF>: single bytes that stand in for characters without a piece


def flat(step: dict | None) -> list[dict]:
    """The steps of a normalizer, pre_tokenizer or decoder in order; a Sequence may hold Sequences."""
    if step is None or step["type"] != "Sequence":
        return [] if step is None else [step]
    (inner,) = (value for value in step.values() if isinstance(value, list))
    return [part for step in inner for part in flat(step)]


def is_lossy(step: dict, known: tuple[str, ...]) -> bool:
    """Whether a step loses part of ordinary text; replacing is allowed between spaces and their marker."""
    if step["type"] == "Replace":
        return " " not in (step["content"], step["pattern"].get("String")) or "String" not in step["pattern"]
    # inverted, what matches is the delimiter and is kept (cl100k's layout): only what no pattern matches is lost, and
    # Side.spell finds that in the text where it happens
    return step["type"] not in known or step.get("behavior") == "Removed" and not step.get("invert")


def layout(backend: Backend) -> dict:
    """tokenizer.json as it is in use, without vocabulary and merges: writing out and reading in those of a large one
    takes seconds."""
    around = Backend(models.BPE())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(backend, part) is not None:
            setattr(around, part, getattr(backend, part))
    spec, kind = json.loads(around.to_str()), type(backend.model).__name__
    if kind == "BPE":
        keys = spec["model"].keys() - {"type", "vocab", "merges"}
        spec["model"] |= {key: getattr(backend.model, key) for key in keys}
    else:       # the library does not say how other models are set up
        spec["model"] = json.loads(backend.to_str())["model"]
    return spec


def supported(tokenizer: Tokenizer) -> dict:
    """Its layout, if ids can be turned into bytes and bytes into ids without loss; else UserError."""
    spec = layout(tokenizer.backend)
    model = spec["model"]
    odd = [f"a {model['type']} model"] if model["type"] not in MODELS else []
    odd += [f"a {key}" for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    for part, known in (("normalizer", NORMALIZERS), ("pre_tokenizer", PRE_TOKENIZERS), ("decoder", DECODERS)):
        odd += [f"the {part} {step['type']}" for step in flat(spec[part]) if is_lossy(step, known)]
    if not any(step["type"] in ("ByteLevel", "Replace", "Metaspace", "ByteFallback") for step in flat(spec["decoder"])):
        odd.append("no decoder that says how pieces become bytes")
    if odd:
        raise UserError(f"{tokenizer.folder / 'tokenizer.json'} has {odd[0]}, so its tokens do not spell a text byte "
                        f"by byte; choose a model with byte-level or SentencePiece BPE")
    return spec


def byte_alphabet() -> dict[str, int]:
    """How byte-level tokenizers write bytes (GPT-2): printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def byte_table(backend: Backend, spec: dict) -> TokenBytes:
    """A piece is what the decoder makes of it. An added token is its literal content, except in a SentencePiece
    vocabulary where it is a piece as well (Gemma declares runs of spaces, ▁▁, both ways)."""
    pieces, decoder = backend.get_vocab(with_added_tokens=False), flat(spec["decoder"])
    added = backend.get_added_tokens_decoder()
    byte_level = any(step["type"] == "ByteLevel" for step in decoder)
    markers = [step["replacement"] if step["type"] == "Metaspace" else step["pattern"]["String"]
               for step in decoder if step["type"] in ("Metaspace", "Replace")]
    single = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)} if spec["model"].get("byte_fallback") else {}
    fallback = frozenset() if byte_level else frozenset(pieces[piece] for piece in single if piece in pieces)
    value_of = byte_alphabet().__getitem__
    size = 1 + max(*pieces.values(), *added)
    table: list[bytes | None] = [None] * size
    for piece, token_id in pieces.items():
        try:
            table[token_id] = bytes(map(value_of, piece)) if byte_level else single[piece]
        except KeyError:    # an ordinary SentencePiece; or one that no byte-level encoder writes
            for marker in markers:
                piece = piece.replace(marker, " ")
            table[token_id] = piece.encode()
    for token_id, token in added.items():
        if byte_level or token.special or token.content not in pieces:
            table[token_id] = token.content.encode()
    special = frozenset(token_id for token_id, token in added.items() if token.special)
    return TokenBytes(table, special, {token.content.encode(): token_id for token_id, token in added.items()}, fallback)


def rebuilt_raw(backend: Backend, spec: dict) -> Backend:
    """What raw_copy promises; the model itself is shared, not copied."""
    steps = [{**step, "add_prefix_space": False} if step["type"] == "ByteLevel" else
             {**step, "prepend_scheme": "never"} if step["type"] == "Metaspace" else step
             for step in flat(spec["pre_tokenizer"])]
    kept = [step for step in flat(spec["normalizer"]) if step["type"] == "Replace"]
    raw = Backend.from_str(json.dumps({
        **json.loads(Backend(models.BPE()).to_str()), "normalizer": {"type": "Sequence", "normalizers": kept},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}))
    if spec["model"].get("dropout"):
        raw.model = Backend.from_str(backend.to_str()).model        # its own, to switch off what the other keeps
        raw.model.dropout = None
    else:
        raw.model = backend.model
    raw.add_tokens([AddedToken(token.content, single_word=token.single_word, normalized=token.normalized,
                               special=token.special)      # in the order of their ids, which the library gives anew
                    for _, token in sorted(backend.get_added_tokens_decoder().items(), key=itemgetter(0))])
    raw.encode_special_tokens = True
    return raw


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """The byte table of a tokenizer.  UserError: a kind whose tokens have no bytes of their own."""
    return byte_table(tokenizer.backend, supported(tokenizer))


def raw_copy(tokenizer: Tokenizer) -> Backend:
    """The tokenizer without anything that changes a text before it is cut: no normal forms, no space in front,
    no text turned into control tokens, no spaces swallowed beside added tokens, no dropout. `encode` with
    add_special_tokens=False.  UserError: as token_bytes."""
    return rebuilt_raw(tokenizer.backend, supported(tokenizer))


def whitespace_tokens(table: TokenBytes) -> Tensor:
    """(V,) bool: tokens of nothing but spaces, tabs and newlines."""
    return torch.tensor([bool(text) and not text.strip(b" \t\r\n") for text in table.bytes])
