"""A GPU on paper: runs this project's own code on tensors without memory and writes every kernel into a book.

    with paper_gpu() as ledger:
        student = paper_model(raw, torch.bfloat16, torch.bfloat16)    # a Transformer that says it is on cuda:0
        student(tokens)
    ledger.kernels                                              # Kernel -> how often

Tensors are torch's fake ones, so every branch on `device.type == "cuda"` is the GPU's. What the host asks for has to be
known, though: lengths, masks, which rows belong where. Integers and booleans that follow from known ones are therefore
computed for real, on the CPU, beside their fake tensors (`known`). A question about anything else is answered as a
healthy step would answer it (isfinite().all() is True, a mean is 1).

How a kernel is counted:
    bytes       what it reads and what it writes, each once, as if no cache held anything. A view costs nothing; an
                expanded tensor counts by what it holds; a lookup reads the rows it takes, not the table.
    FLOPs       of products, by torch.utils.flop_counter's formulas; of flash attention by the real lengths, without
                what lies above the diagonal. Everything else has none: it waits for memory.
    launches    one per operator, but for those in LAUNCHES.
"""
import contextlib
import math
from collections import Counter
from typing import NamedTuple

from common import ModelConfig, Transformer, offers  # isort: skip

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

import losses
import rollout
from extras.fast import flash as flash_file

aten, GPU, CPU = torch.ops.aten, torch.device("cuda", 0), torch.device("cpu")

# Operators that do not read their first argument whole, by the part that they take, put or replace
TAKES = {"embedding", "index", "index_select", "gather", "searchsorted"}
PUTS = {"index_put", "index_copy", "scatter"}
REPLACES = {"copy", "fill", "zero"}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "resolve_conj"}
SURE = {"arange", "zeros", "ones", "full"}      # factories whose integers are known

# Kernels of an operator that has more than one: those of flash attention from torch's flash_api.cpp, the others
# estimates (sorts and searches go over their input in passes). Operators on lists: MultiTensorApply.cuh
LAUNCHES = {"sort": 4, "topk": 3, "nonzero": 4, "isin": 2}
FLASH_BACKWARD = 6      # row sums, the queries' gradient zeroed, the kernel, that gradient cast, two sums over groups
FLASH_DECODE = 4        # the kernel; query heads that share a key become rows by a copy, there, back, and once to keep
LIST_BLOCK, LIST_BLOCKS = 65_536, 320


class Kernel(NamedTuple):
    """One operator at one size."""
    operator: str
    bytes: int
    flops: int
    launches: int
    kind: str       # product, attention or other: which share of the machine's rates it attains


def known(x: Tensor) -> Tensor | None:
    """The integers of a tensor, on the CPU; None where they are not known."""
    if x.is_floating_point():
        return None
    value = getattr(x, "value", None) if isinstance(x, FakeTensor) else x
    return None if value is None or value.untyped_storage().nbytes() == 0 < value.numel() else value


def forget(x: Tensor) -> None:
    """Something unknown was written into a tensor: neither it nor what shares its memory is known from now on."""
    if known(x) is not None:
        x.value.untyped_storage().resize_(0)


def numbers(x: Tensor):
    """The same as Python's own."""
    value = known(x)
    with _disable_current_modes():
        return None if value is None else value.tolist()


def differences(x: Tensor) -> list[int]:
    ends = numbers(x)
    return [end - begin for begin, end in zip(ends, ends[1:])]


def size(x: Tensor) -> int:
    """Bytes of what a tensor holds, expanded dimensions once."""
    return x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride()) if stride or n == 0)


def tensors(*parts) -> list[Tensor]:
    return [x for x in tree_leaves(parts) if isinstance(x, Tensor)]


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def computed(func, name: str, given: list[Tensor], args, kwargs):
    """What the operator gives on the known integers; None when one of its inputs is not known."""
    if any(x.is_floating_point() for x in given) or (kwargs.get("dtype") or torch.int64).is_floating_point:
        return None
    if not given and (name not in SURE or kwargs.get("dtype") is None and (
            name != "arange" or any(isinstance(x, float) for x in args))):
        return None
    if any(known(x) is None for x in given):
        return None
    args, kwargs = tree_map(lambda x: known(x) if isinstance(x, Tensor) else x, (args, kwargs))
    if "device" in kwargs:
        kwargs["device"] = CPU
    with _disable_current_modes():
        return func(*args, **kwargs)


def traffic(name: str, given: list[Tensor], written: list[Tensor], made: list[Tensor]) -> int:
    """Bytes that a kernel reads and writes. given: all its tensors; written: those of them that `out=` names."""
    read = {id(x): x for x in given}
    for x in written:
        read.pop(id(x), None)
    if name in TAKES:       # as much of the first as comes out, and the others whole
        read.pop(id(given[0]))
        return 2 * sum(map(size, made)) + sum(map(size, read.values()))
    if name in PUTS:        # the others, and what the last of them holds once more
        read.pop(id(given[0]))
        return sum(map(size, read.values())) + size(given[-1])
    if name in REPLACES:
        read.pop(id(given[0]))
    return sum(map(size, read.values())) + sum(map(size, {id(x): x for x in made}.values()))


class Ledger(TorchDispatchMode):
    """Notes every kernel of what runs below it."""

    def __init__(self):
        super().__init__()
        self.kernels: Counter[Kernel] = Counter()

    def take(self) -> Counter:
        """The kernels since the last call."""
        taken, self.kernels = self.kernels, Counter()
        return taken

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return torch.device("meta")     # to torch's own C++ code, which would look for a driver of cuda
        if kwargs.get("device") is not None and kwargs["device"].type == "meta":
            kwargs["device"] = GPU
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        return getattr(self, f"on_{name}", self.run)(func, args, kwargs)

    def run(self, func, args, kwargs, **counted):
        name, given = func._schema.name.removeprefix("aten::").rstrip("_"), tensors(args, kwargs)
        value = computed(func, name, given, args, kwargs)
        out = func(*args, **kwargs)
        made, mutable = tensors(out), func._schema.is_mutable
        if value is not None:
            for fake, real in zip(made, tensors(value)):
                fake.value = real
        elif mutable:
            for x in made:
                forget(x)
        if name in NO_KERNEL or all(x.device != GPU for x in (*made, *given)):
            return out
        if made and not mutable and {storage(x) for x in made} <= {storage(x) for x in given}:
            return out      # a view
        formula = flop_registry.get(getattr(aten, name, None))      # of the operator that also has an in-place form
        if formula and not counted:
            counted = {"flops": formula(*args, **kwargs, out_val=out), "kind": "product"}
        if name.startswith("_foreach") or name == "_fused_adamw":
            counted["launches"] = math.ceil(sum(x.numel() for x in args[0]) / (LIST_BLOCK * LIST_BLOCKS))
        if name == "_fused_adamw":      # reads weights, gradients and two moments; writes all but the gradients
            made = tensors(args[0], args[2], args[3])
        bytes = counted.pop("bytes", None) or traffic(name, given, tensors(kwargs.get("out")), made)
        self.note(name, bytes, **counted)
        return out

    def note(self, name: str, bytes: int, flops: int = 0, launches: int = 0, kind: str = "other") -> None:
        self.kernels[Kernel(name, bytes, flops, launches or LAUNCHES.get(name, 1), kind)] += 1

    def alike(self, function):
        """The function, run once for all calls with tensors of the same sizes: the others note the same kernels."""
        seen = {}

        def call(*args):
            key = tuple((x.shape, x.stride(), x.dtype) for x in tensors(args))
            if key not in seen:
                outside, self.kernels = self.kernels, Counter()
                seen[key] = function(*args), self.kernels
                self.kernels = outside
            out, kernels = seen[key]
            self.kernels.update(kernels)
            return out
        return call

    # Operators whose answer, or the size of it, depends on values

    def on__local_scalar_dense(self, func, args, kwargs):
        answer = self.answer(args[0])
        return answer if answer is not None else 1.0 if args[0].is_floating_point() else True

    def answer(self, x: Tensor):
        """What the host gets when it asks for the numbers of a tensor; zeros for real numbers, which nobody knows."""
        if x.device == GPU:
            self.note("copy to the host", size(x))
        if x.is_floating_point():
            with _disable_current_modes():
                return torch.zeros(x.shape).tolist()
        return numbers(x)

    def on_nonzero(self, func, args, kwargs):
        found = computed(func, "nonzero", [args[0]], args, kwargs)
        if found is None:
            raise NotImplementedError("which entries are true is known on a GPU only")
        out = aten.new_empty.default(args[0], found.shape, dtype=torch.int64)
        out.value = found
        if out.device == GPU:
            self.note("nonzero", size(args[0]) + size(out))
        return out

    def places(self, indices) -> list[Tensor | None]:
        """Masks among indices as the places where they are true, which is how a GPU begins, too."""
        at = []
        for index in indices:
            mask = index is not None and index.dtype == torch.bool
            at += self.run_again(aten.unbind.int, self.on_nonzero(aten.nonzero.default, (index,), {}), 1) if mask else [
                index]
        return at

    def run_again(self, func, *args):
        return self.run(func, args, {})

    def on_index(self, func, args, kwargs):
        return self.run(func, (args[0], self.places(args[1])), kwargs)

    def on_index_put(self, func, args, kwargs):
        return self.run(func, (args[0], self.places(args[1]), *args[2:]), kwargs)

    # Flash attention, by the lengths

    def on__flash_attention_forward(self, func, args, kwargs):
        q_NQH, k_MRH, causal, decode = args[0], args[1], args[8], args[5] == 1
        (N, Q, H), R = q_NQH.shape, k_MRH.shape[1]
        lengths, used = differences(args[3]), kwargs.get("seqused_k")
        used = differences(args[4]) if used is None else numbers(used)
        pairs = sum(q * (q + 1) // 2 if causal else q * k for q, k in zip(lengths, used))
        moved = 2 * size(q_NQH) + 2 * sum(used) * R * H * q_NQH.element_size() + 4 * N * Q
        more = {}
        if decode and Q > R:    # copies of the queries: to rows, out of rows, and once more for a backward pass
            more, moved = {"launches": FLASH_DECODE}, moved + 6 * size(q_NQH)
        return self.run(func, args, kwargs, flops=4 * Q * H * pairs, kind="attention", bytes=moved, **more)

    def on__flash_attention_backward(self, func, args, kwargs):
        q_NQH, k_MRH = args[1], args[2]
        N, Q, H = q_NQH.shape
        pairs = sum(n * (n + 1) // 2 for n in differences(args[6]))
        # reads four tensors of the queries' size and two of the keys', writes three gradients; those of keys and values
        # first per query head and then summed, that of the queries first in float32
        moved = 9 * size(q_NQH) + 4 * size(k_MRH) + 12 * q_NQH.numel() + 4 * N * Q
        return self.run(func, args, kwargs, flops=10 * Q * H * pairs, launches=FLASH_BACKWARD, bytes=moved,
                        kind="attention")

    def on__scaled_dot_product_flash_attention(self, func, args, kwargs):
        B, Q, T, H = args[0].shape
        return self.run(func, args, kwargs, flops=2 * B * Q * H * T * (T + 1), kind="attention")

    # The gradient of an embedding that touches only its rows: fake tensors of this layout are not to be had

    def on__sparse_coo_tensor_with_dims_and_tensors(self, func, args, kwargs):
        stand_in = aten.new_empty.default(args[4], ()).expand(args[2])
        stand_in.rows = args[4]
        return stand_in

    def on_add(self, func, args, kwargs):
        rows = getattr(args[1], "rows", None) if isinstance(args[1], Tensor) else None
        if rows is None:
            return self.run(func, args, kwargs)
        self.note("index_add", 3 * size(rows))      # both read, one written
        return args[0]


class FusedNorm(torch.autograd.Function):
    """torch's rms_norm as a GPU runs it: one kernel, two for the gradients. On paper it would fall apart into six."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ledger: Ledger) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ledger, rows = ledger, 4 * x.numel() // x.shape[-1]
        ledger.note("_fused_rms_norm", 2 * size(x) + size(weight) + rows)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, weight), rows = ctx.saved_tensors, 4 * grad.numel() // grad.shape[-1]
        moved = 3 * size(x) + size(weight) + rows, 2 * size(x) + size(weight) + rows
        for name, bytes in zip(("_fused_rms_norm_backward", "_fused_rms_norm_backward weight"), moved):
            if ctx.needs_input_grad[name.endswith("weight")]:
                ctx.ledger.note(name, bytes)
        return torch.empty_like(x), torch.empty_like(weight), None


class FusedSilu(torch.autograd.Function):
    """One kernel each way. On paper its gradient would fall apart into seven."""

    @staticmethod
    def forward(ctx, x: Tensor, ledger: Ledger) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ledger = ledger
        ledger.note("silu", 2 * size(x))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.ledger.note("silu_backward", 2 * size(*ctx.saved_tensors) + size(grad))
        return torch.empty_like(grad), None


def fused_attention(q_BQTH: Tensor, k_BRTH: Tensor, v_BRTH: Tensor, is_causal: bool, enable_gqa: bool) -> Tensor:
    """What torch's scaled_dot_product_attention picks on a GPU for whole sequences in half precision."""
    return aten._scaled_dot_product_flash_attention(q_BQTH, k_BRTH, v_BRTH, 0.0, is_causal)[0]


# What runs on it

def paper_model(raw: dict, dtype: torch.dtype, compute_dtype: torch.dtype, trained: bool = False) -> Transformer:
    """common.random_model on paper: `raw` is its config.json."""
    made = plain_model(raw, dtype, compute_dtype, trained)
    for faster in offers("on_model"):
        faster(made)
    return made


def plain_model(raw: dict, dtype: torch.dtype, compute_dtype: torch.dtype, trained: bool) -> Transformer:
    with _disable_current_modes(), torch.device("meta"):
        made = Transformer(ModelConfig.from_dict(raw), compute_dtype)
    for module in made.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=GPU), trained)
    made.copy_as = lambda dtype: plain_model(raw, dtype, dtype, False)
    return made


@contextlib.contextmanager
def paper_gpu():
    """The Ledger of a GPU that is not there. Flash attention is taken for available: the operator that the public
    function calls, whose kernels are known."""
    replaced = [(flash_file, "flash_ready"), (flash_file, "available"), (rollout.Slots, "decode"),
                (rollout, "head_product"), (losses, "gradient_in_place"), (losses, "chunked_backward"),
                (_foreach_utils, "_get_foreach_kernels_supported_devices"),
                (_foreach_utils, "_foreach_supported_types"), (F, "rms_norm"), (F, "silu"),
                (F, "scaled_dot_product_attention")]
    plain = [(place, name, getattr(place, name)) for place, name in replaced]
    flash_file.flash_ready = lambda device, dtype, head_dim: dtype == torch.bfloat16
    flash_file.available = lambda path: path == flash_file.KERNELS[1]
    _foreach_utils._get_foreach_kernels_supported_devices = lambda: ["cuda", "meta"]
    _foreach_utils._foreach_supported_types = [Tensor, nn.Parameter, FakeTensor]
    ledger = Ledger()
    losses.gradient_in_place = ledger.alike(losses.gradient_in_place)       # all but the last chunk of a micro-batch
    losses.chunked_backward = ledger.alike(losses.chunked_backward)         # and micro-batch of a step
    F.rms_norm = lambda x, shape, weight, eps: FusedNorm.apply(
        x, x.new_empty(0) if weight is None else weight, ledger)
    F.silu = lambda x: FusedSilu.apply(x, ledger)
    F.scaled_dot_product_attention = fused_attention
    FakeTensor.tolist = lambda x: ledger.answer(x)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), ledger:
            yield ledger
    finally:
        del FakeTensor.tolist
        for place, name, function in plain:
            setattr(place, name, function)
