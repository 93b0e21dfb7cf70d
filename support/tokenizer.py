"""Tokenizer: text to ids and back, a chat in the form the checkpoint was trained on, and the stop ids.

Ids equal those of transformers 5 (PreTrainedTokenizerFast, apply_chat_template) on the same folder. The files
are a stranger's: only those of the folder itself are opened (support/files.py), chat templates run in a process
of their own (support/template.py), and whatever the tokenizers library stumbles over is said in one sentence.

Not here: models; tokenizers without tokenizer.json; special tokens named but absent from the vocabulary
(transformers invents ids for them, which may have no embedding row).
"""
import json
import math
import os
import shutil
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from support.errors import UserError, one_line, read_json, shown
from support.files import checkpoint_file, checkpoint_json
from support.template import OTHER_TEMPLATE, Template, checked_messages, find_template, plain_data

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
              "generation_config.json")
MOST_BYTES = 2**27      # of a tokenizer.json; the largest published ones have a quarter
MOST_IDS = 4 * 10**6    # the largest published vocabulary has a million; tables as long as the largest id are made
MOST_GROWTH = 64        # published normalizers make a text at most twice as long; thirty in a row fill any memory


@contextmanager
def one_sentence(trouble: str, what_to_do: str):
    """Whatever the tokenizers library raises inside becomes a UserError: bare Exceptions, and the PanicException
    of its Rust code, which is not even an Exception."""
    try:
        yield
    except (UserError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{trouble} ({shown(one_line(error))}); {what_to_do}") from error


def is_text(value) -> bool:
    """A str whose characters are whole: JSON can also spell halves of a character, which have no UTF-8."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def special_tokens(folder: Path, config: dict) -> dict[str, str]:
    """{"bos_token": "<s>", ...}; special_tokens_map.json counts only beside an old tokenizer_config.json."""
    if "added_tokens_decoder" not in config:
        config = config | checkpoint_json(folder, "special_tokens_map.json", optional=True)
    texts = {}
    for name in SPECIAL:
        entry = config.get(name)
        if entry is not None:
            texts[name] = entry.get("content") if isinstance(entry, dict) else entry
            if not is_text(texts[name]):
                raise UserError(f"{shown(folder / 'tokenizer_config.json')}: {name} must be a text, not "
                                f"{shown(repr(entry))}")
    return texts


def growth(step: dict) -> float:
    """How many times as long a text can become in a step of a normalizer, pre_tokenizer or decoder."""
    if step["type"] == "Sequence":
        return math.prod(growth(inner) for part in ("normalizers", "pretokenizers", "decoders")
                         for inner in step.get(part, ()))
    if step["type"] == "Replace":       # a regular expression may match a single character
        return max(1.0, len(step["content"]) / max(1, len(step["pattern"].get("String", "x"))))
    return 1.0 + len(step["prepend"]) if step["type"] == "Prepend" else 2.0 if step["type"] == "ByteLevel" else 1.0


def check_backend(backend: Backend, path: Path) -> None:
    """UserError for a tokenizer.json that loads and would fill the memory later."""
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= MOST_IDS:
        raise UserError(f"{shown(path)} has the id {largest}, and tables of {MOST_IDS} ids are the largest that are "
                        f"made; is it the right file?")
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(backend, name)
        if part is not None and growth(json.loads(part.__getstate__())) > MOST_GROWTH:
            raise UserError(f"{shown(path)}: its {name} can make a text more than {MOST_GROWTH} times as long; is it "
                            f"the right file?")
    around = backend.encode("", add_special_tokens=True).ids
    if max(around, default=-1) > largest:
        raise UserError(f"{shown(path)}: its post_processor adds the id {max(around)}, and its ids end at {largest}; "
                        f"download it again")


def load_backend(folder: Path, config: dict, special: dict[str, str]) -> Backend:
    """tokenizer.json plus what tokenizer_config.json declares on top of it, without truncation or padding."""
    path = checkpoint_file(folder, "tokenizer.json", optional=True)
    if path is None:
        missing = folder / "tokenizer.json" if os.path.isdir(folder) else folder
        raise UserError(f"{shown(missing)} does not exist; give a checkpoint folder with a tokenizer.json "
                        f"(transformers' save_pretrained writes one)")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{shown(path)} holds {path.stat().st_size} bytes, more than the {MOST_BYTES} that are read; "
                        f"is it the right file?")
    with one_sentence(f"{shown(path)} is broken", "download it again"):
        backend = Backend.from_buffer(path.read_bytes())    # not from_file: a path need not be UTF-8
        backend.no_truncation()     # tokenizer.json keeps the limits of whoever saved it: prompts would be cut
        backend.no_padding()
        check_backend(backend, path)
    with one_sentence(f"{shown(folder / 'tokenizer_config.json')} is broken", "download it again"):
        declared = config.get("added_tokens_decoder", {})
        backend.add_tokens([AddedToken(**declared[token_id]) for token_id in sorted(declared, key=int)])
    # A named token that sits in the plain vocabulary must still be matched whole, and skipped when decoding.
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([text for text in special.values()
                                if text not in added and backend.token_to_id(text) is not None])
    return backend


def find_stop_ids(folder: Path, special: dict[str, str], backend: Backend, vocab_size: int) -> tuple:
    """generation_config.json's eos_token_id, else config.json's, else the id of the tokenizer's eos_token."""
    for name in ("generation_config.json", "config.json"):
        found = checkpoint_json(folder, name, optional=True).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise UserError(f"{shown(folder / name)}: eos_token_id {shown(repr(token_id))} is no token of "
                                f"tokenizer.json, whose ids end at {vocab_size - 1}; correct it")
        if ids:
            return tuple(dict.fromkeys(ids))
    if "eos_token" not in special:
        raise UserError(f"{shown(folder)} names no token that ends an answer; add eos_token_id (a number or a list) "
                        f"to generation_config.json")
    token_id = backend.token_to_id(special["eos_token"])
    if token_id is None:
        raise UserError(f"{shown(folder / 'tokenizer_config.json')}: eos_token {shown(repr(special['eos_token']))} is "
                        f"not in the vocabulary; correct it or add eos_token_id to generation_config.json")
    return (token_id,)


class Tokenizer:
    """The text side of one checkpoint folder.

    chat_template   "auto": the checkpoint's own, plain text when it has none; "plain"; or a .jinja path
    vocab_size      1 + the largest id, added tokens included: real tokens, not the model's padded rows
    stop_ids        ids that end an answer
    variables       what every prompt's chat template gets beside the messages (enable_thinking ...)
    started         the moment that templates take for now; None = the clock. A run that is resumed on another
                    day sets it, for all its tokenizers, to its first start: some templates print the date
    """
    started: datetime | None = None

    def __init__(self, folder: str | Path, chat_template: str = "auto"):
        self.folder, choice = Path(folder), str(chat_template)
        self._path = shown(self.folder / "tokenizer.json")
        for name in TEXT_FILES:     # save copies them all: what it would refuse is refused before the run
            checkpoint_file(self.folder, name, optional=True)
        config = checkpoint_json(self.folder, "tokenizer_config.json", optional=True)
        self._special = special_tokens(self.folder, config)
        self._backend = load_backend(self.folder, config, self._special)
        self.vocab_size = 1 + max(self.vocab().values(), default=-1)
        self.stop_ids = self._stop_ids = find_stop_ids(self.folder, self._special, self._backend, self.vocab_size)
        text, origin = find_template(self.folder, config, choice)
        self._template = None if text is None else Template(text, origin)
        self.variables: dict = {}
        self._given_template = None if choice in ("auto", "plain") else Path(choice).read_bytes()

    def vocab(self) -> dict[str, int]:
        """Token -> id, added tokens included, in the tokenizer's own spelling."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def backend(self) -> Backend:
        """The tokenizers library's object, to look at; nobody changes it."""
        return self._backend

    @property
    def template(self) -> str | None:
        """The source of the chat template; None without one."""
        return self._template and self._template.source

    def encode(self, text: str) -> list[int]:
        """Ids of the text as it stands: nothing is added, the text of a special token becomes that token."""
        return self._ids(text, add_special_tokens=False)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        with one_sentence(f"{self._path} fails on the text {ascii(text[:40])}", "correct the text or the file"):
            try:
                text.encode()
            except UnicodeEncodeError as error:     # a lone surrogate: JSON can spell it, UTF-8 cannot
                part = ascii(text[max(0, error.start - 20):error.start + 20])
                raise UserError(f"a text holds half of a character (a lone surrogate) in {part}; correct the "
                                f"text") from error
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special: bool = True) -> str:
        """Text of a list or 1-d tensor of ids; the ids of a model's padded rows have none."""
        with one_sentence(f"{self._path} fails on ids that were to become text", "correct the file"):
            return self._backend.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special)

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """The chat as text; `variables` (tools, enable_thinking ...) go to the template.

        UserError: misshapen messages; a template that refuses them, fails, or reaches out of its sandbox.
        """
        messages = checked_messages(messages)
        if self._template is None:
            if len(messages) > 1 or not isinstance(messages[0].get("content"), str):
                raise UserError(f"{shown(self.folder)} is used without a chat template: a prompt must be one text "
                                f"and not a chat of {len(messages)} messages; {OTHER_TEMPLATE}")
            return messages[0]["content"]
        variables = self._special | plain_data({"tools": None, "documents": None, **variables}, "variables")
        return self._template.render(variables, messages, add_generation_prompt, self.started or datetime.now())

    def prompt_ids(self, prompt: str | list[dict], **variables) -> list[int]:
        """Ids that ask for an answer. A text becomes one user message; without a template it gets the tokens
        that tokenizer.json itself adds (bos). A rendered chat gets none: its template wrote them."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = self.render(messages, **{**self.variables, **variables})
        return self._ids(text, add_special_tokens=self._template is None)

    def save(self, folder: str | Path) -> None:
        """Copies the text-side files byte for byte. A template given by path becomes chat_template.jinja and
        stop_ids set by the caller go into generation_config.json, so that whoever loads the folder prompts
        and stops the model as it was here."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in TEXT_FILES:
            source, target = checkpoint_file(self.folder, name, optional=True), Path(folder) / name
            if name == "chat_template.jinja" and self._given_template is not None:
                target.write_bytes(self._given_template)
            elif source is not None and source.resolve() != target.resolve():
                shutil.copyfile(source, target)
        if self.stop_ids != self._stop_ids:
            path = Path(folder) / "generation_config.json"
            ids = list(self.stop_ids) if len(self.stop_ids) > 1 else self.stop_ids[0]
            text = json.dumps(read_json(path, optional=True) | {"eos_token_id": ids}, indent=2)
            path.write_text(text + "\n", encoding="utf-8")


def template_variables(text: str, more: list[str] = ()) -> dict:
    """{name: value} of `enable_thinking=false,...` and of single NAME=VALUE. A value that is not JSON is a string."""
    found = {}
    for pair in [part for part in text.split(",") if part] + list(more):
        name, equals, value = pair.partition("=")
        if not (equals and name.isidentifier()) or name in ("self", "prompt", "messages", "add_generation_prompt"):
            raise UserError(f"expected NAME=VALUE, a variable of the chat template, not {pair!r}")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found
