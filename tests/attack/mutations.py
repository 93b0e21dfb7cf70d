"""Mutations: what a stranger's file may hold. Each function of KINDS breaks one thing in a copy of the tiny world and
says what it did; see inputs.py.

A mutation is number `index` of its kind. Where there is a table (every key with every odd value), the first numbers
walk through it in an order that --seed shuffles; later ones are random.
"""
import contextlib
import json
import os
import random
import shutil
import socket
import struct
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

FIVE = 5000
# as JSON text, so that NaN, endless numbers and lone surrogates can be written at all
ODD = ["null", "true", "false", "0", "-1", "1", "2", "3", "7", "64", "1.5", "0.1", "-0.0", "1e400", "-1e400", "NaN",
       "Infinity", "-Infinity", "1e308", "1e-308", "1e-30", "1e30", "1000000", "1000000000", "2147483648",
       "9223372036854775807", "9223372036854775808", "1" + "0" * 400, "1" + "0" * FIVE, '""', '"8"', '"x"',
       '"\\ud800"', '"\\u0000"', '"é\\n"', f'"{"x" * FIVE}"', "[]", "[1]", "[[]]", "{}", '{"a": 1}', "[null]",
       "[" * FIVE + "]" * FIVE, "[" * 200 + "]" * 200]
NOT_FINITE = {"1e400", "-1e400", "NaN", "Infinity", "-Infinity"}
USED = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "rms_norm_eps rope_theta max_position_embeddings tie_word_embeddings").split()
SOMETIMES = ("model_type sliding_window use_sliding_window attention_bias mlp_bias hidden_act quantization_config "
             "torch_dtype dtype eos_token_id bos_token_id pad_token_id layer_types max_window_layers architectures "
             "rope_scaling rope_parameters partial_rotary_factor initializer_range auto_map attention_dropout").split()
ROPE = {"linear": ("factor", "rope_theta", "rope_type", "type"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "rope_type"),
        "default": ("rope_theta", "partial_rotary_factor", "rope_type")}


@dataclass
class Case:
    what: str                                       # what was done, in words
    flags: dict = field(default_factory=dict)       # that change the tiny run
    argv: list = field(default_factory=list)        # that are appended as they are
    not_finite: bool = False                        # a number in use is NaN or infinite: it may not be accepted
    outside: bool = False                           # told to write somewhere else: may try
    kept: list = field(default_factory=list)        # (path, bytes) that must still be there


def short(text) -> str:
    text = ascii(str(text))[1:-1]
    return text if len(text) < 70 else f"{text[:50]}... ({len(text)} characters)"


def pick(table: list, index: int, seed: int):
    """Row `index` of a shuffled table, or None past its end."""
    return random.Random(seed).sample(table, len(table))[index] if index < len(table) else None


class Raw(str):
    """JSON text that stands in a tree as it is."""


def dump(tree) -> str:
    found = []

    def hide(node):
        if isinstance(node, Raw):
            found.append(node)
            return f"@@{len(found) - 1}@@"
        if isinstance(node, dict):
            return {key: hide(value) for key, value in node.items()}
        return [hide(value) for value in node] if isinstance(node, list) else node
    text = json.dumps(hide(tree))
    for number, raw in reversed(list(enumerate(found))):
        text = text.replace(f'"@@{number}@@"', raw)
    return text


def nodes(tree, path=()) -> list[tuple]:
    """Paths of all parts of a tree, at most 40 of every list or dictionary."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] + [found for key, value in list(items)[:40] for found in nodes(value, (*path, key))]


def disturb(tree, rng: random.Random) -> tuple:
    """(a tree in which one part is replaced, removed, renamed or wrapped; what was done)."""
    tree = json.loads(json.dumps(tree))
    paths = nodes(tree)[1:]
    if not paths:
        return Raw(rng.choice(ODD)), "all of it replaced"
    path = rng.choice(paths)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    place, way = "/".join(map(str, path)), rng.choice(("odd", "odd", "odd", "remove", "rename", "wrap", "double"))
    if way == "odd":
        parent[path[-1]] = Raw(value := rng.choice(ODD))
        return tree, f"{place} = {short(value)}"
    if way == "remove":
        del parent[path[-1]]
    elif way == "rename" and isinstance(parent, dict):
        parent[rng.choice(("", "x", "Ａ", str(path[-1]).upper()))] = parent.pop(path[-1])
    elif way == "wrap":
        parent[path[-1]] = [parent[path[-1]]]
    elif isinstance(parent, list):
        parent.append(parent[path[-1]])
    else:
        parent[path[-1]] = {"": parent[path[-1]]}
    return tree, f"{way} {place}"


# Files as such

def spoil(path: Path, rng: random.Random, name: str = "") -> str:
    """Something else lies where a file is expected, or its bytes are not what they were."""
    data = path.read_bytes() if path.is_file() else b""
    way = name or rng.choice(SPOILS)
    if way in ("flip", "flip many") and data:
        changed = bytearray(data)
        for _ in range(1 if way == "flip" else 20):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
    elif way == "cut" and data:
        path.write_bytes(data[:rng.randrange(len(data))])
    elif way == "hole" and data:
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes(min(100, len(data) - at)) + data[at + 100:])
    elif way in CONTENTS:
        path.write_bytes(CONTENTS[way](data))
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        {"missing": lambda: None, "folder": path.mkdir, "pipe": lambda: os.mkfifo(path),
         "socket": lambda: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),
         "link to itself": lambda: path.symlink_to(path.name), "link to nothing": lambda: path.symlink_to("nothing"),
         "link to a folder": lambda: path.symlink_to("."), "link to zeros": lambda: path.symlink_to("/dev/zero"),
         "link to the system": lambda: path.symlink_to("/etc/passwd")}.get(way, lambda: None)()
    return f"{path.parent.name}/{path.name}: {way}"


CONTENTS = {
    "empty": lambda data: b"", "zeros": lambda data: bytes(len(data)), "twice": lambda data: data + data,
    "utf-16": lambda data: data.decode(errors="replace").encode("utf-16"), "mark": lambda data: b"\xef\xbb\xbf" + data,
    "not utf-8": lambda data: data[:9] + b"\xff\xfe" + data[9:], "nul": lambda data: data + b"\0",
    "a list": lambda data: b"[" + data + b"]", "a number": lambda data: b"7", "null": lambda data: b"null",
    "deep": lambda data: b"[" * 10**5, "deep objects": lambda data: b'{"a":' * 10**5,
    "random": lambda data: random.Random(len(data)).randbytes(1000), "long": lambda data: data + b" " * 10**7,
    "windows": lambda data: data.replace(b"\n", b"\r\n"), "gzip": lambda data: b"\x1f\x8b\x08\0" + data,
    "parquet": lambda data: b"PAR1" + data + b"PAR1", "pickle": lambda data: b"\x80\x04cos\nsystem\n."}
SPOILS = ("flip", "flip many", "cut", "hole", *CONTENTS, "missing", "folder", "pipe", "socket", "link to itself",
          "link to nothing", "link to a folder", "link to zeros", "link to the system")


# Checkpoints

def config(place: Path, index: int, rng: random.Random, seed: int) -> Case:
    table = list(product(("student", "teacher"), (*USED, *SOMETIMES), ODD))
    table += [(side, f"{kind}.{key}", value) for side, (kind, keys), value
              in product(("student", "teacher"), ROPE.items(), ODD) for key in keys]
    row = pick(table, index, seed)
    side, key, value = row or (rng.choice(("student", "teacher")), "", "")
    path = place / side / "config.json"
    tree = json.loads(path.read_text())
    if not row and rng.random() < 0.2:
        return Case(spoil(path, rng))
    if not row:
        for _ in range(rng.choice((1, 2, 3))):
            key = rng.choice((*USED, *SOMETIMES))
            tree[key] = Raw(rng.choice(ODD))
    elif "." in key:
        kind, inner = key.split(".")
        rope = {name: 8.0 for name in ROPE[kind]} | {"rope_type": kind, "rope_theta": 10000.0, "low_freq_factor": 1.0,
                                                     "partial_rotary_factor": 1.0}
        tree.pop("rope_theta", None)
        tree[rng.choice(("rope_scaling", "rope_parameters"))] = {
            name: item for name, item in rope.items() if name in (*ROPE[kind], "rope_theta", "rope_type")} | {
            inner: Raw(value)}
    else:
        tree[key] = Raw(value)
    path.write_text(dump(tree))
    in_use = row is not None and value in NOT_FINITE and (key in USED or "." in key and "factor" in key)
    return Case(f"{side}/config.json: {key} = {short(value)}", not_finite=in_use)


def read_tensors(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + size]), data[8 + size:]


def write_tensors(path: Path, header: str, body: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + body)


def weights(place: Path, index: int, rng: random.Random, seed: int) -> Case:
    side = rng.choice(("student", "teacher"))
    path = place / side / "model.safetensors"
    header, body = read_tensors(path)
    name = rng.choice([key for key in header if key != "__metadata__"])
    way = rng.choice(("spoil", "header", "value", "value", "dtype", "remove", "add", "size", "shuffle"))
    if way == "spoil":
        return Case(spoil(path, rng))
    if way == "value":
        kind = rng.choice(("nan", "inf", "-inf", "3e38", "0", "-1e30", "1e-45"))
        numbers = bytearray(body)
        begin, end = header[name]["data_offsets"]
        for at in range(begin, end, 4) if rng.random() < 0.5 else [begin]:
            numbers[at:at + 4] = struct.pack("<f", float(kind))
        write_tensors(path, json.dumps(header), bytes(numbers))
        return Case(f"{side}: {name} holds {kind}", not_finite=kind in ("nan", "inf", "-inf"))
    if way == "size":
        size = rng.choice((0, 1, 7, 10**6, 2**31, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
        return Case(f"{side}: header of {size} bytes")
    if way == "header":
        header, what = disturb(header, rng)
    elif way == "dtype":
        header[name]["dtype"] = what = rng.choice(("F64", "F16", "BF16", "I32", "U8", "F8_E4M3", "C64", "", "f32"))
    elif way == "remove":
        del header[name]
        what = f"without {name}"
    elif way == "add":
        new = rng.choice(("extra", "", "lm_head.weight", "model.layers.7.x", "../x", "x" * FIVE, "a.inv_freq"))
        header[new], what = header[name], f"{name} again as {short(new)}"
    else:
        names = [key for key in header if key != "__metadata__"]
        values = rng.sample([header[key] for key in names], len(names))
        header, what = dict(zip(names, values)), "tensors under other names"
    write_tensors(path, dump(header), body)
    return Case(f"{side}: header {what}")


def shards(place: Path, index: int, rng: random.Random, seed: int) -> Case:
    """model.safetensors.index.json, with one shard that has another name."""
    side = rng.choice(("student", "teacher"))
    folder = place / side
    shard = folder / "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(shard)
    header, _ = read_tensors(shard)
    tree = {"metadata": {"total_size": 1}, "weight_map": {key: shard.name for key in header if key != "__metadata__"}}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(tree))
    if rng.random() < 0.25:
        return Case(spoil(rng.choice((path, shard)), rng))
    if rng.random() < 0.3:
        tree, what = disturb(tree, rng)
    else:
        names = ["../student/x.safetensors", "a" * 300 + ".safetensors", "a" * FIVE, "/etc/passwd", ".", "", "..",
                 "x.bin", "\0.safetensors", "\udc80.safetensors", "model.safetensors", "pipe.safetensors",
                 "folder.safetensors", "~/x.safetensors", "a/b.safetensors", 7, None, [], {}, 1e400]
        what = rng.choice(names)
        os.mkfifo(folder / "pipe.safetensors")
        (folder / "folder.safetensors").mkdir()
        for key in rng.sample(sorted(tree["weight_map"]), rng.choice((1, len(tree["weight_map"])))):
            tree["weight_map"][key] = what
    path.write_text(dump(tree))
    return Case(f"{side}: index {short(what)}")


TOKENIZER_CONFIG = {
    "bos_token": "<|user|>", "eos_token": {"content": "<|end|>", "lstrip": False, "special": True}, "pad_token": None,
    "chat_template": "{{ messages[0].content }}", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64,
    "added_tokens_decoder": {"17": {"content": "<|end|>", "special": True, "lstrip": False, "rstrip": False,
                                    "normalized": False, "single_word": False}},
    "additional_special_tokens": ["<|user|>"], "add_bos_token": False, "add_prefix_space": False}
TEXTS = {       # file -> what it holds, if the tiny world has no such file
    "tokenizer.json": None, "generation_config.json": None, "tokenizer_config.json": TOKENIZER_CONFIG,
    "special_tokens_map.json": {"eos_token": "<|end|>", "bos_token": {"content": "<|user|>"}},
    "added_tokens.json": {"<|end|>": 17}, "vocab.json": {"0": 0}, "vocab.txt": {}, "merges.txt": {}}


def texts(place: Path, index: int, rng: random.Random, seed: int) -> Case:
    """The files of the tokenizer and generation_config.json."""
    side = rng.choice(("student", "student", "teacher"))
    name = rng.choice((*TEXTS, "tokenizer.json", "tokenizer_config.json"))
    path = place / side / name
    if not path.exists():
        path.write_text(json.dumps(TEXTS[name]))
    if name == "generation_config.json" and rng.random() < 0.7:
        value = rng.choice((*ODD, "[1, 2, 17]", "[17, 17]", "[1.0]", "[true]", "19", "20", "24", "-17"))
        path.write_text('{"eos_token_id": ' + value + "}")
        return Case(f"{side}/{name}: eos_token_id {short(value)}", not_finite=value in NOT_FINITE)
    if rng.random() < 0.3:
        return Case(spoil(path, rng))
    tree, what = json.loads(path.read_text()), []
    for _ in range(rng.choice((1, 1, 2, 4))):
        with contextlib.suppress(TypeError, ValueError):        # two of them may meet in one place
            tree, done = disturb(tree, rng)
            what.append(done)
    path.write_text(dump(tree))
    return Case(f"{side}/{name}: {'; '.join(what)}")


# Problems

LAYOUTS = [
    {"problem": "1+2?", "answer": "3", "solution": "1+2=3", "kind": "low"}, {"question": "1+2?", "answer": "=3 #### 3"},
    {"prompt": [{"role": "user", "content": "1+2?"}], "reward_model": {"ground_truth": "3", "style": "rule"}},
    {"conversations": [{"from": "human", "value": "1+2?"}, {"from": "gpt", "value": "3"}]},
    {"instruction": "1+2?", "input": "", "output": "3"}, {"prompt": "1+2?", "completion": "3"},
    {"Problem": "1+2?", "Answer": "3"}, {"prompt": "1+2?", "answer": ["3", "4"]},
    {"messages": [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3"}]},
    {"prompt": [{"role": "user", "content": "1+2?"}], "completion": [{"role": "assistant", "content": "3"}]}]


def data(place: Path, index: int, rng: random.Random, seed: int) -> Case:
    name = rng.choice(("train", "test"))
    path, layout = place / f"{name}.jsonl", rng.choice(LAYOUTS)
    flags = rng.choice(({}, {}, {"recipe": "sft"}, {"privileged": "solution"}, {"recipe": "grpo", "teacher": "none",
                                                                                "problems": 1, "samples": 2}))
    if rng.random() < 0.25:
        ending = rng.choice((".jsonl", ".jsonl", ".json", ".parquet", ".JSONL", ".csv", "", ".gz"))
        path = shutil.move(path, path.with_suffix(ending))
        return Case(spoil(path, rng), flags | {"data" if name == "train" else "eval_data": path})
    lines, what = [], []
    for _ in range(rng.choice((1, 2, 4))):
        tree, done = disturb(layout, rng)
        lines.append(dump(tree))
        what.append(done)
    good = [json.dumps(layout)] * 2
    text = "\n".join(rng.sample(good + lines, len(good + lines))) + "\n"
    if rng.random() < 0.1:
        text = "[" + ",".join(good + lines) + "]"
    path.write_text(text)
    # past --eval_limit no line is read, and so none is judged
    flags = flags | {"eval_limit": 0}
    return Case(f"{path.name}: {short(json.dumps(layout))} with {'; '.join(what)}", flags,
                not_finite=any(line.count(value) for line in lines for value in NOT_FINITE
                               for key in ("answer", "solution") if f'"{key}": {value}' in line))


KINDS = {"config": config, "weights": weights, "shards": shards, "texts": texts, "data": data}
