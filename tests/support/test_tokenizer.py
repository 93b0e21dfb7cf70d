"""tokenizer.py: the same ids as transformers on four kinds of chat template, one sentence for every broken
checkpoint, and nothing executed.

The tokenizers are trained here on a few sentences; the templates in data/chat_templates/ are written for
these tests in the manner of Qwen 2.5, Qwen 3, Llama 3 and Mistral. Only the parity tests need transformers;
they are skipped without it.
"""
import json
import re
import sys
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.errors import UserError, read_json
from support.tokenizer import Tokenizer  # noqa: E402

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
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


# ---------------------------------------------------------------------------------------------- parity


def reference(folder, cls="PreTrainedTokenizerFast"):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, cls).from_pretrained(str(folder))


def both(ours, theirs, chat, **variables):
    """(ours, theirs) as (text, ids), or ("refused", message's words) where the template raises."""
    pair = []
    for render, ids in ((ours.render, ours.prompt_ids), (
            lambda chat, **v: theirs.apply_chat_template(chat, tokenize=False, **v),
            lambda chat, **v: theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **v))):
        try:
            pair.append((render(chat, **variables), ids(chat, **variables)))
        except Exception as error:
            pair.append(("refused", " ".join(str(error).split())))
    if pair[0][0] == pair[1][0] == "refused":
        assert pair[1][1] in pair[0][1]     # our sentence passes the template's own words on
        return "refused", "refused"
    return pair


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_text_and_ids_equal_transformers(checkpoints, kind):
    """fails if: trim_blocks or lstrip_blocks is off, tojson is jinja2's own, None-valued keys or reasoning
    names stay as they are, tools, documents or the special tokens are not given, or bos is added again."""
    ours, theirs = Tokenizer(checkpoints[kind]), reference(checkpoints[kind])
    compared = 0
    for chat in CHATS:
        for variables in VARIABLES:
            for prompt in (True, False):
                mine, other = both(ours, theirs, chat, add_generation_prompt=prompt, **variables)
                assert mine == other, (chat, variables, prompt)
                compared += mine != "refused"
    assert compared >= 40       # the templates refuse some chats, never most of them


def test_the_model_class_of_transformers_gives_the_same_ids(tmp_path):
    """fails if: encode adds special tokens, or normalisation is lost."""
    folder = changed(write(tmp_path), tokenizer_class="Qwen2Tokenizer")
    ours, theirs = Tokenizer(folder), reference(folder, "AutoTokenizer")
    assert type(theirs).__name__ == "Qwen2Tokenizer"
    for chat in CHATS:
        mine, other = both(ours, theirs, chat, add_generation_prompt=True)
        assert mine == other


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_template_the_ids_are_those_of_plain_text(tmp_path, kind):
    """fails if: prompt_ids without a template adds no bos, or reads the text as a chat."""
    folder = write(tmp_path, kind, template=None)
    ours, theirs = Tokenizer(folder), reference(folder)
    for text in SENTENCES + ["</s> <|im_end|><s>", "", " "]:
        assert ours.prompt_ids(text) == theirs(text)["input_ids"]
        assert ours.prompt_ids([u(text)]) == theirs(text)["input_ids"]
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            assert ours.decode(ours.prompt_ids(text), skip) == theirs.decode(theirs(text)["input_ids"], skip)
    bos = {"llama3": "<|begin_of_text|>", "mistral": "<s>", "metaspace": "<s>"}.get(kind)
    assert (ours.decode(ours.prompt_ids("x")[:1], skip_special=False) == bos) == (bos is not None)


def test_tokens_declared_in_tokenizer_config_are_read_as_by_transformers(tmp_path):
    """fails if: added_tokens_decoder is ignored, or is read in the order of its text keys."""
    declared = {str(i): dict(content=f"<t{i}>", special=i % 2 == 0, lstrip=i == 1004, rstrip=False,
                             normalized=False, single_word=False) for i in (1004, 999)}
    folder = changed(write(tmp_path), added_tokens_decoder=declared)
    ours, theirs = Tokenizer(folder), reference(folder)
    text = "12 <t999> 30 <t1004>x"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], True)
    assert ours.vocab_size == len(theirs) == Tokenizer(write(tmp_path / "without")).vocab_size + 2


def test_a_named_token_of_the_plain_vocabulary_is_matched_whole(tmp_path):
    """fails if: special tokens that only the vocabulary holds are not registered as special."""
    folder = write(tmp_path, template=None)
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    piece = max((p for p in vocabulary if p.isascii() and p.isalpha()), key=len)
    ours, theirs = Tokenizer(changed(folder, eos_token=piece)), reference(folder)
    text = f"x{piece}y"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], True) == "xy"
    assert ours.stop_ids == (vocabulary[piece],)


def test_special_tokens_map_counts_beside_an_old_tokenizer_config_only(tmp_path):
    """fails if: special_tokens_map.json is ignored, or wins over a tokenizer_config.json of today."""
    old = write(tmp_path, template="{{ bos_token }}|{{ eos_token }}",
                special_tokens_map__json={"bos_token": "<|endoftext|>",
                                          "eos_token": {"content": "<|im_start|>"}})
    assert Tokenizer(old).render([u("x")]) == "<|endoftext|>|<|im_start|>"
    ours, theirs = both(Tokenizer(old), reference(old), CHATS[0])
    assert ours == theirs
    new = changed(old, added_tokens_decoder={"0": {"content": "!"}})
    assert Tokenizer(new).render([u("x")]) == "|<|im_end|>"
    assert reference(new).apply_chat_template([u("x")], tokenize=False) == "|<|im_end|>"


# ------------------------------------------------------------------------------------------ the template


def test_chat_template_file_wins_over_tokenizer_config(tmp_path):
    """fails if: the order of the two places is swapped."""
    folder = changed(write(tmp_path, template="file"), chat_template="config")
    assert Tokenizer(folder).render([u("x")]) == "file"
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer(folder).render([u("x")]) == "config"


def test_the_default_of_a_template_list_is_taken(tmp_path):
    """fails if: the first entry of the list is taken."""
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    assert Tokenizer(changed(write(tmp_path, template=None), chat_template=named)).render([u("x")]) == "d"


def test_chat_template_argument_overrules_the_checkpoint(tmp_path):
    """fails if: "plain" still uses the template, or a given .jinja file is not used."""
    (tmp_path / "mine.jinja").write_text("<{{ messages[0].content }}>", encoding="utf-8")
    folder = write(tmp_path / "checkpoint")
    assert Tokenizer(folder, str(tmp_path / "mine.jinja")).render([u("é")]) == "<é>"
    assert Tokenizer(folder, tmp_path / "mine.jinja").prompt_ids("é") == Tokenizer(folder).encode("<é>")
    assert Tokenizer(folder, "plain").prompt_ids("12") == Tokenizer(folder).encode("12")


def test_a_text_prompt_is_one_user_message(checkpoints):
    """fails if: a text prompt is encoded without the template, or without its generation prompt."""
    tokenizer = Tokenizer(checkpoints["qwen25"])
    assert tokenizer.prompt_ids("hi") == tokenizer.prompt_ids([u("hi")])
    assert tokenizer.render([u("hi")]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer.prompt_ids("hi"), skip_special=False) == tokenizer.render([u("hi")])


def test_strftime_now_is_the_clock(tmp_path):
    """fails if: strftime_now is missing or returns a constant."""
    tokenizer = Tokenizer(write(tmp_path, template="{{ strftime_now('%Y-%j') }}"))
    before = datetime.now()
    assert tokenizer.render([u("x")]) in {moment.strftime("%Y-%j") for moment in (before, datetime.now())}


def test_generation_blocks_keep_their_assignments_to_themselves(tmp_path):
    """fails if: the generation tag is unknown, or its body is rendered without a scope of its own."""
    template = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    folder = write(tmp_path, template=template)
    assert Tokenizer(folder).render([u("x")]) == "21"
    assert reference(folder).apply_chat_template([u("x")], tokenize=False) == "21"


def test_tojson_takes_the_arguments_of_transformers(tmp_path):
    """fails if: an argument is dropped or renamed, or non-ASCII is escaped by default."""
    template = ("{{ tools | tojson }} {{ tools | tojson(ensure_ascii=true) }} {{ tools | tojson(indent=1) }} "
                "{{ tools | tojson(separators=(',', ':')) }} {{ tools | tojson(sort_keys=true) }}")
    folder = write(tmp_path, template=template)
    ours, theirs = both(Tokenizer(folder), reference(folder), [u("x")], tools=TOOLS)
    assert ours == theirs and "é" in ours[0] and "\\u00e9" in ours[0]


def test_rendering_leaves_the_callers_messages_alone(checkpoints):
    """fails if: None-valued keys or reasoning aliases are edited in place."""
    chat = [u("x"), a("12", reasoning="3*4", tool_calls=None), u("y")]
    before = json.dumps(chat)
    Tokenizer(checkpoints["qwen3"]).render(chat)
    assert json.dumps(chat) == before


# -------------------------------------------------------------------------------------- ids and stopping


def test_encode_adds_nothing_and_reads_special_tokens(checkpoints):
    """fails if: encode adds bos, or decode keeps special tokens by default."""
    tokenizer = Tokenizer(checkpoints["llama3"])
    eot = tokenizer.stop_ids[0]
    ids = tokenizer.encode("12<|eot_id|>")
    assert ids == tokenizer.encode("12") + [eot]
    assert tokenizer.decode(ids) == "12" and tokenizer.decode(ids, skip_special=False) == "12<|eot_id|>"


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_survives_encode_and_decode(checkpoints, kind):
    """fails if: decode drops added tokens that are not special, or cleans up spaces."""
    tokenizer = Tokenizer(checkpoints[kind])
    for text in SENTENCES + ["<think>\n3 * 4 , 12 .\n</think>", "it 's n't"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_vocab_size_counts_added_tokens_and_no_padding_row(checkpoints):
    """fails if: vocab_size or vocab() is the base vocabulary's, or vocab_size is read from config.json."""
    tokenizer = Tokenizer(checkpoints["qwen25"])
    assert tokenizer.encode("</think>") == [tokenizer.vocab_size - 1] == [tokenizer.vocab()["</think>"]]
    assert tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size - 1]) == "</think>"


def test_a_gap_in_the_ids_does_not_shrink_vocab_size(tmp_path):
    """fails if: vocab_size is the number of tokens instead of 1 + the largest id."""
    folder = write(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["zzzz"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert Tokenizer(folder).vocab_size >= 5001


def test_limits_saved_in_tokenizer_json_do_not_cut_or_pad(tmp_path):
    """fails if: no_truncation() or no_padding() is left out."""
    folder = write(tmp_path)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    plain = Tokenizer(write(tmp_path / "plain"))
    for text in (SENTENCES[0], "x"):
        assert Tokenizer(folder).prompt_ids(text) == plain.prompt_ids(text)


@pytest.mark.parametrize("generation, config, expected", [
    ([3, 2, 3], 5, (3, 2)), (4, 5, (4,)), (None, 5, (5,)), (None, [7, 6], (7, 6)), ([], 0, (0,)),
    (None, None, None)])
def test_stop_ids_come_from_generation_config_then_config_then_eos(tmp_path, generation, config, expected):
    """fails if: the order of the three places changes, id 0 counts as none, or the list order is lost."""
    folder = write(tmp_path, generation_config__json={"eos_token_id": generation},
                   config__json={"eos_token_id": config})
    tokenizer = Tokenizer(folder)
    assert tokenizer.stop_ids == (expected or tuple(tokenizer.encode("<|im_end|>")))


def test_save_copies_every_text_file_byte_for_byte(tmp_path):
    """fails if: a file is left out, rewritten through a JSON library, or the weights are copied too."""
    folder = write(tmp_path / "from")
    for name in ("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
                 "tokenizer.model", "generation_config.json", "model.safetensors"):
        (folder / name).write_bytes(b'{ "eos_token" :"<|im_end|>"}\r\n')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    Tokenizer(folder).save(tmp_path / "new" / "to")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "new" / "to").iterdir()}
    assert saved.keys() == before.keys() - {"config.json", "model.safetensors"} and len(saved) == 10
    assert all(before[name] == content for name, content in saved.items())
    Tokenizer(folder).save(folder)      # onto itself: nothing is lost
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_saved_folder_prompts_as_the_run_did(tmp_path):
    """fails if: a chat template given by path is not saved with the checkpoint."""
    (tmp_path / "mine.jinja").write_text("<{{ messages[0].content }}>", encoding="utf-8")
    tokenizer = Tokenizer(write(tmp_path / "from"), str(tmp_path / "mine.jinja"))
    tokenizer.save(tmp_path / "to")
    assert Tokenizer(tmp_path / "to").prompt_ids("hi") == tokenizer.prompt_ids("hi")


# ---------------------------------------------------------------------------------------- error sentences


def test_a_missing_folder_or_tokenizer_json_is_named(tmp_path):
    """fails if: tokenizers' own error comes through, or the sentence does not tell folder from file."""
    assert re.match(r"\S+nowhere does not exist; give a", sentence(Tokenizer, tmp_path / "nowhere"))
    assert re.match(r"\S+tokenizer\.json does not exist; give a", sentence(Tokenizer, tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_json_is_named(tmp_path, content):
    """fails if: the bare Exception of the tokenizers library is not caught."""
    (write(tmp_path) / "tokenizer.json").write_bytes(content)
    assert re.search(r"tokenizer\.json is broken \(.+\); download it again", sentence(Tokenizer, tmp_path))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json",
                                  "special_tokens_map.json"])
def test_broken_json_is_named_with_its_line(tmp_path, name):
    """fails if: json's own error comes through, or the file or line is not in the sentence."""
    (write(tmp_path) / name).write_text('{"a": 1,\n "b" 2}', encoding="utf-8")
    assert re.search(rf"{name} is not JSON \(.*line 2 .*\); download or write", sentence(Tokenizer, tmp_path))


def test_read_json_wants_an_object_in_a_readable_file(tmp_path):
    """fails if: a list passes, a missing file counts as empty, or bytes that are no UTF-8 raise."""
    path = tmp_path / "x.json"
    assert "x.json cannot be read (No such file" in sentence(read_json, path)
    for content, words in ((b"[1]", "holds a JSON list, not an object"), (b"\xff", "is not JSON"),
                           (b"[" * 100_000, "is not JSON")):
        path.write_bytes(content)
        assert re.search(rf"x\.json {words}", sentence(read_json, path))
    path.write_text('{"é": [1]}', encoding="utf-8")
    assert read_json(path) == {"é": [1]} and read_json(tmp_path / "none.json", optional=True) == {}


def test_a_broken_token_declaration_is_named(tmp_path):
    """fails if: a malformed added_tokens_decoder raises, or a special token that is no text passes."""
    folder = changed(write(tmp_path), added_tokens_decoder={"5": "<x>"})
    assert "tokenizer_config.json is broken" in sentence(Tokenizer, folder)
    folder = changed(write(tmp_path), bos_token=["<s>"])
    assert "bos_token must be a text, not ['<s>']" in sentence(Tokenizer, folder)


@pytest.mark.parametrize("template, words", [
    ("ok\n{% if %}", "line 2: "), ("{{ 'open }}", "line 1: "), ("{% endfor %}", "line 1: "),
    ("{{ 1 | nofilter }}", "line 1: No filter named"), ("{% break %}", "'break' outside loop")])
def test_a_template_that_is_no_template_is_named_with_its_line(tmp_path, template, words):
    """fails if: the template is compiled at the first prompt only, or jinja2's own error comes through."""
    folder = write(tmp_path, template=template)
    assert re.search(rf"chat_template\.jinja.*{words}.*correct it or give", sentence(Tokenizer, folder))
    folder = changed(write(tmp_path, template=None, chat_template__jinja=None), chat_template=template)
    (folder / "chat_template.jinja").unlink()
    assert re.search(r"^chat_template in \S+tokenizer_config\.json.*: ", sentence(Tokenizer, folder))


def test_a_chat_template_argument_that_is_no_file_is_refused(checkpoints, tmp_path):
    """fails if: an unknown word counts as "auto", or a missing file means the checkpoint's template."""
    folder = checkpoints["qwen25"]
    assert "'chatml' must be 'auto', 'plain' or the path of" in sentence(Tokenizer, folder, "chatml")
    assert "'auto', 'plain' or" in sentence(Tokenizer, folder, str(folder / "config.json"))
    missing = sentence(Tokenizer, folder, str(tmp_path / "none.jinja"))
    assert "none.jinja cannot be read" in missing and "give another chat template" in missing
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    assert "bytes.jinja cannot be read" in sentence(Tokenizer, folder, tmp_path / "bytes.jinja")


@pytest.mark.parametrize("found", [7, {"default": 7}, [{"name": "rag", "template": "r"}], ["x"],
                                   [{"name": "default", "template": 1}]])
def test_a_chat_template_entry_of_the_wrong_kind_is_refused(tmp_path, found):
    """fails if: a list without a default counts as no template: it would train on plain text, silently."""
    folder = changed(write(tmp_path, template=None), chat_template=found)
    assert "tokenizer_config.json is neither a text nor a list with" in sentence(Tokenizer, folder)


def test_the_words_of_raise_exception_are_passed_on(checkpoints):
    """fails if: the template's own message or the template's file is missing from the sentence."""
    said = sentence(Tokenizer(checkpoints["mistral"]).render, [a("first")])
    assert re.match(r"\S+chat_template\.jinja refuses this prompt: roles must go user, .* after an opt", said)


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__ }}", "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}", "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ raise_exception.__globals__.json }}", "{{ strftime_now.__globals__['shutil'] }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}", "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
    "{{ namespace(__call__=1) }}", "{{ namespace({'__call__': 1}) }}", "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}"])
def test_a_template_that_leaves_its_sandbox_is_stopped(tmp_path, template):
    """fails if: jinja2's plain Environment, its mutable sandbox or its own namespace is used."""
    said = sentence(Tokenizer(write(tmp_path, template=template)).render, [u("x")])
    assert re.search(r"chat_template\.jinja (reaches for Python internals|fails on this prompt)", said)
    assert "SecurityError" in said


@pytest.mark.parametrize("template", ["{% include '/etc/hostname' %}", "{% import 'os' as os %}"])
def test_a_template_cannot_read_files(tmp_path, template):
    """fails if: the environment gets a loader."""
    assert "fails on this prompt" in sentence(Tokenizer(write(tmp_path, template=template)).render, [u("x")])


@pytest.mark.parametrize("template", [
    "{{ nothing.at.all }}", "{{ 1 + 'a' }}", "{{ 1 // 0 }}", "{{ range(10 ** 9) }}",
    "{{ raise_exception | tojson }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"])
def test_a_template_that_fails_is_one_sentence(tmp_path, template):
    """fails if: only jinja2's errors are caught (not TypeError, OverflowError, RecursionError ...)."""
    said = sentence(Tokenizer(write(tmp_path, template=template)).render, [u("x")])
    assert re.search(r"chat_template\.jinja fails on this prompt \(\w+: .*give another chat template", said)


@pytest.mark.parametrize("messages, words", [
    ([], "non-empty list"), ("hi", "non-empty list"), (None, "non-empty list"), (u("x"), "non-empty list"),
    (["hi"], "message 1"), ([u("x"), {"content": "y"}], "message 2"), ([u(None)], "message 1"),
    ([u("x"), {"role": "user"}], "message 2"), ([{"role": 1, "content": "x"}], "message 1"),
    ([u(3)], "message 1"),
    ([[u("x")]], "message 1"), ([u(b"x")], "plain JSON data"), ([u("\ud800")], "plain JSON data"),
    ([u("x") | {"t": {1}}], "plain JSON data")])
def test_misshapen_messages_are_described(checkpoints, messages, words):
    """fails if: a message without role or content reaches the template, or a batch of chats counts as one."""
    assert words in sentence(Tokenizer(checkpoints["qwen25"]).render, messages)


def test_variables_that_are_no_plain_data_are_refused(checkpoints):
    """fails if: live Python objects reach the template."""
    said = sentence(Tokenizer(checkpoints["qwen25"]).render, [u("x")], tools=[open])
    assert said.startswith("variables must be plain JSON data")


def test_a_chat_without_a_template_is_refused(tmp_path):
    """fails if: the contents of several messages are joined in a format that nobody chose."""
    tokenizer = Tokenizer(write(tmp_path, template=None))
    for chat in (CHATS[1], [u([{"type": "text", "text": "x"}])]):
        assert re.search(r"without a chat template.*give another", sentence(tokenizer.prompt_ids, chat))


def test_a_missing_stop_token_says_what_to_add(tmp_path):
    """fails if: stop_ids may be empty, or an eos token outside the vocabulary is passed over."""
    folder = changed(write(tmp_path), eos_token=None)
    assert "add eos_token_id (a number or a list) to generation_config.json" in sentence(Tokenizer, folder)
    folder = changed(folder, eos_token="<|stop|>")
    assert re.search(r"tokenizer_config\.json: eos_token '<\|stop\|>' is not in the vocabulary; correct it",
                     sentence(Tokenizer, folder))


@pytest.mark.parametrize("eos", [100_000, -1, "2", True, 2.0, [1, None]])
def test_a_stop_id_that_is_no_token_is_refused(tmp_path, eos):
    """fails if: an id that can never be sampled counts as a stop id."""
    folder = write(tmp_path, generation_config__json={"eos_token_id": eos})
    assert re.search(r"generation_config\.json: eos_token_id .* is no token of .*correct it",
                     sentence(Tokenizer, folder))
