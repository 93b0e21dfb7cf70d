"""Weights: a checkpoint in Hugging Face's layout, from a folder or the hub, into a Transformer. Transformer.save is
the way back.

Place in the loop: before it; prepare.py loads the student and its teachers, eval.py what it evaluates. A strict copy:
every tensor of the files fills exactly one parameter, and whatever does not fit is named in one sentence.
"""
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model import ModelConfig, Transformer
from tokenizer import UserError, read_json

DISK_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def checkpoint_folder(name: str) -> Path:
    """A folder as it is; anything that looks like `owner/name` is downloaded from the hub (safetensors and
    json files and the chat template only: nothing that could be executed)."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file; a model is given as its folder or as a hub id")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"no such folder: {name}; give a folder with config.json and *.safetensors, or a hub "
                        f"id owner/name")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja"],
                                      ignore_patterns=["consolidated*", "*/*"]))    # second copies in other layouts
    except Exception as error:      # the hub client raises a dozen kinds; its first line says which
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} is no folder here and could not be downloaded from the hub: {reason}") from error


def load_config(folder: str | Path) -> ModelConfig:
    path = Path(folder) / "config.json"
    return ModelConfig.from_dict(read_json(path), str(path))


def load_model(folder: str | Path, *, dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None,
               device: torch.device | str = "cpu") -> Transformer:
    """The checkpoint in `folder`, stored as `dtype` on `device`, multiplying in compute_dtype (default:
    dtype).

    Every tensor of the files fills exactly one parameter; a missing, extra, repeated or wrongly shaped one is
    a UserError that names it. Peak memory: the model and one tensor.
    """
    folder = Path(folder)
    config = load_config(folder)
    with torch.device("meta"):          # no memory until the dtype is known
        model = Transformer(config, compute_dtype or dtype).to(dtype)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    unfilled, dtypes, tied_copy = set(parameters), [], None
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name.endswith("rotary_emb.inv_freq"):    # old Llama files; the table follows from the config
                        continue
                    if name == "lm_head.weight" and config.tie_word_embeddings:
                        tied_copy = tensors.get_tensor(name)
                        continue
                    dtypes.append(fill(parameters, unfilled, name, tensors, file))
        except SafetensorError as error:
            raise UserError(f"{file} is damaged or cut short ({error}); copy or download it again") from error
    if unfilled:
        names = sorted(unfilled)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{folder}: tensor {names[0]}{more} is missing from the safetensors files")
    if tied_copy is not None and not torch.equal(tied_copy.to(dtype), model.head_weight().detach().cpu()):
        raise UserError(f"{folder}: lm_head.weight differs from the embedding although config.json ties them")
    model.disk_dtype = max(set(dtypes), key=dtypes.count)
    return model.eval()


def fill(parameters: dict, unfilled: set, name: str, tensors, file: Path) -> torch.dtype:
    """Copy one tensor into the parameter of its name, or say why it does not fit. Returns its dtype on
    disk."""
    info = tensors.get_slice(name)
    if info.get_dtype() not in DISK_DTYPES:
        raise UserError(f"{file}: tensor {name} has dtype {info.get_dtype()}; supported are bf16, fp16 and fp32")
    if name not in parameters:
        raise UserError(f"{file}: tensor {name} has no place in this architecture; is config.json the right one?")
    wanted = list(parameters[name].shape)
    if info.get_shape() != wanted:
        raise UserError(f"{file}: tensor {name} has shape {info.get_shape()}, config.json asks for {wanted}")
    if name not in unfilled:
        raise UserError(f"{file}: tensor {name} appears in more than one file")
    unfilled.remove(name)
    tensor = tensors.get_tensor(name)
    if not tensor.isfinite().all():
        raise UserError(f"{file}: tensor {name} holds NaN or infinity; the run that wrote it went wrong before")
    with torch.no_grad():
        parameters[name].copy_(tensor)
    return DISK_DTYPES[info.get_dtype()]


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise UserError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; download it again")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        # judged by name, not by resolved path: the hub's cache keeps links to blobs outside the snapshot
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is not a safetensors file inside the folder; refused")
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing although {index.name} names it")
    return [folder / name for name in names]
