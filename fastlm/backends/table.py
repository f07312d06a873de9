"""Who serves a call first: tables from measurements, keyed by the model of the CPU or the GPU, never by a timing at run time.

A row says: on this machine, this operator in this dtype goes first to that backend when every named feature lies in its range; both ends of a range belong
to it, None is open. Where no row holds, the device's ORDER does.
"""

import dataclasses
import functools
import json
import os
import pathlib
import warnings
from typing import Any

import torch

from fastlm.backends import isa

ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("triton", "cuda", "torch", "reference")}
DTYPES = ("float32", "bfloat16", "float16")

# What each operator tells of a call, in this order: all that a backend's reasons and the table may depend on.
FEATURES = {
    "adamw": ("amsgrad", "gaps", "mixed", "subclass"),
    "attention": (
        "batch",
        "heads",
        "query_len",
        "key_len",
        "head_dim",
        "masked",
        "dropout",
        "return_lse",
        "mask_gradient",
    ),
    "attention_varlen": (
        "sequences",
        "heads",
        "query_tokens",
        "key_tokens",
        "head_dim",
        "masked",
        "dropout",
        "return_lse",
    ),
    "gelu_mlp": ("rows", "in_width", "hidden_width", "out_width", "conv1d"),
    "layernorm_residual": ("rows", "width", "dropout"),
    "linear": ("rows", "in_width", "out_width", "conv1d"),
    "linear_cross_entropy": ("rows", "width", "vocab"),
}
FLAGS = ("conv1d", "dropout", "masked", "mask_gradient", "return_lse")  # of these, those that are true or false


@dataclasses.dataclass(frozen=True)
class Rule:
    operator: str
    dtype: str  # of DTYPES
    where: dict[str, tuple[int | None, int | None]] = dataclasses.field(default_factory=dict)  # {} = always
    first: str = "torch"  # the backend, of the device's ORDER

    def holds(self, operator: str, dtype: str, features: dict) -> bool:
        return (operator, dtype) == (self.operator, self.dtype) and all(
            (low is None or features[name] >= low) and (high is None or features[name] <= high)
            for name, (low, high) in self.where.items()
        )

    def __str__(self) -> str:
        where = ", ".join(in_range(name, low, high) for name, (low, high) in self.where.items())
        return f"{self.operator} in {self.dtype}" + f" ({where})" * bool(where)


def in_range(name: str, low: int | None, high: int | None) -> str:
    if low == high and low in (0, 1) and name in FLAGS:
        return name if low else f"not {name}"
    return f"{'' if low is None else f'{low} ≤ '}{name}{'' if high is None else f' ≤ {high}'}"


# CPU, as cpu() names it → rules, from the operators' benchmarks
MEASURED: dict[str, tuple[Rule, ...]] = {
    # Two cores, PyTorch 2.13. Products of few rows as measured when their weights were packed, which they no longer are; one query in fp32.
    "zen4/avx512_bf16": (
        Rule("linear", "float32", {"rows": (None, 4)}),
        Rule("linear", "bfloat16"),  # nothing to fuse: PyTorch's backward is 2–4 % faster
        Rule("gelu_mlp", "float32", {"rows": (None, 4)}),
        Rule("gelu_mlp", "bfloat16", {"rows": (None, 255)}),
        Rule("linear_cross_entropy", "bfloat16"),  # with gradients PyTorch is 4–9 % faster, without 5 % slower
        Rule("attention", "float32", {"query_len": (None, 1)}),
    ),
    "zen5/avx512_bf16": (),  # two cores, PyTorch 2.13: both directions together, no operator was slower at any size that `fastlm bench` has
}

# A CPU with AMX that has no rows of its own, from two cores of such a Xeon, PyTorch 2.13. Its bf16 products are as fast as ours in themselves: where ours win
# nothing around them on one thread, it serves. Its large and wide fp32 products were 5–10 % faster.
WITH_AMX = (
    Rule("linear", "bfloat16", {"conv1d": (1, 1)}),
    Rule("gelu_mlp", "bfloat16", {"conv1d": (0, 0)}),
    Rule("linear_cross_entropy", "bfloat16"),
    *(Rule(operator, "float32", {"rows": (182, None), "in_width": (512, None)}) for operator in ("linear", "gelu_mlp")),
)

# The same CPU where fastlm's kernels cannot use it: not allowed by the system, an older compiler, another module forced.
AMX_UNUSED = (
    *(rule for rule in WITH_AMX if rule.dtype == "float32"),
    *(Rule(operator, "bfloat16") for operator in ("linear", "gelu_mlp", "linear_cross_entropy")),
    Rule("attention", "bfloat16", {"query_len": (182, None)}),
)


def cpu() -> str:
    """The microarchitecture and the widest module that can run: where a virtual machine hides instructions, PyTorch lacks them too, and others win."""
    module = isa.features()
    return f"{module.microarchitecture()}/{isa.usable()[0]}" if module else ""


def user_table() -> pathlib.Path:
    """Where `fastlm info --measure` writes this machine's own table: {cpu() or a GPU's name: [{"operator", "dtype", "where", "first"}, …]}."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "fastlm" / "table.json"


def shipped() -> tuple[Rule, ...]:
    """This CPU's rows among those that come with fastlm."""
    module = isa.features()
    amx = module is not None and module.has_amx()
    return MEASURED.get(cpu(), (WITH_AMX if isa.name == "amx" else AMX_UNUSED) if amx else ())


def rule_of(row: dict[str, Any], device: str) -> Rule:
    """A row of the user's table; ValueError, LookupError, TypeError or AttributeError where it is none."""
    rule = Rule(
        row["operator"],
        row["dtype"],
        {name: (low, high) for name, (low, high) in row.get("where", {}).items()},
        row.get("first", "torch"),
    )
    for name, given, known in (
        ("operator", rule.operator, tuple(FEATURES)),
        ("dtype", rule.dtype, DTYPES),
        ("first", rule.first, ORDER[device][:-1]),
    ):
        if given not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {given!r}")
    for name, ends in rule.where.items():
        if name not in FEATURES[rule.operator]:
            raise ValueError(f"where: expected some of {', '.join(FEATURES[rule.operator])}, got {name!r}")
        if not all(end is None or isinstance(end, int) for end in ends):
            raise ValueError(f"{name}: expected two whole numbers or null, got {list(ends)}")
    return rule


def own(model: str, device: str) -> tuple[Rule, ...] | None:
    """The user's own rows of a CPU or GPU; None without any. The file is anyone's to edit: whatever it holds, it does not stop a program."""
    try:
        tables = json.loads(user_table().read_text())
        return tuple(rule_of(row, device) for row in tables[model]) if model in tables else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as wrong:
        warnings.warn(
            f"{user_table()}: cannot be read ({wrong}); the measurements that come with fastlm hold",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


@functools.cache
def rules() -> tuple[Rule, ...]:
    """This CPU's rows: the user's own where there are any, else the ones that come with fastlm."""
    found = own(cpu(), "cpu")
    return shipped() if found is None else found


# GPU (torch.cuda.get_device_name()) → rules, from `make gpu`, which writes rows like these into table.py. None is measured yet: Triton comes first everywhere.
GPUS: dict[str, tuple[Rule, ...]] = {}


@functools.cache
def gpu_rules(card: str) -> tuple[Rule, ...] | None:
    """A GPU's rows, likewise; None where it was never measured."""
    found = own(card, "cuda")
    return GPUS.get(card) if found is None else found


def forget() -> None:
    """The tables are read again."""
    rules.cache_clear()
    gpu_rules.cache_clear()


def of(device: torch.device) -> tuple[Rule, ...]:
    """The rows that hold on a device."""
    if device.type == "cpu":
        return rules()
    if device.type == "cuda" and torch.cuda.is_available():  # there are CUDA tensors without a GPU: fake ones
        return gpu_rules(torch.cuda.get_device_name(device)) or ()
    return ()


NAMES = {
    "torch": "PyTorch serves",
    "cpu": "fastlm's kernels serve",
    "triton": "the Triton kernels serve",
    "cuda": "the CUDA C++ kernels serve",
}


def listed(rows: tuple[Rule, ...]) -> list[str]:
    return [
        f"{NAMES[first]} {'; '.join(str(rule) for rule in rows if rule.first == first)}"
        for first in dict.fromkeys(rule.first for rule in rows)
    ]


def in_words() -> str:
    return f"{cpu() or 'this machine'}: " + (", ".join(listed(rules())) or "fastlm's kernels serve whatever they can")


def cards() -> dict[str, int]:
    """The kinds of GPU here, and which is the first of each."""
    if not torch.cuda.is_available():
        return {}
    found: dict[str, int] = {}
    for index in range(torch.cuda.device_count()):
        found.setdefault(torch.cuda.get_device_name(index), index)
    return found


def gpus_in_words() -> list[str]:
    """A line for each kind of GPU here."""
    try:
        found = cards()
    except RuntimeError:  # in a forked process, where PyTorch cannot ask
        return []
    lines = []
    for card in found:
        rows = gpu_rules(card)
        if rows is None:
            lines.append(f"{card}: not measured yet, Triton comes first (fastlm info --measure measures it)")
        else:
            lines.append(
                f"{card}: {', '.join([*listed(rows), 'Triton comes first ' + ('elsewhere' if rows else 'everywhere, as measured')])}"
            )
    return lines
