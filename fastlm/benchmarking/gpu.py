"""fastlm bench --gpu: operators and a training step on this GPU against PyTorch, timed in turn by the GPU's own events.

Where the CUDA C++ kernels serve, each case has two rows, from the same timings: of what `auto` takes, among whose rivals they are, and of them.
Ratios are of pairs timed one after the other in one process. Peaks are measured at the start: a large copy between two places in the GPU's memory (bytes
read plus bytes written), and the largest of a few matrix products.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
from fastlm.backends import choice
from fastlm.benchmarking.machine import Work
from fastlm.benchmarking.measure import Ratio
from fastlm.benchmarking.operators import EPSILON
from fastlm.models import GPT2Config, GPT2LMHeadModel
from fastlm.training.baseline import PlainGPT2

Call = Callable[[], object]
OperatorCase = tuple[str, str, dict[str, Callable], list[Tensor], list[Tensor], Work, Work]
ROUNDS, LEAST = 12, 0.01  # rounds of each pair; seconds that one timing should take
OURS = ("fastlm", "cuda")  # auto's choice, and the CUDA C++ kernels


@dataclasses.dataclass
class Row:
    operator: str
    shape: str
    dtype: str
    direction: str
    served_by: str
    seconds: float
    rivals: dict[str, dict[str, float]]  # name → seconds, and the median ratio with its quartiles
    flops: float | None = None
    bytes: float | None = None
    peak_bytes: dict[str, int] = dataclasses.field(default_factory=dict)  # of memory, by whose step


def clock(device: str) -> Callable[[Call, int], float]:
    """A function that takes (call, n) and returns the mean seconds of n calls."""

    def by_events(call: Call, n: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / n

    def by_clock(call: Call, n: int) -> float:
        begin = time.perf_counter()
        for _ in range(n):
            call()
        return (time.perf_counter() - begin) / n

    return by_events if device == "cuda" else by_clock


def in_turn(calls: dict[str, Call], device: str, rounds: int = ROUNDS, least: float = LEAST) -> dict[str, list[float]]:
    """Seconds per call of each, once per round, every other round backwards."""
    seconds = clock(device)
    times = {}
    for name, call in calls.items():
        for _ in range(3):  # compiles, allocates
            call()
        times[name] = max(1, round(least / max(seconds(call, 1), 1e-9)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            taken[name].append(seconds(calls[name], times[name]))
    return taken


def rows(
    operator: str, shape: str, dtype: torch.dtype, direction: str, calls: dict[str, Call], device: str, work: Work | None, **options: int
) -> Iterator[Row]:
    """One of each of OURS among the calls."""
    before = dict(fastlm.info().fallbacks)
    taken = in_turn(calls, device, **options)
    fell = [what for what, count in fastlm.info().fallbacks.items() if count > before.get(what, 0) and what.startswith(operator)]
    served_by = {"fastlm": fell[0] if fell else "triton" if device == "cuda" else "cpu", "cuda": "cuda"}
    for ours in OURS:
        if ours not in taken:
            continue
        rivals = {}
        for name in taken:
            if name == ours or (ours == "cuda" and name == "fastlm"):
                continue
            ratio = Ratio.of(taken[ours], taken[name])
            rivals[name] = {"seconds": statistics.median(taken[name]), "median": ratio.median, "low": ratio.low, "high": ratio.high}
        yield Row(
            operator, shape, str(dtype).removeprefix("torch."), direction, served_by[ours], statistics.median(taken[ours]), rivals,
            work.flops if work else None, work.bytes if work else None,
        )  # fmt: skip


def serves_cuda(device: str, dtype: torch.dtype = torch.float32) -> bool:
    return not choice.refusals("cuda", "linear", torch.device(device), dtype, {})


def ours(function: Callable[..., Any], device: str, dtype: torch.dtype) -> dict[str, Callable]:
    """function(*inputs, backend=…) by what auto takes, and by the CUDA C++ kernels where they serve."""
    return {"fastlm": function} | ({"cuda": functools.partial(function, backend="cuda")} if serves_cuda(device, dtype) else {})


def sdpa(q: Tensor, k: Tensor, v: Tensor, kind: SDPBackend | None = None) -> Tensor:
    if kind is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with sdpa_kernel(kind):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_rivals(device: str, dtype: torch.dtype) -> dict[str, Callable]:
    """PyTorch's own, as it chooses and each of its fast ones; flash-attn where it is installed."""
    if device != "cuda" or dtype == torch.float32:
        return {"sdpa": sdpa}
    kinds = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
    rivals: dict[str, Callable] = {"sdpa": sdpa} | {name: functools.partial(sdpa, kind=kind) for name, kind in kinds.items()}
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return rivals
    return rivals | {"flash-attn": lambda q, k, v: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)}


def eager_and_compiled(function: Callable[..., Any], compiled: bool) -> dict[str, Callable]:
    return {"eager": function} | ({"compiled": torch.compile(function, dynamic=False)} if compiled else {})


def both_ways(function: Callable[..., Any], inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> dict[str, Call]:
    """{direction: call}: forward without gradients, and forward with backward."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    def both() -> None:
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.grad(results, leaves, [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)])

    return {"forward": forward, "forward+backward": both}


def operator_cases(device: str, dtype: torch.dtype, small: bool = False, compiled: bool = False) -> Iterator[OperatorCase]:
    """(operator, shape, {who: function}, inputs, upstream, least work of forward, of both). compiled: torch.compile is a rival too, in one shape of each."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    size = dtype.itemsize
    for batch, heads, tokens, head_dim in ((1, 2, 32, 16),) if small else ((16, 12, 1024, 64), (4, 12, 4096, 64), (8, 16, 2048, 128)):
        packed = normal(batch, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        flops, moved = 4 * batch * heads * head_dim * tokens * (tokens + 1) / 2, batch * heads * tokens * head_dim * size
        yield (
            "attention", f"{batch} × {heads} heads of {head_dim}, {tokens} tokens, causal",
            ours(lambda q, k, v, backend=None: fastlm.attention(q, k, v, causal=True, backend=backend), device, dtype) | attention_rivals(device, dtype),
            list(packed.unbind(0)), [normal(batch, tokens, heads, head_dim).transpose(1, 2)],
            Work(flops, 4 * moved), Work(3.5 * flops, 12 * moved),
        )  # fmt: skip
    for rows, width in ((32, 48),) if small else ((4096, 768), (16384, 768), (16384, 1600), (65536, 256), (1024, 768)):
        weight, bias = normal(width), normal(width)

        def eager(x, residual, w, b, width=width):
            s = residual + x
            return F.layer_norm(s, (width,), w, b, EPSILON), s

        yield (
            "layernorm_residual", f"{rows} × {width}",
            ours(lambda x, r, w, b, backend=None: fastlm.layernorm_residual(x, r, w, b, EPSILON, backend=backend), device, dtype)
            | eager_and_compiled(eager, compiled and rows == 4096),
            [normal(rows, width), normal(rows, width), weight, bias], [normal(rows, width), normal(rows, width)],
            Work(10 * rows * width, 4 * rows * width * size), Work(26 * rows * width, 8 * rows * width * size),
        )  # fmt: skip
    for rows, width in ((32, 48),) if small else ((16384, 768), (4096, 1600)):
        hidden = 4 * width
        flops, moved = 4 * rows * width * hidden, (2 * rows * width + 2 * width * hidden) * size
        yield (
            "gelu_mlp", f"{rows} × {width} → {hidden} → {width}",
            ours(
                lambda x, a, b, c, d, backend=None: fastlm.gelu_mlp(x, a, b, c, d, approximate="tanh", layout="conv1d", backend=backend), device, dtype
            )
            | eager_and_compiled(lambda x, a, b, c, d: torch.addmm(d, F.gelu(torch.addmm(b, x, a), approximate="tanh"), c), compiled and width == 768),
            [normal(rows, width), normal(width, hidden, scale=0.02), normal(hidden), normal(hidden, width, scale=0.02), normal(width)], [normal(rows, width)],
            Work(flops, moved), Work(3 * flops, 3 * moved),
        )  # fmt: skip
    for rows, width, vocab in ((32, 48, 101),) if small else ((16384, 768, 50257),):
        target = torch.randint(vocab, (rows,), device=device)
        flops, moved = 2 * rows * width * vocab, (rows + vocab) * width * size
        yield (
            "linear_cross_entropy", f"{rows} × {width} → {vocab}",
            ours(lambda x, w, target=target, backend=None: fastlm.linear_cross_entropy(x, w, target, backend=backend), device, dtype)
            | eager_and_compiled(lambda x, w, target=target: F.cross_entropy(F.linear(x, w), target), compiled),
            [normal(rows, width), normal(vocab, width, scale=0.02)], [torch.ones((), device=device)], Work(flops, moved), Work(3 * flops, 3 * moved),
        )  # fmt: skip


def works(call: Call) -> bool:
    """PyTorch's kernels refuse what they cannot do when they are called."""
    try:
        call()
    except RuntimeError:
        return False
    return True


def operators(device: str, dtypes: Sequence[torch.dtype], small: bool = False, **options: int) -> Iterator[Row]:
    for dtype in dtypes:
        for name, shape, functions, inputs, upstream, forward, both in operator_cases(device, dtype, small, compiled=device == "cuda"):
            calls = {who: both_ways(function, inputs, upstream) for who, function in functions.items()}
            for direction, work in (("forward", forward), ("forward+backward", both)):
                chosen = {who: call[direction] for who, call in calls.items() if who in OURS or works(call[direction])}
                yield from rows(name, shape, dtype, direction, chosen, device, work, **options)


def training_step(
    device: str, batch: int = 16, context: int = 1024, sizes: dict[str, int] | None = None, compiled: bool = True, **options: int
) -> Iterator[Row]:
    """GPT-2 124M in bfloat16 autocast with AdamW: ours, PyTorch eager with SDPA, and the same under torch.compile; and the most memory each took."""
    sizes = sizes or {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
    tokens = torch.randint(sizes["vocab_size"], (batch, context), device=device)
    following = F.pad(tokens[:, 1:], (0, 1), value=-100)  # what our model makes of its labels itself

    def step_of(model: nn.Module, loss_of: Callable) -> Call:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")

        def step() -> None:
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    torch.manual_seed(0)
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # type: ignore[arg-type]
    start = GPT2LMHeadModel(config)

    def plain() -> nn.Module:
        return PlainGPT2.like(start).to(device).train()

    def plain_loss(model: nn.Module) -> Tensor:
        return model(tokens, following).loss

    def ours_on(backend: str | None) -> Call:
        def loss(model: nn.Module) -> Tensor:
            with fastlm.use_backend(backend):
                return model(tokens, labels=tokens).loss

        return step_of(_copy_of(start).to(device).train(), loss)

    makers: dict[str, Callable[[], Call]] = {"fastlm": lambda: ours_on(None)}
    if serves_cuda(device, torch.bfloat16):
        makers["cuda"] = lambda: ours_on("cuda")
    makers["eager"] = lambda: step_of(plain(), plain_loss)
    if compiled:
        makers["compiled"] = lambda: step_of(cast(nn.Module, torch.compile(plain())), plain_loss)
    steps, memory = {}, {}
    for name, make in makers.items():
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        steps[name] = make()
        for _ in range(2):
            steps[name]()
        if device == "cuda":
            memory[name] = torch.cuda.max_memory_allocated() - before
    work = Work(6 * sum(p.numel() for p in start.parameters()) * batch * context, 1)
    shape = f"GPT-2, {sizes['n_layer']} layers of {sizes['n_embd']}, {batch} × {context} tokens"
    for found in rows("training_step", shape, torch.bfloat16, "step", steps, device, work, **options):
        found.bytes, found.peak_bytes = None, memory
        yield found


def _copy_of(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    copy = GPT2LMHeadModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def peaks(device: str, dtypes: Sequence[torch.dtype], size: int = 8192, copied: int = 1 << 30) -> dict[str, float]:
    """Bytes per second of a copy (read plus written), FLOP/s of a square product in each dtype."""
    seconds = clock(device)

    def best(call: Call) -> float:
        for _ in range(3):
            call()
        return min(seconds(call, 5) for _ in range(5))

    source, target = (torch.empty(copied, dtype=torch.uint8, device=device) for _ in range(2))
    found = {"copy_bytes_per_second": 2 * copied / best(lambda: target.copy_(source))}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[f"{str(dtype).removeprefix('torch.')}_product_flops_per_second"] = 2 * size**3 / best(functools.partial(torch.mm, a, b))
    return found


def describe(device: str, measured: dict[str, float]) -> dict[str, Any]:
    import importlib.util

    triton = __import__("triton").__version__ if importlib.util.find_spec("triton") else None
    card = torch.cuda.get_device_name() if device == "cuda" else device
    return {"card": card, "fastlm": fastlm.__version__, "torch": torch.__version__, "triton": triton, "peaks": measured}


def share(one: Row, measured: dict[str, float]) -> float | None:
    """Of the roof: the time that memory and matrix units need at least, over the time it took."""
    rate = measured.get(f"{one.dtype}_product_flops_per_second")
    if one.flops is None or rate is None:
        return None
    return max(one.flops / rate, (one.bytes or 0) / measured["copy_bytes_per_second"]) / one.seconds


def markdown(rows: Sequence[Row], described: dict[str, Any]) -> str:
    measured = described["peaks"]
    lines = [
        f"{described['card']}, fastlm {described['fastlm']}, PyTorch {described['torch']}, Triton {described['triton']}. "
        f"Copy {measured['copy_bytes_per_second'] / 1e9:,.0f} GB/s (read plus written); fastest product: "
        + ", ".join(f"{v / 1e12:,.0f} TFLOP/s in {k.split('_')[0]}" for k, v in measured.items() if k.endswith("flops_per_second"))
        + ". Ratios: median [quartiles] of pairs timed in turn, how many times as fast as the rival.",
        "",
        "| operator | shape | dtype | direction | time | TFLOP/s | of roof | times as fast | served by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        ratios = "; ".join(f"{name} {r['median']:.2f} [{r['low']:.2f}–{r['high']:.2f}]" for name, r in one.rivals.items())
        part = share(one, measured)
        rate = "–" if one.flops is None else f"{one.flops / one.seconds / 1e12:.1f}"
        lines.append(
            f"| `{one.operator}` | {one.shape} | {one.dtype} | {one.direction} | {one.seconds * 1e6:,.1f} µs | {rate} | "
            f"{'–' if part is None else f'{part:.0%}'} | {ratios} | {one.served_by} |"
        )
        if one.peak_bytes:
            taken_by_ours = one.peak_bytes["cuda" if one.served_by == "cuda" else "fastlm"]
            words = ", ".join(f"{name} {taken / 2**30:.2f} GiB ({taken_by_ours / max(taken, 1):.0%})" for name, taken in one.peak_bytes.items())
            lines.append(f"| | most memory of the step, and fastlm's share of it | | | | | | {words} | |")
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: Sequence[Row], described: dict[str, Any]) -> None:
    """How many times as fast as the best rival, and the share of the roof."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, max(4, 1.5 + 0.3 * len(rows))), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    best = [min(one.rivals.values(), key=lambda r: r["seconds"]) for one in rows]
    left.barh(places, [r["median"] for r in best], xerr=[[r["median"] - r["low"] for r in best], [r["high"] - r["median"] for r in best]], color="#08519c")
    left.axvline(1, color="#d94801")
    left.set_yticks(places, [f"{one.operator} {one.direction}, {one.dtype}\n{one.shape}" for one in rows], fontsize=7)
    left.invert_yaxis()
    left.set(title="throughput", xlabel="times as fast as the best of PyTorch (line: equal)")
    right.barh(places, [100 * (share(one, described["peaks"]) or 0) for one in rows], color="#238b45")
    right.set(title="roofline", xlabel="% of what memory and matrix units allow")
    figure.suptitle(f"{described['card']}, fastlm {described['fastlm']}, PyTorch {described['torch']}", fontsize=11)
    figure.savefig(path)
