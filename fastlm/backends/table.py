"""Where PyTorch's own operator is the faster one: a table from measurements, keyed by CPU model, never by a timing at run time.

A row says: on this CPU, this operator in this dtype goes to `torch` when every named feature lies in its range.
Features are those that fastlm/ops hands to the choice (rows, widths, …); both ends of a range belong to it, None is open.
"""

import dataclasses
import functools
import json
import os
import pathlib
import warnings

import torch

from fastlm.backends import isa


@dataclasses.dataclass(frozen=True)
class Rule:
    operator: str
    dtype: str  # "float32", "bfloat16", "float16"
    where: dict[str, tuple[int | None, int | None]] = dataclasses.field(default_factory=dict)  # {} = always

    def holds(self, operator: str, dtype: str, features: dict) -> bool:
        return (operator, dtype) == (self.operator, self.dtype) and all(
            (low is None or features[name] >= low) and (high is None or features[name] <= high) for name, (low, high) in self.where.items()
        )

    def __str__(self) -> str:
        ranges = (
            name if low == high == 1 else f"{'' if low is None else f'{low} ≤ '}{name}{'' if high is None else f' ≤ {high}'}"
            for name, (low, high) in self.where.items()
        )
        where = ", ".join(ranges)
        return f"{self.operator} in {self.dtype}" + f" ({where})" * bool(where)


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
    """Where `fastlm info --measure` writes this machine's own table: {cpu(): [{"operator", "dtype", "where"}, …]}."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "fastlm" / "table.json"


def shipped() -> tuple[Rule, ...]:
    """This CPU's rows among those that come with fastlm."""
    module = isa.features()
    amx = module is not None and module.has_amx()
    return MEASURED.get(cpu(), (WITH_AMX if isa.name == "amx" else AMX_UNUSED) if amx else ())


@functools.cache
def rules() -> tuple[Rule, ...]:
    """This CPU's rows: the user's own where there are any, else the ones that come with fastlm."""
    model = cpu()
    try:
        own = json.loads(user_table().read_text())
        if model in own:
            return tuple(Rule(row["operator"], row["dtype"], {name: (low, high) for name, (low, high) in row.get("where", {}).items()}) for row in own[model])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as wrong:  # the cache is anyone's to edit: it must not stop a program
        warnings.warn(f"{user_table()}: cannot be read ({wrong}); the measurements that come with fastlm hold", RuntimeWarning, stacklevel=2)
    return shipped()


def in_words() -> str:
    of = cpu() or "this machine"
    return f"{of}: PyTorch serves {'; '.join(map(str, rules()))}" if rules() else f"{of}: fastlm's kernels serve whatever they can"


def prefers_torch(operator: str, dtype: torch.dtype, features: dict) -> bool:
    return any(rule.holds(operator, str(dtype).removeprefix("torch."), features) for rule in rules())


# GPU (torch.cuda.get_device_name()) → rules, from `make gpu`. None is measured yet: there Triton comes first everywhere.
GPUS: dict[str, tuple[Rule, ...]] = {}


def gpu_prefers_torch(card: str, operator: str, dtype: torch.dtype, features: dict) -> bool:
    return any(rule.holds(operator, str(dtype).removeprefix("torch."), features) for rule in GPUS.get(card, ()))
