"""16-bit weights against float32: is any CPU slower with the dtype that a checkpoint was stored in?

    FASTLM_ISA=avx2 pytest benchmarks/bench_stored_dtype.py

A training step and greedy generation of a Llama of 8 layers of 576 with weights in bfloat16 and float16, alternating
with the same in float32: by CausalLM, and, for comparison, by transformers with PyTorch's operators. extra_info has the
speedups over float32. FASTLM_ISA selects another of this machine's instruction sets, for fastlm only.
"""

import pytest
import torch
import transformers

import fastlm
from benchmarks.support import on_one_thread_and_two
from fastlm.benchmarking.machine import threads
from fastlm.benchmarking.measure import Ratio, interleaved, timed
from fastlm.models import CausalLM, LlamaConfig
from fastlm.models.bench import GENERATORS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONFIG = LlamaConfig(**{**GENERATORS["smollm2"], "num_hidden_layers": 8, "vocab_size": 8192})


def model_of(library: str, dtype: torch.dtype):
    torch.manual_seed(0)
    ours = CausalLM(CONFIG)
    if library == "fastlm":
        return ours.to(dtype)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_dict()))
    return theirs.to(dtype)


def training(library: str, dtype: torch.dtype):
    model = model_of(library, dtype).train()
    tokens = torch.randint(CONFIG.vocab_size, (1, 256))
    optimizer = fastlm.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def generation(library: str, dtype: torch.dtype):
    model = model_of(library, dtype).eval()
    tokens = torch.randint(CONFIG.vocab_size, (1, 16))
    how = {"eos_token_id": ()} if library == "fastlm" else {"do_sample": False, "pad_token_id": 0}
    if library == "torch":
        model.generation_config.eos_token_id = None
        how["attention_mask"] = torch.ones_like(tokens)
    return lambda: model.generate(tokens, max_new_tokens=16, **how)


@on_one_thread_and_two
@pytest.mark.parametrize("library", ["fastlm", "torch"])
@pytest.mark.parametrize("work", [training, generation])
def test_16_bits_against_float32(benchmark, work, library, number_of_threads):
    with threads(number_of_threads):
        calls = {name: work(library, dtype) for name, dtype in DTYPES.items()}
        benchmark.pedantic(calls["bfloat16"], rounds=1, warmup_rounds=1)
        seconds = interleaved({name: timed(call) for name, call in calls.items()}, 7, budget=20)
    for name in ("bfloat16", "float16"):
        benchmark.extra_info[f"{name}: speedup over float32"] = str(Ratio.of(seconds[name], seconds["float32"]))
    benchmark.extra_info["isa"] = fastlm.info().isa
