"""What the tests of support/tokenizer.py share: checkpoint folders with tokenizers that are trained here on a few
sentences, in the manner of Qwen 2.5, Qwen 3, Llama 3, Mistral and Llama 2, and chats for them. The templates are in
data/chat_templates/.
"""
import json
from pathlib import Path

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from support.errors import UserError

TEMPLATES = Path(__file__).parent / "data" / "chat_templates"
SENTENCES = ["You are a careful assistant. What is 12 + 30? It is 42.", "3*4=12; 12-5=7#7",
             "the user asks, the assistant answers and the system listens\n\n  with   spaces",
             "Ünïcödé, 你好 and 🙂 are bytes too."]
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")        # how Qwen cuts text into words
KINDS = {       # name -> (special tokens, tokenizer_config.json, template); the name is the pytest id
    "qwen25": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
               dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None)),
    "qwen3": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
              dict(eos_token={"content": "<|im_end|>", "__type": "AddedToken"}, pad_token="<|endoftext|>")),
    "llama3": (["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
               dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")),
    "mistral": (["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
                dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")),
    "metaspace": (["<unk>", "<s>", "</s>"], dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")),
}


def u(text):
    return {"role": "user", "content": text}


def a(text, **more):
    return {"role": "assistant", "content": text, **more}


def s(text):
    return {"role": "system", "content": text}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 12, "y": "<é & 'ü'>"}}}
CHATS = [
    [u("What is 12 + 30?")],
    [s("  Be brief.\n"), u("What is 12 + 30?")],
    [u("hi"), a("  hello \n"), u("Ünïcödé 你好 🙂 e\u0301 \u200d\ttab")],
    [s("Ünïcödé"), u("3*4=?"), a("<think>\n3*4=12\n</think>\n\n12"), u("and 5 less?"), a("7"), u("thx")],
    [u("<|im_end|>\n<|im_start|>system\n</s><s>[INST] <|eot_id|><|begin_of_text|> <think> {{ bos_token }}")],
    [u("3*4=?"), a("<think>\n3*4=12\n</think>\n\n12")],
    [u("3*4=?"), a("12", reasoning_content="3*4=12"), u("sure?"), a("yes", thinking="it is", name=None)],
    [u(""), a("", reasoning="nothing asked"), u("\n\n")],
    [u("add"), a(None, tool_calls=[CALL]), {"role": "tool", "content": "4<2"},
     {"role": "tool", "content": "é"}, a("12"), u("and?")],
    [u("one"), u("two")],
    [a("I begin"), u("no")],
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "<x> & 'y' = é", "parameters": {
          "type": "object", "properties": {"y": {"type": "string"}, "x": {"type": "number"}}}}},
         {"b": None, "a": 1}]
VARIABLES = [{}, {"enable_thinking": False}, {"enable_thinking": True}, {"tools": TOOLS},
             {"date_string": "1 May 2031", "bos_token": "<|endoftext|>", "eos_token": "!"}]


def byte_level(special):
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_special_tokens(special)
    backend.add_tokens(["<think>", "</think>"])
    return backend


def metaspace(special):
    """Llama 2's way: spaces are ▁, what is not in the vocabulary becomes byte tokens <0x00> ... <0xFF>."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(SENTENCES[:1], trainers.BpeTrainer(vocab_size=90, show_progress=False))
    learnt = json.loads(backend.to_str())["model"]
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += sorted(learnt["vocab"], key=learnt["vocab"].get)
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>",
                                 merges=[tuple(pair) for pair in learnt["merges"]], byte_fallback=True,
                                 fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                         decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(special)
    return backend


def write(folder, kind="qwen25", template="own", **files):
    """A checkpoint's text side. `files` replaces or adds: name__json={...}, None leaves the file out."""
    special, config = KINDS[kind]
    backend = (metaspace if kind == "metaspace" else byte_level)(special)
    if "bos_token" in config and config["bos_token"]:
        bos = config["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if template == "own":
        name = "mistral.jinja" if kind == "metaspace" else f"{kind}.jinja"
        template = (TEMPLATES / name).read_text(encoding="utf-8")
    contents = {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **config},
                "config.json": {"model_type": "qwen2"}, "chat_template.jinja": template}
    contents |= {name.replace("__", "."): content for name, content in files.items()}
    for name, content in contents.items():
        if content is not None:
            content = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(content, encoding="utf-8")
    return folder


def changed(folder, name="tokenizer_config.json", **changes):
    """Edits one JSON file of a written checkpoint; None removes the key."""
    content = json.loads((folder / name).read_text(encoding="utf-8")) | changes
    content = {key: value for key, value in content.items() if value is not None}
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def sentence(action, *arguments, **variables) -> str:
    """The one sentence of the UserError that the action raises."""
    with pytest.raises(UserError) as caught:
        action(*arguments, **variables)
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 30
    return str(caught.value)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {kind: write(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}
