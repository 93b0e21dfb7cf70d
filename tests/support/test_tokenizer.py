"""support/tokenizer.py: the same ids as transformers on four kinds of chat template, and what else a checkpoint's text
side is read for. What is refused: test_tokenizer_errors.py.

The tokenizers and the chats are those of tokenizer_folders.py. Only the parity tests need transformers; they are
skipped without it.
"""
import json
import sys
from datetime import datetime
from pathlib import Path

import pytest
from tokenizer_folders import CHATS, KINDS, SENTENCES, TOOLS, VARIABLES, a, changed, u, write
from tokenizers import Tokenizer as Backend

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.tokenizer import Tokenizer  # noqa: E402


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
