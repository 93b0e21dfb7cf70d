"""Tokenizer: text to ids and back, a chat in the form the checkpoint was trained on, and the stop ids.

Place in the loop: prompts become ids before rollout.py samples, answers become text before eval.py grades.

Ids equal those of transformers 5 (PreTrainedTokenizerFast, apply_chat_template) on the same folder. A chat
template is a program by a stranger: it runs in jinja2's immutable sandbox and sees plain JSON data. Nothing
else of a checkpoint is ever executed.

Not here: models; tokenizers without tokenizer.json; further named templates (tool_use, rag); special tokens
named but absent from the vocabulary (transformers invents ids for them, which may have no embedding row).
"""
import json
import shutil
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from support.errors import UserError, one_line, read_json

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")      # where data sets keep a message's reasoning
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
              "generation_config.json")
OTHER_TEMPLATE = "give another chat template (the path of a .jinja file)"


class GenerationTag(Extension):
    """`{% generation %}` ... `{% endgeneration %}` marks the assistant's words; here it only renders them."""
    tags = {"generation"}

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Namespace(jinja2.utils.Namespace):
    """namespace() of a template. jinja2 looks `__call__` up in it, so underscore names open the sandbox."""

    def __init__(self, /, *args, **kwargs):
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise SecurityError(f"namespace attribute {name!r} begins with an underscore")
        super().__setitem__(name, value)


def raise_exception(message) -> None:
    """How a template says that it cannot express the messages; render adds which template it was."""
    raise UserError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Filter tojson. jinja2's own escapes < > & ' for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def compile_template(text: str, origin: str) -> jinja2.Template:
    """Settings, filters and helpers are those of transformers 5. `origin` names the file in the UserError."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=[GenerationTag, "jinja2.ext.loopcontrols"])
    env.filters["tojson"] = to_json
    env.globals.update(raise_exception=raise_exception, namespace=Namespace,
                       strftime_now=lambda layout: datetime.now().strftime(layout))
    try:
        return env.from_string(text)
    except Exception as error:      # TemplateSyntaxError; Python's own SyntaxError for a stray {% break %}
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UserError(f"{origin}{line}: {one_line(error)}; correct it or {OTHER_TEMPLATE}") from error


def find_template(folder: Path, config: dict, choice: str) -> tuple[str | None, str]:
    """(template, or None for plain text; where it is written). `choice` as Tokenizer's chat_template."""
    path = folder / "chat_template.jinja" if choice == "auto" else Path(choice)
    if choice == "plain":
        return None, ""
    if path.suffix != ".jinja":
        raise UserError(f"chat_template {choice!r} must be 'auto', 'plain' or the path of a .jinja file")
    if choice != "auto" or path.exists():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}); {OTHER_TEMPLATE}") from error
    origin = f"chat_template in {folder / 'tokenizer_config.json'}"
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default", found)
    if found is None or isinstance(found, str):
        return found, origin
    raise UserError(f"{origin} is neither a text nor a list with a text named default; {OTHER_TEMPLATE}")


def plain_data(value, what: str):
    """A copy made of JSON types, since other objects have methods that the sandbox cannot judge."""
    try:
        return json.loads(json.dumps(value, ensure_ascii=False).encode())   # encode() finds lone surrogates
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{what} must be plain JSON data: {one_line(error)}") from error


def checked_messages(messages) -> list[dict]:
    """A copy as transformers hands it to the template: keys whose value is None are gone (a template would
    print the word None), and a reasoning is found under every name that templates read."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"a chat prompt must be a non-empty list of messages, not {one_line(messages)[:80]}")
    checked = []
    for number, message in enumerate(plain_data(messages, "a chat prompt"), start=1):
        message = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        content = message.get("content", "" if "tool_calls" in message else None)
        if not isinstance(message.get("role"), str) or not isinstance(content, (str, list)):
            raise UserError(f'message {number} of a prompt needs a text "role" and a "content" (text or a'
                            f" list of parts), not {one_line(messages[number - 1])[:80]}")
        reasoning = next((message[key] for key in REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        checked.append(message)
    return checked


def special_tokens(folder: Path, config: dict) -> dict[str, str]:
    """{"bos_token": "<s>", ...}; special_tokens_map.json counts only beside an old tokenizer_config.json."""
    if "added_tokens_decoder" not in config:
        config = config | read_json(folder / "special_tokens_map.json", optional=True)
    texts = {}
    for name in SPECIAL:
        entry = config.get(name)
        if entry is not None:
            texts[name] = entry.get("content") if isinstance(entry, dict) else entry
            if not isinstance(texts[name], str):
                raise UserError(f"{folder / 'tokenizer_config.json'}: {name} must be a text, not {entry!r}")
    return texts


def load_backend(folder: Path, config: dict, special: dict[str, str]) -> Backend:
    """tokenizer.json plus what tokenizer_config.json declares on top of it, without truncation or padding."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path if folder.is_dir() else folder} does not exist; give a checkpoint folder "
                        f"with a tokenizer.json (transformers' save_pretrained writes one)")
    try:
        backend = Backend.from_file(str(path))
        path = folder / "tokenizer_config.json"
        declared = config.get("added_tokens_decoder", {})
        backend.add_tokens([AddedToken(**declared[token_id]) for token_id in sorted(declared, key=int)])
    except Exception as error:      # the library raises bare Exception
        raise UserError(f"{path} is broken ({one_line(error)}); download it again") from error
    # A named token that sits in the plain vocabulary must still be matched whole, and skipped when decoding.
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([text for text in special.values()
                                if text not in added and backend.token_to_id(text) is not None])
    backend.no_truncation()     # tokenizer.json keeps the limits of whoever saved it: prompts would be cut
    backend.no_padding()
    return backend


def find_stop_ids(folder: Path, special: dict[str, str], backend: Backend, vocab_size: int) -> tuple:
    """generation_config.json's eos_token_id, else config.json's, else the id of the tokenizer's eos_token."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = read_json(path, optional=True).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise UserError(f"{path}: eos_token_id {token_id!r} is no token of tokenizer.json, whose ids "
                                f"end at {vocab_size - 1}; correct it")
        if ids:
            return tuple(dict.fromkeys(ids))
    if "eos_token" not in special:
        raise UserError(f"{folder} names no token that ends an answer; add eos_token_id (a number or a list) "
                        f"to generation_config.json")
    token_id = backend.token_to_id(special["eos_token"])
    if token_id is None:
        raise UserError(f"{folder / 'tokenizer_config.json'}: eos_token {special['eos_token']!r} is not in "
                        f"the vocabulary; correct it or add eos_token_id to generation_config.json")
    return (token_id,)


class Tokenizer:
    """The text side of one checkpoint folder.

    chat_template   "auto": the checkpoint's own, plain text when it has none; "plain"; or a .jinja path
    vocab_size      1 + the largest id, added tokens included: real tokens, not the model's padded rows
    stop_ids        ids that end an answer
    """

    def __init__(self, folder: str | Path, chat_template: str = "auto"):
        self.folder, choice = Path(folder), str(chat_template)
        config = read_json(self.folder / "tokenizer_config.json", optional=True)
        self._special = special_tokens(self.folder, config)
        self._backend = load_backend(self.folder, config, self._special)
        self.vocab_size = 1 + max(self.vocab().values(), default=-1)
        self.stop_ids = self._stop_ids = find_stop_ids(self.folder, self._special, self._backend, self.vocab_size)
        text, self._origin = find_template(self.folder, config, choice)
        self._template = None if text is None else compile_template(text, self._origin)
        self._template_file = None if choice in ("auto", "plain") else Path(choice)

    def vocab(self) -> dict[str, int]:
        """Token -> id, added tokens included, in the tokenizer's own spelling."""
        return self._backend.get_vocab(with_added_tokens=True)

    def description(self) -> dict:
        """tokenizer.json as it is in use, the declarations of tokenizer_config.json included; a fresh copy."""
        return json.loads(self._backend.to_str())

    def encode(self, text: str) -> list[int]:
        """Ids of the text as it stands: nothing is added, the text of a special token becomes that token."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special: bool = True) -> str:
        """Text of a list or 1-d tensor of ids; the ids of a model's padded rows have none."""
        return self._backend.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special)

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """The chat as text; `variables` (tools, enable_thinking ...) go to the template.

        UserError: misshapen messages; a template that refuses them, fails, or reaches out of its sandbox.
        """
        messages = checked_messages(messages)
        if self._template is None:
            if len(messages) > 1 or not isinstance(messages[0].get("content"), str):
                raise UserError(f"{self.folder} is used without a chat template: a prompt must be one text "
                                f"and not a chat of {len(messages)} messages; {OTHER_TEMPLATE}")
            return messages[0]["content"]
        variables = self._special | plain_data({"tools": None, "documents": None, **variables}, "variables")
        try:
            return self._template.render(**variables, messages=messages,
                                         add_generation_prompt=add_generation_prompt)
        except UserError as error:
            raise UserError(f"{self._origin} refuses this prompt: {one_line(error)}") from error
        except Exception as error:      # a template can fail in every way a program can
            why = ("reaches for Python internals or alters its input" if isinstance(error, SecurityError)
                   else "fails on this prompt")
            raise UserError(f"{self._origin} {why} ({type(error).__name__}: {one_line(error)}); correct the "
                            f"messages or {OTHER_TEMPLATE}") from error

    def prompt_ids(self, prompt: str | list[dict], **variables) -> list[int]:
        """Ids that ask for an answer. A text becomes one user message; without a template it gets the tokens
        that tokenizer.json itself adds (bos). A rendered chat gets none: its template wrote them."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = self.render(messages, **variables)
        return self._backend.encode(text, add_special_tokens=self._template is None).ids

    def save(self, folder: str | Path) -> None:
        """Copies the text-side files byte for byte. A template given by path becomes chat_template.jinja and
        stop_ids set by the caller go into generation_config.json, so that whoever loads the folder prompts
        and stops the model as it was here."""
        sources = {name: self.folder / name for name in TEXT_FILES}
        if self._template_file is not None:
            sources["chat_template.jinja"] = self._template_file
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, source in sources.items():
            target = Path(folder) / name
            if source.is_file() and source.resolve() != target.resolve():
                shutil.copyfile(source, target)
        if self.stop_ids != self._stop_ids:
            path = Path(folder) / "generation_config.json"
            ids = list(self.stop_ids) if len(self.stop_ids) > 1 else self.stop_ids[0]
            text = json.dumps(read_json(path, optional=True) | {"eos_token_id": ids}, indent=2)
            path.write_text(text + "\n", encoding="utf-8")
