"""Records the bits of every result, so that a change that must keep them can be checked against an older checkout.

    PYTHONPATH=OLDER FASTLM_ISA=avx2 python benchmarks/record.py --out before.json
    PYTHONPATH=NEWER FASTLM_ISA=avx2 python benchmarks/record.py --out after.json --compare before.json

Every operator runs forward and backward in every dtype, on ordinary and odd sizes, on contiguous and strided inputs,
under autocast, as a torch.library operator, and on each backend. So do the optimizer, a training step of each model,
and generation. For every result the file holds the SHA-256 of its bytes with its dtype, shape and strides. Only the
public API is used: the same script runs on any checkout that PYTHONPATH names.

The Triton kernels are recorded without a GPU under Triton's interpreter, on tiny sizes:

    TRITON_INTERPRET=1 python benchmarks/record.py --backends triton --out triton.json
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # an editable installation would add its own fastlm.kernels to the package of PYTHONPATH
    sys.meta_path = [finder for finder in sys.meta_path if "_EditableFinder" not in str(finder)]

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastlm

sys.path.insert(0, str(Path(__file__).parent))  # the cases of this checkout, whatever PYTHONPATH names
from recorded_cases import CASES, Case, Draw

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = ("auto", "cpu", "torch", "reference")
THREADED = ("cpu",)  # the backends that promise the same bits on any number of threads; PyTorch's operators do not
SEED = 1234
Results = dict[str, str]


# 1. Describing results


def described(result: Any) -> str:
    """The digest of the bytes of a tensor, its dtype, shape, and strides (but those of dimensions of size 0 or 1)."""
    if not isinstance(result, Tensor):
        return repr(result)
    x = result.detach()
    digest = hashlib.sha256(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    strides = [stride if size > 1 and x.numel() else "-" for size, stride in zip(x.shape, x.stride(), strict=True)]
    return f"{digest} {str(x.dtype).removeprefix('torch.')} {list(x.shape)} strides [{', '.join(map(str, strides))}]"


def flat(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple | list) else [results]


# 2. Running a case


def run_case(case: Case, dtype: torch.dtype, backend: str, way: str) -> Results:
    """One of WAYS of calling an operator: its results, and its gradients where the way has some."""
    draw = Draw(case.key, dtype)
    inputs, call = case.make(draw)
    wanted = list(inputs) if way != "some gradients" else list(inputs)[::2]
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    autocast = way.removeprefix("autocast ") if way.startswith("autocast ") else ""
    counter = FlopCounterMode(display=False) if way == "torch.library operator" else None
    torch.manual_seed(SEED)  # the seed of dropout
    with torch.autocast("cpu", DTYPES.get(autocast), enabled=bool(autocast)), counter or contextlib.nullcontext():
        if way == "inference":
            with torch.no_grad():
                return {f"result {i}": described(y) for i, y in enumerate(flat(call(backend, **leaves)))}
        results = flat(call(backend, **leaves))
        differentiable = [y for y in results if y.requires_grad]
        if way == "zero-stride gradient":
            upstreams = [torch.ones((), dtype=y.dtype).expand(y.shape) for y in differentiable]
        else:
            upstreams = [draw.normal(*y.shape, dtype=y.dtype) for y in differentiable]
        asked = [leaves[name] for name in wanted]
        double = way == "double backward"
        gradients = torch.autograd.grad(differentiable, asked, upstreams, create_graph=double, allow_unused=True)
    found = {f"result {i}": described(y) for i, y in enumerate(results)}
    found |= {f"gradient of {name}": described(g) for name, g in zip(wanted, gradients, strict=True)}
    if double:
        total = sum(g.float().square().sum() for g in gradients if g is not None and g.requires_grad)
        seconds = torch.autograd.grad(total, asked, allow_unused=True)
        found |= {f"second gradient of {name}": described(g) for name, g in zip(wanted, seconds, strict=True)}
    if counter:
        found["FLOPs"] = str(counter.get_total_flops())
    return found


def ways_of(case: Case, dtype: str, backend: str) -> list[str]:
    if backend == "triton":
        return ["inference", "training"]
    if backend != "cpu":
        return ["training", *(["autocast bfloat16"] if dtype == "float32" else [])]
    ways = ["inference", "training", "some gradients", "zero-stride gradient", "torch.library operator"]
    if dtype == "float32":
        ways += ["autocast bfloat16", "autocast float16"] + (["double backward"] if case.tiny else [])
    return ways


def record_operators(names: list[str], backends: list[str], threads: int) -> Results:
    found: Results = {}
    for name in names:
        for case in CASES[name]():
            for backend in backends:
                if backend == "triton" and not case.tiny:
                    continue
                torch.set_num_threads(threads if backend in THREADED else 1)
                dtypes = [*DTYPES, *(["float64"] if backend in ("auto", "reference") and case.tiny else [])]
                for dtype in dtypes:
                    for way in ways_of(case, dtype, backend):
                        key = f"{case.key}; {dtype}; {backend}; {way}"
                        found |= guarded(
                            key, run_case, case, getattr(torch, dtype), None if backend == "auto" else backend, way
                        )
    return found


def guarded(key: str, function: Callable[..., Results], *arguments: Any) -> Results:
    """The results under the key; of an exception only its type, as its text may change."""
    try:
        results = function(*arguments)
    except fastlm.Unsupported:
        return {key: "Unsupported"}
    except Exception as error:
        print(f"{key}: {type(error).__name__}: {error}", file=sys.stderr)
        return {key: f"raises {type(error).__name__}"}
    return {f"{key}; {name}": value for name, value in results.items()}


# 3. The optimizer


ADAMW: dict[str, dict[str, Any]] = {
    "plain": {},
    "no decay": {"weight_decay": 0.0, "eps": 1e-6, "betas": (0.8, 0.95)},
    "clipping": {"max_grad_norm": 0.5},
    "master weights": {"master_weights": True},
    "zeroed gradients": {"zero_gradients": True, "max_grad_norm": 100.0},
    "everything": {"master_weights": True, "zero_gradients": True, "max_grad_norm": 0.1, "maximize": True},
    "amsgrad": {"amsgrad": True},
}


def adamw_steps(name: str, dtype: torch.dtype, backend: str | None) -> Results:
    draw = Draw(f"adamw, {name}", dtype)
    parameters = [draw(*shape).requires_grad_() for shape in ((3,), (40, 33), (1,), (5, 7, 2), (70_001,), (0,))]
    parameters.append(draw(9, 12, layout="transposed").requires_grad_())
    options = {"lr": 1e-2} | ADAMW[name]
    optimizer = fastlm.optim.AdamW(parameters, backend=backend, **options)
    for _ in range(3):
        for p in parameters:
            p.grad = draw(*p.shape)
        optimizer.step()
    found = {f"parameter {i}": described(p) for i, p in enumerate(parameters)}
    found |= {f"gradient {i}": described(p.grad) for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        found |= {f"state {i}, {key}": described(x) for key, x in sorted(optimizer.state[p].items())}
    if "max_grad_norm" in options:
        found["norm"] = described(optimizer.grad_norm)
    return found


def record_adamw(backends: list[str], threads: int) -> Results:
    found: Results = {}
    for backend in backends:
        torch.set_num_threads(threads if backend in THREADED else 1)
        for name in ADAMW:
            for dtype in DTYPES:
                key = f"adamw, {name}; {dtype}; {backend}"
                found |= guarded(key, adamw_steps, name, DTYPES[dtype], None if backend == "auto" else backend)
    return found


# 4. Models: a training step, an evaluation, and generation


def gpt2() -> torch.nn.Module:
    from fastlm.models import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=48, n_head=4, vocab_size=101, n_positions=64))


def bert() -> torch.nn.Module:
    from fastlm.models import BertConfig, BertForMaskedLM

    sizes = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
    return BertForMaskedLM(BertConfig(**sizes, vocab_size=101, max_position_embeddings=64))


def accelerated(kind: str, head: str, **settings: Any) -> torch.nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=101, **settings)
    return fastlm.accelerate(getattr(transformers, f"{kind}{head}")(config))


ENCODER = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "GPT-2": gpt2,
    "BERT": bert,
    "transformers GPT-2": lambda: accelerated("GPT2", "LMHeadModel", n_layer=2, n_embd=48, n_head=4, n_positions=64),
    "transformers BERT": lambda: accelerated("Bert", "ForMaskedLM", **ENCODER),
    "transformers BERT classifier": lambda: accelerated("Bert", "ForSequenceClassification", **ENCODER),
    "transformers RoBERTa": lambda: accelerated("Roberta", "ForMaskedLM", **ENCODER),
    "transformers ELECTRA": lambda: accelerated("Electra", "ForMaskedLM", embedding_size=32, **ENCODER),
    "transformers DistilBERT": lambda: accelerated(
        "DistilBert", "ForMaskedLM", n_layers=2, dim=48, n_heads=4, hidden_dim=96, max_position_embeddings=64
    ),
}
STEPS = ("float32", "bfloat16 autocast", "bfloat16", "float32, padded")


def model_step(name: str, way: str) -> Results:
    """Two training steps with AdamW and dropout, then the logits of an evaluation."""
    torch.manual_seed(SEED)
    model = MODELS[name]().train()
    if way == "bfloat16":
        model = model.bfloat16()
    draw = Draw(f"{name}, tokens", torch.float32)
    batch = {"input_ids": 3 + draw.integers(98, 3, 40)}
    if "classifier" in name:
        batch["labels"] = draw.integers(2, 3)
    elif "GPT" in name:
        batch["labels"] = batch["input_ids"].clone()
    else:
        batch["labels"] = batch["input_ids"].masked_fill(~draw.chosen(0.3, 3, 40), -100)
    if "padded" in way:
        batch["attention_mask"] = (torch.arange(40) < torch.tensor([[40], [25], [9]])).long()
    optimizer = fastlm.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0, master_weights=True)
    found: Results = {}
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in way):
            loss = model(**batch).loss
        loss.backward()
        found[f"loss {step}"] = described(loss)
        found |= {f"gradient {step} of {n}": described(p.grad) for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found |= {f"parameter {n}": described(p) for n, p in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        output = model(**batch)
    return found | {"evaluated loss": described(output.loss), "logits": described(output.logits)}


def recomputed_step(name: str, level: int, checkpointed: bool) -> Results:
    torch.manual_seed(SEED)
    model = MODELS[name]().train()
    model.recompute = level
    if checkpointed:
        model.gradient_checkpointing_enable()
    tokens = 3 + Draw(f"{name}, tokens", torch.float32).integers(98, 3, 40)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return {"loss": described(loss)} | {f"gradient of {n}": described(p.grad) for n, p in model.named_parameters()}


def generation(dtype: torch.dtype, padded: bool, options: dict[str, Any]) -> Results:
    torch.manual_seed(SEED)
    model = gpt2().to(dtype).eval()
    tokens = Draw("generation", torch.float32).integers(101, 2, 9)
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long() if padded else None
    out = model.generate(tokens, max_new_tokens=40, eos_token_id=(), attention_mask=mask, **options)
    return {"tokens": described(out)}


def accelerated_generation() -> Results:
    torch.manual_seed(SEED)
    model = MODELS["transformers GPT-2"]().eval()
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    tokens = Draw("generation", torch.float32).integers(101, 2, 9)
    with torch.no_grad():
        return {"tokens": described(model.generate(tokens, max_new_tokens=20, do_sample=False))}


def record_models(threads: int) -> Results:
    found: Results = {}
    for name in MODELS:
        torch.set_num_threads(
            1 if name.startswith("transformers") else threads
        )  # PyTorch's operators are left in those
        for way in STEPS:
            found |= guarded(f"training step, {name}; {way}", model_step, name, way)
    torch.set_num_threads(threads)
    for name in ("GPT-2", "BERT"):
        for level, checkpointed in ((0, False), (1, False), (2, False), (1, True)):
            key = f"training step, {name}; recompute {level}{', gradient checkpointing' * checkpointed}"
            found |= guarded(key, recomputed_step, name, level, checkpointed)
    sampled = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 5}
    for dtype in DTYPES:
        for padded in (False, True):
            for way, options in (("greedy", {}), ("sampled", sampled)):
                key = f"generation, {way}; {dtype}{', padded' * padded}"
                found |= guarded(key, generation, DTYPES[dtype], padded, options)
    return found | guarded("generation, transformers GPT-2; float32", accelerated_generation)


# 5. Recording and comparing


def selected(operators: list[str] | None) -> list[str]:
    every = [*CASES, "adamw", "models"]
    wrong = set(operators or []) - set(every)
    if wrong:
        sys.exit(f"operators: expected some of {', '.join(every)}, got {', '.join(sorted(wrong))}")
    return [name for name in every if operators is None or name in operators]


def correct_interpreter() -> None:
    """Triton's interpreter needs what the tests install; older checkouts do more of that, or all, by themselves."""
    corrections = Path(__file__).parents[1] / "tests" / "kernels" / "interpreter.py"
    if not (Path(fastlm.__file__).parents[1] / "kernels" / "interpreter.py").exists():
        spec = importlib.util.spec_from_file_location("corrections", corrections)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.install() if hasattr(module.backend, "accept") else module.correct()


def record(operators: list[str], backends: list[str], threads: int) -> Results:
    found = record_operators([name for name in operators if name in CASES], backends, threads)
    if "adamw" in operators:
        found |= record_adamw([name for name in backends if name != "triton"], threads)
    if "models" in operators and "triton" not in backends:
        found |= record_models(threads)
    return found


def differences(before: Results, after: Results) -> list[str]:
    lines = []
    for key in before | after:
        if key not in after or key not in before:
            lines.append(f"{key}: {'before' if key in before else 'after'} only")
        elif before[key] != after[key]:
            lines.append(f"{key}\n    before {before[key]}\n    after  {after[key]}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Record the bits of every result, and compare them with an older record."
    )
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="an older record; exit status 1 if a result differs"
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="compare this record instead of running anything")
    parser.add_argument("--operators", help=f"some of {','.join([*CASES, 'adamw', 'models'])}")
    parser.add_argument("--backends", help=f"some of {','.join(BACKENDS)},triton; default: all but triton")
    parser.add_argument(
        "--threads", type=int, default=1, help="for the CPU kernels (default: 1; the bits are the same on any)"
    )
    parser.add_argument("--show", type=int, default=20, help="how many differences to print (default: 20)")
    given = parser.parse_args()
    operators = selected(given.operators and given.operators.split(","))
    backends = given.backends.split(",") if given.backends else list(BACKENDS)
    if given.results:
        written = json.loads(given.results.read_text(encoding="utf-8"))
    else:
        if "triton" in backends and os.environ.get("TRITON_INTERPRET") == "1":
            correct_interpreter()
        results = record(operators, backends, given.threads)
        setting = {"isa": fastlm.info().isa, "torch": torch.__version__, "operators": operators, "backends": backends}
        written = {"setting": setting, "results": results}
        refused = sum(value == "Unsupported" for value in results.values())
        print(f"{fastlm.__file__}: {len(results)} results on {setting['isa']}, {refused} calls refused")
    if given.out:
        given.out.write_text(json.dumps(written, indent=0) + "\n", encoding="utf-8")
    if given.compare:
        before = json.loads(given.compare.read_text(encoding="utf-8"))
        if given.operators:  # only what has been run
            run = {"training step", "generation"} if "models" in operators else set()
            run |= set(operators)
            before["results"] = {key: v for key, v in before["results"].items() if key.split(",")[0] in run}
        if before["setting"]["isa"] != written["setting"]["isa"]:
            print(f"the ISA differs: {before['setting']['isa']} before, {written['setting']['isa']} after")
        found = differences(before["results"], written["results"])
        print(f"{len(before['results'])} results before, {len(written['results'])} after: {len(found)} differ")
        print("\n".join(found[: given.show]))
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
