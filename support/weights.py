"""Weights: a checkpoint in Hugging Face's layout, from a folder or the hub, into a Transformer. Transformer.save is the
way back.

A strict copy: every tensor of the files fills exactly one parameter, and whatever does not fit is named in one
sentence.
"""
import contextlib
import os
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import MODELS, Transformer
from support.errors import UserError, one_line, shown
from support.extras import load_extras, offers
from support.files import checkpoint_file, checkpoint_json
from support.model_config import ModelConfig
from support.saving import all_finite

DISK_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LONGEST_HEADER = 2**23      # bytes; 50 times what the largest model needs, and still read in seconds
DAMAGE = (SafetensorError, OSError, ValueError, OverflowError, MemoryError, RuntimeError)   # the last: no room to map
INDEX = "model.safetensors.index.json"
SMALL_FILES = ["*.json", "*.jinja"]     # config, tokenizer, stop ids, chat template: all that is needed before weights


def checkpoint_folder(name: str, weights: bool = True) -> Path:
    """A folder as it is; anything that looks like `owner/name` is downloaded from the hub (safetensors and json files
    and the chat template only: nothing that could be executed; without `weights` the small files only). Extras know
    other names."""
    for known in offers("served_folder"):
        if folder := known(name):
            return folder
    folder = Path(os.path.expanduser(name))     # os.path: any name at all is looked up without an exception
    if os.path.isdir(folder):
        if (folder / "last").is_dir() and not (folder / "tokenizer.json").exists():
            raise UserError(f"{shown(name)} is the folder of a run; its checkpoints are {shown(folder / 'last')} and "
                            f"{shown(folder / 'best')}")
        return folder
    if os.path.lexists(folder):
        raise UserError(f"{shown(name)} is a file; a model is given as its folder or as a hub id")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or os.path.isdir(name.partition("/")[0]):
        raise UserError(f"no such folder: {shown(name)}; give a folder with config.json and *.safetensors, or a hub "
                        f"id owner/name")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors"] * weights + SMALL_FILES,
                                      ignore_patterns=["consolidated*", "*/*"]))    # second copies in other layouts
    except Exception as error:      # the hub client raises a dozen kinds; its first line says which
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{shown(name)} is no folder here and could not be downloaded from the hub: "
                        f"{shown(reason)}") from error


def load_config(folder: str | Path) -> ModelConfig:
    load_extras()       # some of them bring families
    return ModelConfig.from_dict(checkpoint_json(folder, "config.json"), shown(Path(folder) / "config.json"))


def load_model(folder: str | Path, *, dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None,
               device: torch.device | str = "cpu") -> Transformer:
    """The checkpoint in `folder`, stored as `dtype` on `device`, multiplying in compute_dtype (default: dtype).

    Every tensor of the files fills exactly one parameter; a missing, extra, repeated or wrongly shaped one is a
    UserError that names it, before any memory is taken. Peak memory: the model and one tensor. Of a folder whose
    weights are elsewhere an extra knows the model.
    """
    for known in offers("served_model"):
        if served := known(Path(folder), compute_dtype or dtype, device):
            return served
    config = load_config(folder)
    with torch.device("meta"):          # shapes without memory: config.json may ask for more than there is
        model = MODELS[config.model_type](config, compute_dtype or dtype).to(dtype)
    tensors_of, dtypes = match_files(Path(folder), model)
    try:
        model.to_empty(device=device)
    except RuntimeError as error:       # of which torch's OutOfMemoryError is one
        size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        raise UserError(f"{shown(folder)}: there is no room for {size / 2**30:.1f} GiB of weights on {device} "
                        f"({shown(str(error).splitlines()[0])}); take a smaller model or a larger machine") from error
    parameters, tied_copy = model.on_disk(model.weights()), None
    for file, names in tensors_of.items():
        with opened(file) as tensors:
            for theirs, name in names.items():
                if name == HEAD and config.tie_word_embeddings:
                    tied_copy = tensors.get_tensor(theirs)
                else:
                    fill(parameters[name], tensors.get_tensor(theirs), theirs, file)
    if tied_copy is not None and not torch.equal(tied_copy.to(dtype), model.head_weight().detach().cpu()):
        raise UserError(f"{shown(folder)}: {HEAD} differs from the embedding although config.json ties them")
    model.disk_dtype = dtypes.most_common(1)[0][0]
    for faster in offers("on_model"):
        faster(model)
    return model.eval()


def match_files(folder: Path, model: Transformer) -> tuple[dict[Path, dict[str, str]], Counter]:
    """Compare the headers of the files with the shapes that config.json asks for. Returns which tensors each file
    gives ({name in the file: name in model.on_disk()}), and how many have each dtype. A tied model may bring a copy of
    its embedding as the head."""
    shapes, tied = {name: list(p.shape) for name, p in model.on_disk(model.weights()).items()}, False
    if model.config.tie_word_embeddings:
        shapes[HEAD], tied = shapes[EMBEDDING], True
    missing, tensors_of, dtypes, left_out = set(shapes), {}, Counter(), Counter()
    for file in weight_files(folder):
        with opened(file) as tensors:
            tensors_of[file] = {}
            for theirs in tensors.keys():
                if (name := model.from_disk(theirs)) is None:
                    part = theirs.removeprefix("model.").split(".")[0]
                    left_out[part] += not theirs.endswith("rotary_emb.inv_freq")
                    continue
                tensors_of[file][theirs] = name
                info, where = tensors.get_slice(theirs), f"{shown(file)}: tensor {shown(theirs, 120)}"
                if info.get_dtype() not in DISK_DTYPES:
                    raise UserError(f"{where} has dtype {info.get_dtype()}; supported are bf16, fp16 and fp32")
                if name not in shapes:
                    raise UserError(f"{where} has no place in this architecture; is config.json the right one?")
                if info.get_shape() != shapes[name]:
                    raise UserError(f"{where} has shape {shown(info.get_shape(), 120)}, config.json asks for "
                                    f"{shapes[name]}")
                if name not in missing:
                    raise UserError(f"{where} appears in more than one file")
                missing.remove(name)
                dtypes[DISK_DTYPES[info.get_dtype()]] += not (tied and name == HEAD)
    if names := sorted(missing - ({HEAD} if tied else set())):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{shown(folder)}: tensor {names[0]}{more} is missing from the safetensors files")
    if parts := [f"{count} tensors of {shown(part)}" for part, count in left_out.items() if count]:
        print(f"model   {shown(folder)}: the text decoder alone is loaded; left out are {', '.join(parts)}")
    return tensors_of, dtypes


@contextlib.contextmanager
def opened(file: Path):
    """The tensors of a safetensors file. What is wrong with it is one sentence."""
    try:
        with open(file, "rb") as plain:
            if (header := int.from_bytes(plain.read(8), "little")) > LONGEST_HEADER:
                raise ValueError(f"its header claims {header} bytes")
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (UserError, torch.OutOfMemoryError):
        raise
    except DAMAGE as error:
        raise UserError(f"{shown(file)} is damaged or cut short ({shown(one_line(error))}); copy or download it "
                        f"again") from error


@torch.no_grad()
def fill(parameter: Tensor, tensor: Tensor, name: str, file: Path) -> None:
    if parameter.dtype.itemsize <= tensor.dtype.itemsize:       # what is rounded is rounded before it is looked at
        tensor = tensor.to(parameter.dtype)
    if not all_finite(tensor):
        raise UserError(f"{shown(file)}: tensor {name} holds NaN or infinity as {tensor.dtype}; the run that wrote it "
                        f"went wrong before")
    parameter.copy_(tensor)


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    if single := checkpoint_file(folder, "model.safetensors", optional=True):
        return [single]
    if checkpoint_file(folder, INDEX, optional=True) is None:
        raise UserError(f"{shown(folder)} has neither model.safetensors nor {INDEX}")
    weight_map, where = checkpoint_json(folder, INDEX).get("weight_map"), shown(folder / INDEX)
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{where} has no weight_map; download it again")
    files = []
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
            raise UserError(f"{where} names {shown(repr(name), 120)}, which is not a safetensors file inside the "
                            f"folder; refused")
        if not (file := checkpoint_file(folder, name, optional=True)):
            raise UserError(f"{shown(folder / name)} is missing although {INDEX} names it")
        files.append(file)
    return files


def set_threads(model: Transformer, threads: int = 0) -> None:
    """`threads` CPU threads, or one for a tiny model: threads that wait for each other cost such matrices more than
    they compute, ten times more on a busy machine."""
    if threads or sum(p.numel() for p in model.parameters()) < 10_000_000:
        torch.set_num_threads(threads or 1)
