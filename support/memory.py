"""Memory: what a run will need, said before it is spent.

support/plan.py puts it into words, and support/setup.py asks for it before the weights are loaded. Works from
config.json files, sizes of tokenizer files and the flags; nothing here allocates, and the device need not be there.
"""
import functools
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from losses import rows_at_once
from model import MODELS, Linear, ModelConfig

# float32 tensors over the vocabulary that are alive at once while a few rows run their loss
CHUNK_TENSORS = {"cross_entropy": 4, "skewed_forward_kl": 10, "uld": 11, "skewed_reverse_kl": 13, "jsd": 14, "gold": 14}
OTHER_DIVERGENCES = 7
LIBRARIES = 96 * 2**20, 64 * 2**20      # what tokenizers, torch and its kernels take once in use: GPU, CPU
MAPPED = 2**22              # bytes from which the C library gives a freed block back to the system at once
FREE_HEAP = 2**26           # what it keeps of smaller ones
HOLES = 0.25                # share of the kept blocks below MAPPED that stands empty between them, above FREE_HEAP
# bytes that oneDNN's compiled products take: after the proof at start; more for each micro-batch; at most
COMPILED = 104 * 2**20, 7 * 2**20, 340 * 2**20
ROOM = 0.75                 # share of the memory that sizes left to `fit` may fill
PER_TOKENIZER = 7.5         # bytes of an open tokenizer per byte of its tokenizer.json
PER_BRIDGE = 1.5            # the same of what a bridge adds, per byte of both files: byte tables, an order of tokens
CHOSEN = ("slots", "micro_batch_tokens", "chunk_rows")     # memory, not mathematics; but they decide how sums round

# what is there only while a phase lasts; everything else in a plan is there all the time
PHASES = {
    "sampling": ("KV cache", "logits of the slots", "packed head of the slots"),
    "evaluation": ("KV cache, logits and head of the evaluation",),
    "scoring": ("teacher's pass over a micro-batch", "logits of a scored chunk", "teacher layers on their visit",
                "teacher states between two layers"),
    "update": ("activations of a micro-batch", "freed blocks between activations", "logits of a chunk",
               "weights as they are multiplied"),
    "optimizer step": ("AdamW moments on their visit",),
    "saving": ("weights as they are written",),
}


# Flags of extras that take or save memory, and what holds where an extra is not there
ABSENT = {"lora_rank": 0, "offload_optimizer": False, "gradient_checkpointing": False, "self_teacher": "initial",
          "reference": "", "compile": False, "plain": "all", "teacher_memory": "resident", "teacher_int8": False}


def flag(cfg, name: str):
    return getattr(cfg, name, ABSENT[name])


def processes() -> int:
    """How many share the machine. Several put their own count here."""
    return 1


def per_process(plan: dict[str, int]) -> dict[str, int]:
    """The plan of one of the processes."""
    return plan


# What a run is made of

class Matrices(NamedTuple):
    """Of all layers of a model."""
    numbers: int            # in all matrices
    linear: list[int]       # numbers in each Linear
    rows: list[int]         # of each Linear: what comes out
    columns: list[int]      # what goes in


@functools.cache
def matrices(config: ModelConfig) -> Matrices:
    with torch.device("meta"):
        layers = MODELS[config.model_type](config).model.layers
    shapes = [module.weight.shape for module in layers.modules() if isinstance(module, Linear)]
    return Matrices(sum(p.numel() for p in layers.parameters() if p.dim() > 1), [shape.numel() for shape in shapes],
                    [shape[0] for shape in shapes], [shape[1] for shape in shapes])


class Sized(NamedTuple):
    config: ModelConfig
    weights: int


def sized(config: ModelConfig) -> Sized:
    with torch.device("meta"):
        return Sized(config, sum(parameter.numel() for parameter in MODELS[config.model_type](config).parameters()))


@dataclass(frozen=True)
class Job:
    """What the sizes of a run follow from, besides its flags."""
    device: torch.device                # that it is planned for, here or elsewhere
    memory: int                         # bytes of that device
    student: Sized
    teachers: list[Sized]               # of --teacher; none when there is none, or the student is its own
    reference: Sized | None             # the model of --reference or the initial student, if the advantage asks for it
    vocab_size: int                     # real tokens of the student
    prompt: int                         # tokens of the longest prompt, as the student or a teacher reads it
    held_out: tuple[int, int] = (1, 1)  # problems; tokens of their longest prompt
    teacher_vocab: int = 0              # real tokens of the largest teacher with another tokenizer; 0 = none has
    text: dict[str, int] = field(default_factory=dict)      # text_memory()


def text_memory(tokenizer: Path, others: list[Path]) -> dict[str, int]:
    """Bytes that the text side takes: the student's tokenizer.json and those of teachers that read through a bridge.
    Measured on byte-level and SentencePiece vocabularies of 128,000 to 256,000 tokens."""
    files = [path.stat().st_size for path in (tokenizer, *others)]
    return {"tokenizers": int(PER_TOKENIZER * sum(files)),
            "bridges between tokenizers": int(PER_BRIDGE * sum(files[0] + size for size in files[1:]))}


def compute_dtype(cfg, device: torch.device) -> torch.dtype:
    return getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32")


def auto_chunk(cfg, vocab_size: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows whose float32 logits take 256 MB on a GPU; on a CPU 2 MB, which stay in cache, but at least 96 rows (192
    where they take half the memory), fewer of which would not pay for reading the head. dtype: of the products."""
    if device.type == "cpu":
        return cfg.chunk_rows or max(384 // dtype.itemsize, 2**19 // vocab_size)
    return cfg.chunk_rows or max(16, 2**26 // vocab_size)


# The parts

def head_widths(c: ModelConfig) -> tuple[int, int]:
    """Columns of all query heads, of all key or value heads."""
    return c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim


def kept_blocks(c: ModelConfig, tokens: int, item: int, rank: int = 0) -> list[tuple[int, int]]:
    """(bytes, bytes of one block) of what the forward pass of `tokens` tokens through a layer leaves for the backward
    pass. item: bytes of a product's dtype; rank: of the adapters.

    Per norm its input and, unless its weight is frozen, the normed value, both in float32, and its output; per
    projection its input; the turned q, k and v; attention's output twice, before and after its heads are put side by
    side; four tensors of the MLP. A family whose layers keep other numbers of columns says so in own["normed"] and
    own["mlp_kept"]."""
    q, kv = head_widths(c)
    normed = c.own.get("normed", 2 * c.hidden_size + (q + kv) * c.qk_norm)
    mlp = c.own.get("mlp_kept", 4 * c.intermediate_size)
    return [(tokens * normed * (4 if rank else 8), tokens * c.hidden_size * 4),
            (tokens * item * (2 * c.hidden_size + 3 * q + 2 * kv + 7 * rank), tokens * c.hidden_size * item),
            (tokens * item * mlp, tokens * c.intermediate_size * item)]


def kept_activations(c: ModelConfig, tokens: int, item: int, checkpointing: bool, rank: int = 0) -> int:
    """Bytes that the forward pass of `tokens` tokens leaves for the backward pass, and of the gradients of a layer."""
    per_layer = sum(size for size, _ in kept_blocks(c, tokens, item, rank))
    # of the layer at work; an adapter has its own beside that of the weight
    gradients = tokens * item * ((4 if rank else 2) * c.intermediate_size + c.hidden_size)
    if checkpointing:
        return per_layer + gradients + tokens * c.hidden_size * item * c.num_hidden_layers
    return per_layer * c.num_hidden_layers + gradients


def holes(c: ModelConfig, tokens: int, item: int, checkpointing: bool, rank: int = 0) -> int:
    """Bytes of a CPU's heap that were freed between kept activations. glibc puts an aligned block only where more than
    its size is free, so what a layer holds for a moment leaves room that the next block of its size cannot take.
    Blocks from MAPPED on are not in the heap: a model 512 wide has next to none of this."""
    small = sum(size for size, block in kept_blocks(c, tokens, item, rank) if block < MAPPED)
    return int(HOLES * small * (1 if checkpointing else c.num_hidden_layers))


def compiled_products(cfg, job: Job) -> int:
    """Bytes of the products that a CPU with AVX-512 compiles in half precision, one for each shape, and keeps, the last
    1,024 of them. Micro-batches are of ever new lengths."""
    if compute_dtype(cfg, job.device).itemsize == 4 or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return 0
    at_start, each, most = COMPILED
    tokens = cfg.problems * cfg.samples * (job.prompt + cfg.max_new_tokens)
    return min(most, at_start + each * cfg.steps * -(-tokens // cfg.micro_batch_tokens))


def cast_weights(cfg, job: Job) -> int:
    """Bytes of the weights that an update casts to the dtype of its products: the head, and the projections of all
    layers, or of one at a time where activations are recomputed. None where it multiplies with the sampler's copy
    (extras/fast/borrowed.py)."""
    c, item = job.student.config, compute_dtype(cfg, job.device).itemsize
    borrows = not (flag(cfg, "lora_rank") or flag(cfg, "compile") or processes() > 1
                   or {"all", "borrowed_copy"} & set(flag(cfg, "plain").split(",")))
    if item == 4 or borrows:
        return 0
    layers = c.num_hidden_layers if flag(cfg, "gradient_checkpointing") else 1
    return item * (matrices(c).numbers // layers + c.hidden_size * job.vocab_size)


def forward_pass(c: ModelConfig, tokens: int, item: int) -> int:
    """Bytes of a forward pass that keeps nothing: the layer at work, its norm in float32."""
    q, kv = head_widths(c)
    return tokens * (item * (3 * c.intermediate_size + 2 * (q + kv) + 2 * c.hidden_size) + 8 * c.hidden_size)


def cast(cfg, c: ModelConfig, item: int) -> int:
    """Bytes of the largest int8 matrix of a teacher, cast for its product."""
    return max(matrices(c).linear) * item if flag(cfg, "teacher_int8") else 0


def adapter_weights(c: ModelConfig, rank: int) -> int:
    """Numbers in the adapters of a model: rank rows for what goes into each Linear, and for what comes out."""
    return rank * sum(matrices(c).rows + matrices(c).columns) if rank else 0


def scorers(cfg, job: Job) -> list[Sized]:
    """The models that read the student's responses as teachers; the student, where it is its own."""
    return job.teachers or [job.student] * (cfg.teacher == "self")


class TeacherBytes(NamedTuple):
    """Bytes of a teacher's weights."""
    stay: int       # on the device all the time
    visit: int      # there at once while it scores, beside those
    wait: int       # in host memory


def teacher_bytes(cfg, job: Job, teacher: Sized) -> TeacherBytes:
    c, item = teacher.config, compute_dtype(cfg, job.device).itemsize
    table = c.vocab_size * c.hidden_size * item
    end, embedding = table + c.hidden_size * item, 0 if c.tie_word_embeddings else table    # end: norm and head
    layers = teacher.weights * item - end - embedding
    if flag(cfg, "teacher_int8"):
        layers += sum(matrices(c).rows) * item - sum(matrices(c).linear) * (item - 1)
    if flag(cfg, "teacher_memory") == "park":
        return TeacherBytes(end, embedding + layers, embedding + layers)
    if flag(cfg, "teacher_memory") == "stream":
        at_once = min(2, c.num_hidden_layers)
        return TeacherBytes(end, at_once * (layers // c.num_hidden_layers), embedding + layers)
    return TeacherBytes(end + embedding + layers, 0, 0)


def teachers_wait(cfg, job: Job) -> int:
    """Bytes of all teachers in host memory."""
    return sum(teacher_bytes(cfg, job, teacher).wait for teacher in job.teachers)


def frozen_weights(cfg, job: Job) -> int:
    """Bytes of the models beside the student: teachers, reference, the running average (float32, since it moves)."""
    item, found = compute_dtype(cfg, job.device).itemsize, 0
    if cfg.teacher == "self" and flag(cfg, "self_teacher") == "ema":
        found += job.student.weights * 4 // item
    if cfg.teacher == "self" and flag(cfg, "self_teacher") == "initial" and not flag(cfg, "lora_rank"):
        found += job.student.weights
    if job.reference and (flag(cfg, "reference") or not flag(cfg, "lora_rank")):
        found += job.reference.weights
    teachers = sum(teacher_bytes(cfg, job, teacher).stay for teacher in job.teachers)
    return item * found + teachers + teachers_wait(cfg, job) * (job.device.type == "cpu")


def lasting(cfg, job: Job) -> dict[str, int]:
    """What is there from the first step to the last. Exact, but for libraries and text."""
    item, weights = compute_dtype(cfg, job.device).itemsize, job.student.weights
    adapters = adapter_weights(job.student.config, flag(cfg, "lora_rank"))
    rows = cfg.problems * cfg.samples * cfg.max_new_tokens
    read = [model.config.hidden_size for model in scorers(cfg, job)]
    reference = job.reference.config.hidden_size if job.reference else 0
    plan = {"student weights, float32": 4 * (weights + adapters),
            "gradients" if offloads(cfg, job) else "gradients and AdamW moments":
                (4 if offloads(cfg, job) else 12) * (adapters or weights),
            "student copy for sampling": 0 if item == 4 else item * weights,
            "teacher weights": frozen_weights(cfg, job),
            "teacher hidden states": rows * (max(read, default=0) + reference) * item,
            "libraries": LIBRARIES[job.device.type == "cpu"]}
    if job.device.type == "cpu":
        plan |= {"freed blocks": FREE_HEAP, "compiled products": compiled_products(cfg, job), **job.text}
    return plan


def passing(cfg, job: Job) -> dict[str, int]:
    """What is there in one phase and gone in the next (PHASES), within a few percent."""
    s, dtype, cpu = job.student.config, compute_dtype(cfg, job.device), job.device.type == "cpu"
    item, sequences, length = dtype.itemsize, cfg.problems * cfg.samples, job.prompt + cfg.max_new_tokens
    tokens = max(min(cfg.micro_batch_tokens, sequences * length), length)
    chunk = auto_chunk(cfg, job.vocab_size, job.device, dtype)
    at_once = rows_at_once(chunk, job.vocab_size, job.device)
    tensors = CHUNK_TENSORS.get(cfg.divergence, OTHER_DIVERGENCES)
    chunk, at_once = (min(count, sequences * cfg.max_new_tokens) for count in (chunk, at_once))
    adapters, read = adapter_weights(s, flag(cfg, "lora_rank")), [model.config for model in scorers(cfg, job)]
    theirs = (job.teacher_vocab or job.vocab_size) if read else 0
    passed = s, tokens, item, flag(cfg, "gradient_checkpointing"), flag(cfg, "lora_rank")
    return {
        "KV cache": cache(s, min(cfg.slots, sequences), length, item),
        "logits of the slots": min(cfg.slots, sequences) * job.vocab_size * item,
        "packed head of the slots": s.hidden_size * job.vocab_size * item * cpu,
        "KV cache, logits and head of the evaluation": evaluation(cfg, job),
        "teacher's pass over a micro-batch": max((forward_pass(c, tokens, item) + cast(cfg, c, item) for c in read),
                                                 default=0),
        "teacher layers on their visit": max((teacher_bytes(cfg, job, t).visit for t in job.teachers), default=0),
        "teacher states between two layers": sequences * length * item * max(
            (c.hidden_size + 2 * c.head_dim for c in read), default=0) * (flag(cfg, "teacher_memory") == "stream"),
        "logits of a scored chunk": 3 * 4 * theirs * chunk,
        "activations of a micro-batch": kept_activations(*passed),
        "freed blocks between activations": holes(*passed) * cpu,
        "weights as they are multiplied": cast_weights(cfg, job),
        "logits of a chunk": (job.vocab_size + theirs) * item * chunk + 4 * tensors * job.vocab_size * at_once,
        "AdamW moments on their visit": 8 * (adapters or job.student.weights) * offloads(cfg, job),
        # adapters are merged first; on a CPU masters that are float32 on disk, too, are written as they lie
        "weights as they are written": job.student.weights * (4 * bool(adapters) + 2 * (cpu and on_disk(s) == 2)),
    }


def evaluation(cfg, job: Job) -> int:
    """Bytes of answering the held-out problems. A teacher answers once, when gradients and moments do not exist yet."""
    item, trained = compute_dtype(cfg, job.device).itemsize, adapter_weights(job.student.config, flag(cfg, "lora_rank"))
    problems, prompt = job.held_out
    slots, length = min(cfg.slots, problems * cfg.eval_k), prompt + (cfg.eval_max_new_tokens or cfg.max_new_tokens)

    def answering(c: ModelConfig, vocab_size: int) -> int:
        head = c.hidden_size * vocab_size * item if job.device.type == "cpu" else 0
        return cache(c, slots, length, item) + slots * vocab_size * item + head
    later = (4 if offloads(cfg, job) else 12) * (trained or job.student.weights)
    teachers = [answering(teacher.config, job.teacher_vocab or job.vocab_size) - later
                + teacher_bytes(cfg, job, teacher).visit
                for teacher in job.teachers if cfg.eval_teacher and flag(cfg, "teacher_memory") != "stream"]
    return max(answering(job.student.config, job.vocab_size), *teachers, 0)


def cache(c: ModelConfig, slots: int, length: int, item: int) -> int:
    return slots * length * 2 * c.num_hidden_layers * head_widths(c)[1] * item


def on_disk(c: ModelConfig) -> int:
    """Bytes of a weight in the student's files, and so in what is saved."""
    return 2 if c.raw.get("dtype", c.raw.get("torch_dtype")) in ("bfloat16", "float16") else 4


def offloads(cfg, job: Job) -> bool:
    return flag(cfg, "offload_optimizer") and job.device.type != "cpu"


def host_plan(cfg, job: Job) -> dict[str, int]:
    """Bytes of a GPU run in the machine's own memory, besides Python, torch and CUDA themselves. A checkpoint is
    written from there, so the trained weights and their moments come by each time."""
    if job.device.type == "cpu":
        return {}
    trained = adapter_weights(job.student.config, flag(cfg, "lora_rank")) or job.student.weights
    moments = 8 * trained if offloads(cfg, job) else 0
    written = max(on_disk(job.student.config) * job.student.weights, 12 * trained - moments)
    elsewhere = flag(cfg, "teacher_int8") or flag(cfg, "teacher_memory") != "resident"
    loaded = elsewhere * sum(teacher.weights for teacher in job.teachers) * compute_dtype(cfg, job.device).itemsize
    return {"AdamW moments": moments, "a checkpoint as it is written": written, **job.text,
            # whole while they are loaded, before there are moments or a checkpoint
            "teacher weights": max(teachers_wait(cfg, job), loaded - moments - written)}


def memory_plan(cfg, job: Job) -> dict[str, int]:
    """Bytes on the device, by what they are for, of one of the processes. cfg names slots and micro_batch_tokens."""
    return per_process(lasting(cfg, job) | passing(cfg, job))


def fullest(plan: dict[str, int]) -> str:
    """The phase that needs most."""
    return max(PHASES, key=lambda phase: sum(plan.get(name, 0) for name in PHASES[phase]))


def peak(plan: dict[str, int]) -> int:
    """What is there all the time, plus the fullest phase: what one phase takes is freed before the next begins."""
    passing_names = {name for names in PHASES.values() for name in names}
    return (sum(size for name, size in plan.items() if name not in passing_names)
            + sum(plan.get(name, 0) for name in PHASES[fullest(plan)]))


# Choosing sizes

def total_memory(device: torch.device) -> int:
    """Bytes of the whole device; for a CPU those of the machine or the container, shared by the processes. Not what is
    free: the sizes chosen from it decide in which order sums are taken, and should be the same tomorrow."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**33
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):        # of control groups, second and first version
        try:
            whole = min(whole, int(Path("/sys/fs/cgroup", limit).read_text()))
        except (OSError, ValueError):       # not there, or "max"
            pass
    return whole // processes()


def fit(cfg, job: Job):
    """cfg with slots, micro_batch_tokens and chunk_rows filled in where they are 0: the largest of a few sizes with
    which the plan stays below three quarters of the memory, or the smallest when none does."""
    room = ROOM * job.memory
    most = 2**11 if job.device.type == "cpu" else 2**16     # larger ones are no faster
    chosen = replace(cfg, slots=cfg.slots or 1, micro_batch_tokens=cfg.micro_batch_tokens or 1)
    for name, sizes in (("slots", [2**n for n in range(8, 2, -1)]),
                        ("micro_batch_tokens", [most >> n for n in range(6)])):
        if not getattr(cfg, name):
            trials = (replace(chosen, **{name: size}) for size in sizes)
            fitting = (c for c in trials if peak(memory_plan(c, job)) <= room)
            chosen = next(fitting, replace(chosen, **{name: sizes[-1]}))
    return replace(chosen, chunk_rows=auto_chunk(cfg, job.vocab_size, job.device, compute_dtype(cfg, job.device)))


def size_text(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
