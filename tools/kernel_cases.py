"""Write what the autograd functions of kernel libraries allocate, in tests/cases/kernels.json.

The functions are taken out of the libraries' sources by name and run on fake tensors; launches of
GPU kernels are left out, for nothing is allocated in them. Needs the trace extra, and a folder of
sources (unpacked wheels or checkouts): liger_kernel, unsloth, axolotl, fms_acceleration_foak::

    python tools/kernel_cases.py FOLDER           # write
    python tools/kernel_cases.py FOLDER --check   # exit 1 if the file would change
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ftplan.trace.ledger import Ledger

CASES = Path(__file__).parents[1] / "tests/cases/kernels.json"
VERSIONS = {
    "liger_kernel": "0.8.5", "unsloth": "2026.10.9", "axolotl": "0.18.0 (067b021c8)",
    "fms_acceleration_foak": "0.7.4",
}  # fmt: skip
MICRO, SEQ, HIDDEN, INNER, RANK, HEADS, HEAD = 2, 64, 256, 768, 16, 4, 64
PARTIALS = 64
"""Programs of the way back of Unsloth's norm: two rows each."""
BF16, FP32 = torch.bfloat16, torch.float32


class Skipped:
    """Stands for a kernel, or whatever else a source names that allocates nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def __bool__(self) -> bool:
        return False


class Names(dict[str, Any]):
    """Globals in which a name that nobody defined is skipped."""

    def __missing__(self, name: str) -> Any:
        if name in __builtins__ if isinstance(__builtins__, dict) else hasattr(__builtins__, name):
            raise KeyError(name)
        return Skipped()


def _decorator(*args: Any, **_: Any) -> Any:
    return args[0] if args and callable(args[0]) else _decorator


def dequantized(weight: Any, state: Any = None, *_: Any, **given: Any) -> Any:
    """A packed weight expanded; Unsloth's forward has one buffer for all of them."""
    if state is None:
        return weight
    shape = weight.shape if given.get("transposed") is None else weight.shape[::-1]
    if given.get("use_global_buffer"):
        return state["buffer"].view(-1)[: weight.numel()].view(shape)
    return torch.empty(shape, dtype=state["dtype"])


def taken(root: Path, *sources: tuple[str, tuple[str, ...]]) -> Names:
    """The named functions and classes of each source file, in one namespace."""
    names = Names(
        torch=torch, torch_matmul=torch.matmul, calculate_settings=lambda n: (65536, 4),
        _settings=lambda *_, **__: (65536, 4), _dw_row_config=lambda *_: (65536, 4, PARTIALS, {}),
        fast_dequantize=dequantized, dequantize=dequantized,
        torch_amp_custom_fwd=_decorator, torch_amp_custom_bwd=_decorator, amp_custom_fwd=_decorator,
        amp_custom_bwd=_decorator, ensure_contiguous=_decorator, MAX_FUSED_SIZE=65536,
        Float8Tensor=type(None), DTensor=type(None), _DTensor=type(None), is_hip=lambda: False,
        is_cdna=lambda: False, _should_tile=lambda n: False, ROPE_GROUP_SIZE=4, _CHUNK_MEM_CONST=1,
        _ADDMM_SUPPORTS_OUT_DTYPE=True, INT32_SAFETY_BUFFER=2**31,
        _str_to_casting_mode={"llama": 0}, _CASTING_MODE_LLAMA=_Value(0),
        _CASTING_MODE_GEMMA=_Value(1), torch_to_triton_dtype={BF16: None, FP32: None},
        triton=_Triton(), math=__import__("math"), Optional=__import__("typing").Optional,
        get_lora_parameters=None,
    )  # fmt: skip
    for path, wanted in sources:
        text = (root / path).read_text().replace('device = "cuda"', 'device = "cpu"')
        text = text.replace('device="cuda"', 'device="cpu"')
        text = text.replace("device_type='cuda'", "device_type='cpu'")
        text = text.replace('.device.type == "cpu"', '.device.type == "none"')
        text = text.replace("torch.equal(grad_output, ", "bool(1) or (")  # no value is known
        text = text.replace('weight.device.type == "cuda"', 'weight.device.type == "cpu"')
        text = text.replace("torch.cuda.get_device_capability(grad_weight.device)[0]", "8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in wanted:
                node.decorator_list = []
                module = ast.fix_missing_locations(ast.Module([_future(), node], []))
                exec(compile(module, path, "exec"), names)
    return names


def _future() -> ast.ImportFrom:
    """Annotations are not run."""
    return ast.ImportFrom("__future__", [ast.alias("annotations")], 0)


class _Value:
    def __init__(self, value: int) -> None:
        self.value = value


class _Triton:
    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def next_power_of_2(n: int) -> int:
        return 1 << (n - 1).bit_length()


def measured(make: Callable[[], tuple[Callable[[], Any], list[Any]]]) -> dict[str, int]:
    """Bytes of a function: the most forward, what it keeps beside its results, the most backward.

    ``make`` gives the call and whatever lives through it.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        ledger.scalar_answer = lambda tensor, phase: 1
        call, _held = make()
        start, since = ledger.live_bytes, ledger.clock
        outputs = call()
        outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        outputs = [out for out in outputs if isinstance(out, torch.Tensor)]
        forward = max([start, *(live for clock, live in ledger.curve() if clock >= since)])
        made = {out.untyped_storage()._cdata: ledger.entry_of(out) for out in outputs}
        results = sum(e.bytes for e in made.values() if e is not None and e.birth >= since)
        kept = ledger.live_bytes - start - results
        grads = [torch.empty_like(out) for out in outputs if out.requires_grad]
        outputs = [out for out in outputs if out.requires_grad]
        begin, since = ledger.live_bytes, ledger.clock
        engine = torch.autograd.Variable._execution_engine
        roots, outputs = tuple(outputs), []
        engine.run_backward(
            roots, tuple(grads), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        backward = max([begin, *(live for clock, live in ledger.curve() if clock >= since)])
    return {"forward": forward - start, "kept": kept, "backward": backward - begin}


def tensor(*shape: int, dtype: Any = BF16, grad: bool = True) -> Any:
    """An empty tensor that asks for a gradient."""
    return torch.empty(*shape, dtype=dtype, requires_grad=grad)


class _Made(torch.autograd.Function):
    """Something that was computed before; where its gradient goes is no matter here."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> None: ...


def activations(*shape: int) -> Any:
    """A tensor with a graph behind it."""
    return _Made.apply(tensor(*shape))


def hidden(width: int = HIDDEN) -> Any:
    """Activations of the batch."""
    return activations(MICRO, SEQ, width)


_RMS = (
    "_rms_forward", "_rms_backward", "_rms_sum_partials", "_dw_split", "_cdiv",
)  # fmt: skip
"""What Unsloth's norm is made of; until 2026.8 its function did all by itself."""


def norms(root: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """RMSNorm of each library."""
    liger = taken(root, ("liger_kernel/ops/rms_norm.py", (
        "rms_norm_forward", "rms_norm_backward", "LigerRMSNormFunction")))  # fmt: skip
    fast = "Fast_RMS_Layernorm"
    unsloth = taken(root, ("unsloth/kernels/rms_layernorm.py", (fast, *_RMS)))
    foak = taken(root, ("fms_acceleration_foak/kernels/unsloth/rms_layernorm.py", (fast,)))
    for trained in (False, True):
        for model in ("llama", "gemma2"):

            def by_liger(trained: bool = trained, model: str = model) -> Any:
                x, weight = hidden(), tensor(HIDDEN, grad=trained)
                function = liger["LigerRMSNormFunction"]
                given = (1e-6, 0.0, "llama", model == "llama", None)
                return lambda: function.apply(x, weight, *given), [x, weight]

            yield {"op": "norm", "library": "liger", "model": model, "trained": trained}, by_liger
    for library, names, gemma, trained in (
        ("unsloth", unsloth, False, False), ("unsloth", unsloth, False, True),
        ("unsloth", unsloth, True, False), ("unsloth", unsloth, True, True),
        ("foak", foak, False, True),
    ):  # fmt: skip

        def by_fast(names: Names = names, gemma: bool = gemma, trained: bool = trained) -> Any:
            x, weight = hidden(), tensor(HIDDEN, grad=trained)
            # a decoder's norm writes over the gradient that it is given: save_output, reuse_grad
            given = (False, True) if "_rms_forward" in names else ()
            return lambda: names[fast].apply(x, weight, 1e-6, gemma, *given), [x, weight]

        case = {"op": "norm", "library": library, "model": "gemma2" if gemma else "llama"}
        summed = {"partials": PARTIALS} if library == "unsloth" else {}
        yield {**case, "trained": trained, **summed}, by_fast


def gates(root: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """``act(gate) * up`` of Liger."""
    names = taken(root, ("liger_kernel/ops/swiglu.py", (
        "swiglu_forward", "swiglu_backward", "LigerSiLUMulFunction")))  # fmt: skip

    def make() -> Any:
        gate, up = hidden(INNER), hidden(INNER)
        return lambda: names["LigerSiLUMulFunction"].apply(gate, up), [gate, up]

    yield {"op": "gate", "library": "liger", "model": "llama"}, make


_FORWARD_CONFIG = (16384, 8)
"""Columns a program of Unsloth's cross entropy, and warps, on an A100 (8.0), to 163,840 columns."""


def losses(root: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """Cross entropies over whole logits, and Liger's fused linear one."""
    fast = "Fast_CrossEntropyLoss"
    unsloth = taken(root, ("unsloth/kernels/cross_entropy_loss.py", (fast,)))
    unsloth["_chunked_forward_config"] = lambda device, vocabulary: _FORWARD_CONFIG
    foak = taken(root, ("fms_acceleration_foak/kernels/unsloth/cross_entropy_loss.py", (fast,)))
    for library, names in (("unsloth", unsloth), ("foak", foak)):
        for vocabulary in (32_000, 128_256):

            def by_fast(names: Names = names, vocabulary: int = vocabulary) -> Any:
                logits = activations(MICRO * SEQ, vocabulary)
                labels = torch.empty(MICRO * SEQ, dtype=torch.int64)
                return lambda: names[fast].apply(logits, labels).sum(), [logits, labels]

            case = {"op": "cross_entropy", "library": library, "model": "llama"}
            yield {**case, "vocabulary": vocabulary}, by_fast
    names = taken(root, ("liger_kernel/ops/fused_linear_cross_entropy.py", (
        "fused_linear_cross_entropy_forward", "fused_linear_cross_entropy_backward",
        "LigerFusedLinearCrossEntropyFunction")))  # fmt: skip
    # what the source asks of the card: operands of one dtype are multiplied into what is there
    names |= {"_can_use_mm_out": lambda x, w: x.dtype == w.dtype, "dispatch": None}
    for trained in (False, True):

        def by_liger(trained: bool = trained) -> Any:
            x, weight = activations(MICRO * SEQ, HIDDEN), tensor(4096, HIDDEN, grad=trained)
            labels = torch.empty(MICRO * SEQ, dtype=torch.int64)
            function = names["LigerFusedLinearCrossEntropyFunction"]
            return lambda: function.apply(x, weight, labels)[0], [x, weight, labels]

        case = {"op": "fused_loss", "library": "liger", "model": "llama", "vocabulary": 4096}
        yield {**case, "trained": trained}, by_liger


ZOO = "unsloth_zoo/fused_losses/fused_linear.py"


def fused_losses(root: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """Unsloth's linear cross entropy, as it is on a GPU: products into an fp32 buffer."""
    names = taken(root, (ZOO, (
        "_ce_impl", "fused_linear_rows", "_chunk_rows", "_bytes_per_logit", "_pow2", "_Buffers",
        "_aligned", "_logits_into", "_project", "_dz_w", "_dz_t_h", "_rows_of", "_addmm_fp32")),
    )  # fmt: skip
    names |= {
        "_MIN_LOGITS": 512 * 151_936, "_MIN_ROWS": 0, "_MAX_ROWS": 4096, "_FLASH": False,
        "_HALF": (torch.float16, BF16), "_IS_HIP": False, "_mm_fp32": _product_in_fp32,
        "_budget_bytes": lambda _device: 2 * 1024**3,
        "_keep_index": lambda targets, *_: (targets, len(targets)),  # all are labelled
        "_logits_mode": lambda *_: (True, False), "_scalars": lambda *_: (1.0, 1.0, 0.0),
        "_row_forward": lambda *args: (None, args[2]),  # the gradient, over the logits
    }  # fmt: skip
    for trained in (False, True):

        def make(trained: bool = trained) -> Any:
            x, weight = activations(MICRO * SEQ, HIDDEN), tensor(4096, HIDDEN, grad=trained)
            targets = torch.empty(MICRO * SEQ, dtype=torch.int64)
            loss = _unsloth_loss(names["_ce_impl"], trained)
            return lambda: loss.apply(x, weight, targets), [x, weight, targets]

        case = {"op": "fused_loss", "library": "unsloth", "model": "llama", "vocabulary": 4096}
        yield {**case, "trained": trained}, make


def _product_in_fp32(a: Any, b: Any, out: Any = None) -> Any:
    """What ``torch.mm(..., out_dtype=torch.float32)`` allocates."""
    return out if out is not None else torch.empty(a.shape[0], b.shape[1], dtype=FP32)


def _unsloth_loss(implementation: Any, trained: bool) -> Any:
    """What ``_ce_setup`` and ``_ce_backward`` register: gradients saved, and scaled in a copy."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, targets: Any) -> Any:
            one = torch.ones(())
            loss, *grads = implementation(
                x, weight, None, targets, one, one, -100, 0.0, 0.0, 0.0, 0.0, None, BF16,
                True, trained, False, False, 0,
            )[:3]  # fmt: skip
            ctx.save_for_backward(*grads)
            return loss

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            of_x, of_weight = (torch.empty_like(saved) for saved in ctx.saved_tensors)
            return of_x, of_weight if trained else None, None

    return Loss


class _Base:
    """A base layer as the functions see it."""

    def __init__(self, inner: int, outer: int, packed: bool, buffer: Any) -> None:
        self.weight = tensor(outer, inner, grad=False)
        self.state = {"dtype": BF16, "buffer": buffer} if packed else None
        self.down = tensor(RANK, inner, dtype=FP32)
        self.up = tensor(outer, RANK, dtype=FP32)


_DROPPED = (
    "_dropout_forward", "_dropout_replay", "_matmul_lora_ext", "_add_lora_dX", "_lora_bias_grad",
)  # fmt: skip
"""Dropout in Unsloth's functions, since 2026.9 or so."""


def adapters(root: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """LoRA's functions: projections of one input, one projection, a gated MLP."""
    functions = ("LoRA_QKV", "LoRA_W", "LoRA_O", "LoRA_MLP")
    swiglu = ("swiglu_fg_kernel", "swiglu_DWf_DW_dfg_kernel", "swiglu_forward", "swiglu_backward")
    unsloth = taken(
        root, ("unsloth/kernels/utils.py", ("matmul_lora", "addmm_")),
        ("unsloth/kernels/fast_lora.py", (*functions, *_DROPPED)),
        ("unsloth/kernels/swiglu.py", swiglu),
    )  # fmt: skip
    inside = "fms_acceleration_foak/fused_ops/unsloth_lora/"
    foak = taken(
        root, (f"{inside}utils.py", ("matmul_lora",)), (f"{inside}bnb/fast_lora.py", functions)
    )  # fmt: skip
    axolotl = taken(
        root, ("axolotl/kernels/lora.py", ("matmul_lora", *functions)),
        ("axolotl/kernels/swiglu.py", swiglu),
    )  # fmt: skip
    every = {"unsloth": unsloth, "foak": foak, "axolotl": axolotl}
    for library, names in every.items():
        for packed in (False, True):
            for dropout in (0.0, 0.1):
                if library == "foak" and not packed:
                    continue  # not run by the library
                case = {"library": library, "model": "llama", "packed": packed, "dropout": dropout}
                # foak's MLP multiplies a gradient with a mask of another width: it fails
                gated = () if library == "foak" else ("lora_mlp",)
                for op in ("lora_qkv", "lora_o", *gated):
                    yield {"op": op, **case}, _adapted(names, library, op, packed, dropout)


def _adapted(names: Names, library: str, op: str, packed: bool, dropout: float) -> Any:
    shapes = {
        "lora_qkv": [(HIDDEN, HIDDEN), (HIDDEN, HIDDEN // 2), (HIDDEN, HIDDEN // 2)],
        "lora_o": [(HIDDEN, HIDDEN)],
        "lora_mlp": [(HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)],
    }[op]

    def make() -> Any:
        x = hidden()
        buffer = tensor(INNER * HIDDEN, grad=False)
        bases = [_Base(*shape, packed, buffer) for shape in shapes]
        call = {"unsloth": _unsloth, "foak": _foak, "axolotl": _axolotl}[library]
        return call(names, op, x, bases, dropout), [x, buffer, bases]

    return make


def _unsloth(names: Names, op: str, x: Any, bases: list[_Base], dropout: float) -> Any:
    args = [v for b in bases for v in (b.weight, b.state, b.down, b.up, 2.0)]
    dropped = ((dropout,) * len(bases),) if dropout else ()
    if op == "lora_o":
        return lambda: names["LoRA_W"].apply(x, *args, *((dropout,) if dropout else ()))
    if op == "lora_qkv":
        return lambda: names["LoRA_QKV"].apply(x, *args, True, *dropped)
    kernels = names["swiglu_fg_kernel"], names["swiglu_DWf_DW_dfg_kernel"]
    return lambda: names["LoRA_MLP"].apply(x, *args, *kernels, True, *dropped)


def _foak(names: Names, op: str, x: Any, bases: list[_Base], dropout: float) -> Any:
    args = [v for b in bases for v in (b.weight, b.state, None, b.down, b.up, 2.0)]
    drops = [_Dropout(dropout) if dropout else torch.nn.Identity() for _ in bases]
    if op == "lora_o":
        return lambda: names["LoRA_W"].apply(x, *args, *drops)
    return lambda: names["LoRA_QKV"].apply(x, *args, *drops)


class _Dropout(torch.nn.Module):
    """Dropout as CUDA runs it: the mask is made beside the result."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.p = probability

    def forward(self, x: Any) -> Any:
        return torch.native_dropout(x, self.p, True)[0]


def _axolotl(names: Names, op: str, x: Any, bases: list[_Base], dropout: float) -> Any:
    def call() -> Any:
        dropped = _Dropout(dropout)(x) if dropout else None
        if op == "lora_mlp":
            args = [v for b in bases
                    for v in (b.weight, None, b.state, b.down, b.up, 2.0, None, None)]  # fmt: skip
            kernels = names["swiglu_forward"], names["swiglu_backward"]
            return names["LoRA_MLP"].apply(x, dropped, *args, *kernels, True)
        args = [v for b in bases
                for v in (b.weight, None, b.state, b.down, b.up, 2.0, None, None)]  # fmt: skip
        if op == "lora_o":
            return names["LoRA_O"].apply(x, dropped, *args)
        return names["LoRA_QKV"].apply(x, dropped, *args, True)

    return call


def document(root: Path) -> dict[str, Any]:
    """All cases with what was measured."""
    shape: Mapping[str, int] = {
        "micro": MICRO, "seq_len": SEQ, "hidden": HIDDEN, "inner": INNER, "rank": RANK,
    }  # fmt: skip
    cases = [
        {**case, "bytes": measured(make)}
        for family in (norms, gates, losses, fused_losses, adapters)
        for case, make in family(root)
    ]
    return {"versions": VERSIONS, "torch": torch.__version__.partition("+")[0], "shape": shape,
            "cases": cases}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Write or check the file."""
    root = Path(next(a for a in arguments if not a.startswith("-")))
    made = document(root)
    head = json.dumps({k: v for k, v in made.items() if k != "cases"})[:-1]
    lines = ",\n".join(" " + json.dumps(case) for case in made["cases"])
    text = f'{head}, "cases": [\n{lines}\n]}}\n'
    if CASES.exists() and CASES.read_text() == text:
        return 0
    if "--check" in arguments:
        print("tests/cases/kernels.json would change: run python tools/kernel_cases.py FOLDER")
        return 1
    CASES.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
