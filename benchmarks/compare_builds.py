"""Times two checkouts of fastlm against each other in one interleaved run.

    python benchmarks/compare_builds.py --before OLDER --after NEWER
    python benchmarks/compare_builds.py --before OLDER --after NEWER --quick --only linear

Each checkout (a folder with fastlm/ and its compiled modules) is imported by a worker process of its own. The workers
take turns on the same cases, in an order that alternates, so that a machine that slows down slows both. For each case
the table has the median time of both, and the median and quartiles of the paired ratios. A row is marked "slower" where
even the lower quartile of the ratio says so, by more than --tolerance.

The cases are those of `fastlm bench`, the same operators on operands of 2 × 16, where host time is all there is, and
small models. They use the public API only, so that older checkouts can run them.
"""

import argparse
import contextlib
import fnmatch
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Call = Callable[[], Any]
SIZES = ("small", "large")
DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("forward", "both")  # both: forward and backward


# 1. In the worker: the cases. Each function returns (function, inputs that get gradients).


def operands(size: str) -> dict[str, int]:
    if size == "small":
        return {"rows": 2, "width": 16, "heads": 2, "vocabulary": 16}
    return {"rows": 1024, "width": 768, "heads": 12, "vocabulary": 50257}


def normal(dtype: Any, *shape: int, scale: float = 1.0) -> Any:
    import torch

    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def attention(dtype: Any, rows: int, width: int, heads: int, vocabulary: int, **options: Any) -> tuple:
    """Causal, on views of a packed projection."""
    import fastlm

    packed = normal(dtype, 1, rows, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    return lambda q, k, v: fastlm.attention(q, k, v, causal=True, **options), packed.unbind(0)


def attention_dropout(dtype: Any, **sizes: int) -> tuple:
    return attention(dtype, **sizes, dropout_p=0.1)


def attention_varlen(dtype: Any, rows: int, width: int, heads: int, vocabulary: int) -> tuple:
    """Bidirectional, over two sequences of which one is three times as long as the other."""
    import torch

    import fastlm

    starts = torch.tensor([0, -(-rows // 4), rows])
    packed = normal(dtype, rows, 3, heads, width // heads)
    return lambda q, k, v: fastlm.attention_varlen(q, k, v, starts, starts), packed.unbind(1)


def scaled_dot_product_attention(dtype: Any, rows: int, width: int, heads: int, vocabulary: int) -> tuple:
    import fastlm

    packed = normal(dtype, 1, rows, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    return lambda q, k, v: fastlm.scaled_dot_product_attention(q, k, v), packed.unbind(0)


def layernorm_residual(dtype: Any, rows: int, width: int, heads: int, vocabulary: int) -> tuple:
    import fastlm

    inputs = [normal(dtype, rows, width), normal(dtype, rows, width), normal(dtype, width), normal(dtype, width)]
    return lambda x, residual, w, b: fastlm.layernorm_residual(x, residual, w, b), inputs


def layernorm_residual_dropout(dtype: Any, **sizes: int) -> tuple:
    import fastlm

    inputs = layernorm_residual(dtype, **sizes)[1]
    return lambda x, residual, w, b: fastlm.layernorm_residual(x, residual, w, b, dropout_p=0.1), inputs


def gelu_mlp(dtype: Any, rows: int, width: int, heads: int, vocabulary: int) -> tuple:
    """As in GPT-2."""
    import fastlm

    inputs = [
        normal(dtype, rows, width),
        normal(dtype, width, 4 * width, scale=0.02),
        normal(dtype, 4 * width),
        normal(dtype, 4 * width, width, scale=0.02),
        normal(dtype, width),
    ]
    return lambda *tensors: fastlm.gelu_mlp(*tensors, approximate="tanh", layout="conv1d"), inputs


def gelu_mlp_bert(dtype: Any, rows: int, width: int, heads: int, vocabulary: int) -> tuple:
    import fastlm

    inputs = [
        normal(dtype, rows, width),
        normal(dtype, 4 * width, width, scale=0.02),
        normal(dtype, 4 * width),
        normal(dtype, width, 4 * width, scale=0.02),
        normal(dtype, width),
    ]
    return lambda *tensors: fastlm.gelu_mlp(*tensors, recompute=1), inputs


def linear(dtype: Any, rows: int, width: int, heads: int, vocabulary: int) -> tuple:
    """As in GPT-2."""
    import fastlm

    inputs = [normal(dtype, rows, width), normal(dtype, width, 3 * width, scale=0.02), normal(dtype, 3 * width)]
    return lambda x, weight, bias: fastlm.linear(x, weight, bias, layout="conv1d"), inputs


def linear_bert(dtype: Any, rows: int, width: int, heads: int, vocabulary: int) -> tuple:
    import fastlm

    inputs = [normal(dtype, rows, width), normal(dtype, 3 * width, width, scale=0.02), normal(dtype, 3 * width)]
    return lambda x, weight, bias: fastlm.linear(x, weight, bias), inputs


def linear_decode(dtype: Any, rows: int, width: int, heads: int, vocabulary: int) -> tuple:
    """Few rows: the products of a decoding step of 4 sequences."""
    return linear(dtype, min(rows, 4), width, heads, vocabulary)


def linear_cross_entropy(dtype: Any, rows: int, width: int, heads: int, vocabulary: int) -> tuple:
    import torch

    import fastlm

    target = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(0))
    inputs = [normal(dtype, rows, width), normal(dtype, vocabulary, width, scale=0.02)]
    return lambda x, weight: fastlm.linear_cross_entropy(x, weight, target), inputs


OPERATORS = {
    f.__name__: f
    for f in (
        attention,
        attention_dropout,
        attention_varlen,
        scaled_dot_product_attention,
        layernorm_residual,
        layernorm_residual_dropout,
        gelu_mlp,
        gelu_mlp_bert,
        linear,
        linear_bert,
        linear_decode,
        linear_cross_entropy,
    )
}


def adamw(dtype: Any, size: str) -> Call:
    """A clipped step with master weights."""
    import fastlm

    shapes = [(16,), (2, 16)] if size == "small" else [(768, 2304), (768, 768), (768, 3072), (3072, 768), (768,)] * 4
    parameters = [normal(dtype, *shape).requires_grad_() for shape in shapes]
    for p in parameters:
        p.grad = normal(dtype, *p.shape)
    return fastlm.optim.AdamW(parameters, max_grad_norm=1.0, master_weights=True).step


def gpt2_step(dtype: Any, size: str) -> Call:
    """Forward and backward with dropout, under autocast for bfloat16."""
    from fastlm.models import GPT2Config, GPT2LMHeadModel

    layers, width, tokens = (2, 16, 8) if size == "small" else (2, 768, 512)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=2, vocab_size=101, n_positions=tokens)
    return training_step(GPT2LMHeadModel(config), dtype, tokens)


def bert_step(dtype: Any, size: str) -> Call:
    from fastlm.models import BertConfig, BertForMaskedLM

    return training_step(
        BertForMaskedLM(BertConfig(**bert_sizes(size))), dtype, bert_sizes(size)["max_position_embeddings"]
    )


def bert_sizes(size: str) -> dict[str, int]:
    layers, width, tokens = (2, 16, 8) if size == "small" else (2, 768, 256)
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": 2,
        "intermediate_size": 4 * width,
        "vocab_size": 101,
        "max_position_embeddings": tokens,
    }


def accelerated_gpt2_step(dtype: Any, size: str) -> Call:
    import transformers

    import fastlm

    layers, width, tokens = (2, 16, 8) if size == "small" else (2, 768, 512)
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=width, n_head=2, vocab_size=101, n_positions=tokens, bos_token_id=0, eos_token_id=0
    )
    return training_step(fastlm.accelerate(transformers.GPT2LMHeadModel(config)), dtype, tokens)


def accelerated_bert_step(dtype: Any, size: str) -> Call:
    import transformers

    import fastlm

    model = transformers.BertForMaskedLM(transformers.BertConfig(**bert_sizes(size)))
    return training_step(fastlm.accelerate(model), dtype, bert_sizes(size)["max_position_embeddings"])


def training_step(model: Any, dtype: Any, tokens: int) -> Call:
    import torch

    model.train()
    ids = torch.randint(101, (1, tokens), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def generate(dtype: Any, size: str) -> Call:
    """Eight tokens, greedy."""
    import torch

    from fastlm.models import GPT2Config, GPT2LMHeadModel

    layers, width = (2, 16) if size == "small" else (2, 768)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=2, vocab_size=101, n_positions=64)
    model, ids = GPT2LMHeadModel(config).to(dtype).eval(), torch.zeros(1, 4, dtype=torch.int64)
    return lambda: model.generate(ids, max_new_tokens=8, eos_token_id=())


STEPS = {f.__name__: f for f in (adamw, gpt2_step, bert_step, accelerated_gpt2_step, accelerated_bert_step, generate)}


def keys(sizes: Sequence[str], dtypes: Sequence[str], threads: Sequence[int], only: str) -> Iterator[dict[str, Any]]:
    for size in sizes:
        for name in (*OPERATORS, *STEPS):
            if only and not any(fnmatch.fnmatch(name, pattern) for pattern in only.split(",")):
                continue
            for direction in DIRECTIONS if name in OPERATORS else ("step",):
                for dtype in dtypes:
                    for n in threads:
                        yield {"name": name, "size": size, "direction": direction, "dtype": dtype, "threads": n}


def make_call(name: str, size: str, direction: str, dtype: str, threads: int) -> Call:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    if name in STEPS:
        return STEPS[name](kind, size)
    function, inputs = OPERATORS[name](kind, **operands(size))
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    def as_tuple() -> tuple:
        results = function(*leaves)
        return results if isinstance(results, tuple) else (results,)

    upstream = [torch.ones_like(y) for y in as_tuple()]
    return forward if direction == "forward" else lambda: torch.autograd.grad(as_tuple(), leaves, upstream)


def work() -> None:
    """Answers requests on stdin, a JSON object a line: {"prepare": case} or {"calls": n}."""
    # An editable installation would add its own fastlm.kernels to the package that PYTHONPATH names.
    sys.meta_path = [finder for finder in sys.meta_path if "_EditableFinder" not in str(finder)]
    import fastlm

    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    fastlm.tune_allocator()
    gc.disable()
    call: Call = lambda: None  # noqa: E731
    print(json.dumps({"fastlm": fastlm.__file__, "isa": fastlm.info().isa}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "prepare" in request:
                del call
                gc.collect()
                call = make_call(**request["prepare"])
                call()  # packs, allocates
                answer = {"seconds": median_time(call, 2)}
            else:
                # The other worker's OpenMP threads spin for some milliseconds after its last call.
                time.sleep(0.005)
                call()
                answer = {"seconds": median_time(call, request["calls"])}
        except Exception as error:
            answer, call = {"error": f"{type(error).__name__}: {error}"}, lambda: None
        print(json.dumps(answer), file=answers, flush=True)


def median_time(call: Call, calls: int) -> float:
    taken = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - start)
    return statistics.median(taken) * 1e-9


# 2. In the parent: turns, ratios, table


class Worker:
    def __init__(self, checkout: Path) -> None:
        environment = dict(os.environ, PYTHONPATH=str(checkout))
        command = [sys.executable, __file__, "--worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.about = self.answer()
        if not Path(self.about["fastlm"]).is_relative_to(checkout):
            sys.exit(f"{self.about['fastlm']} was imported, which is not in {checkout}")

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a worker process ended with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def compare(
    workers: dict[str, Worker], case: dict[str, Any], rounds: int, turn: float, tolerance: float
) -> dict[str, Any]:
    """turn: seconds that one turn of a worker takes at least."""
    first = {name: worker.ask(prepare=case) for name, worker in workers.items()}
    errors = [f"{name}: {answer['error']}" for name, answer in first.items() if "error" in answer]
    if errors:
        return case | {"error": "; ".join(errors)}
    calls = max(1, min(2000, round(turn / max(answer["seconds"] for answer in first.values()))))
    taken: dict[str, list[float]] = {name: [] for name in workers}
    for i in range(rounds):
        for name in list(workers)[:: 1 if i % 2 == 0 else -1]:
            taken[name].append(workers[name].ask(calls=calls)["seconds"])
    ratios = [after / before for before, after in zip(taken["before"], taken["after"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return case | {
        "before": statistics.median(taken["before"]),
        "after": statistics.median(taken["after"]),
        "ratio": median,
        "low": low,
        "high": high,
        "verdict": "slower" if low > 1 + tolerance else "faster" if high < 1 - tolerance else "",
    }


def in_words(row: dict[str, Any]) -> str:
    what = f"{row['name']:28} {row['size']:5} {row['direction']:7} {row['dtype']:8} {row['threads']}"
    if "error" in row:
        return f"{what}  {row['error']}"
    times = f"{row['before'] * 1e6:12,.1f} {row['after'] * 1e6:12,.1f}"
    return f"{what} {times}  {row['ratio']:5.3f} [{row['low']:5.3f}–{row['high']:5.3f}]  {row['verdict']}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time two checkouts of fastlm against each other, interleaved.")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--before", type=Path, help="the folder of the older checkout, with its compiled modules")
    parser.add_argument("--after", type=Path, help="the folder of the newer one")
    parser.add_argument("--only", default="", help="cases by name, with commas between and * for any characters")
    parser.add_argument("--sizes", default=",".join(SIZES), help="default: small,large")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="default: float32,bfloat16")
    parser.add_argument("--threads", default="1,2", help="default: 1,2")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each worker per case (default: 15)")
    parser.add_argument("--turn", type=float, default=0.02, help="seconds that a turn takes at least (default: 0.02)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="a difference that is not marked (default: 0.01)")
    parser.add_argument("--quick", action="store_true", help="small operands, float32, one thread")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    given = parser.parse_args()
    if given.worker:
        return work()
    if not given.before or not given.after:
        parser.error("--before and --after are required")
    if given.quick:
        given.sizes, given.dtypes, given.threads = "small", "float32", "1"
    threads = [int(n) for n in given.threads.split(",")]
    cases = list(keys(given.sizes.split(","), given.dtypes.split(","), threads, given.only))
    workers = {"before": Worker(given.before.resolve()), "after": Worker(given.after.resolve())}
    for name, worker in workers.items():
        print(f"{name}: {worker.about['fastlm']} ({worker.about['isa']})")
    print(f"{'case':28} size  what    dtype    threads   before, µs    after, µs  after / before [quartiles]")
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(KeyboardInterrupt):
        for case in cases:
            rows.append(compare(workers, case, given.rounds, given.turn, given.tolerance))
            print(in_words(rows[-1]), flush=True)
    for worker in workers.values():
        worker.close()
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    slower = [row for row in rows if row.get("verdict") == "slower"]
    failed = [row for row in rows if "error" in row]
    print(f"{len(rows)} rows, {len(slower)} slower beyond their spread, {len(failed)} failed")
    for row in (*slower, *failed):
        print(in_words(row))
    sys.exit(bool(slower or failed))


if __name__ == "__main__":
    main()
