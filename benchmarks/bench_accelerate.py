"""transformers models with and without fastlm.accelerate, each in a worker process.

The measurements are those of `fastlm bench --operators accelerated`. Encoding needs a checkpoint: FASTLM_TEST_MODELS,
as for the tests. The last benchmark times the Python that accelerate adds to a layer: against direct calls of the same
operators, on sizes where host time is all that counts.
"""

import os
import statistics
from pathlib import Path

import pytest
import torch
import transformers

import fastlm
from benchmarks.support import COMPILED, describe, in_both_dtypes
from fastlm.benchmarking import accelerated
from fastlm.benchmarking.machine import threads
from fastlm.benchmarking.measure import interleaved, timed
from fastlm.benchmarking.worker import Worker
from fastlm.integrations.bench import CASES, MINILM, sizes_of


@in_both_dtypes
@pytest.mark.parametrize("case", CASES)
def test_accelerated(benchmark, case, dtype):
    models, number_of_threads = os.environ.get("FASTLM_TEST_MODELS"), torch.get_num_threads()
    if case == "encoding" and models is None:
        pytest.skip("FASTLM_TEST_MODELS is not set")
    checkpoint = Path(models) / MINILM if models else None
    arguments = {"library": "fastlm", "tuned": True, "dtype": dtype, "number_of_threads": number_of_threads}
    with Worker("accelerated.work", {**arguments, "case": case, "sizes": sizes_of(case, checkpoint)}) as work:
        work()
        benchmark.pedantic(work, rounds=3)
    describe(
        benchmark,
        accelerated.compare_accelerated(case, dtype, number_of_threads, checkpoint=checkpoint, compiled=COMPILED),
    )


def gpt2_direct(layer):
    """Direct calls of the operators of a GPT-2 layer with 2 heads of 8."""
    norm1, norm2, a, m = layer.ln_1, layer.ln_2, layer.attn, layer.mlp
    w = weights_of(norm1, a.c_attn, a.c_proj, norm2, m.c_fc, m.c_proj)

    def call(x):
        y, _ = fastlm.layernorm_residual(x, None, w[0], w[1], 1e-5)
        query, key, value = (
            part.transpose(1, 2) for part in fastlm.linear(y, w[2], w[3], layout="conv1d").view(1, 4, 3, 2, 8).unbind(2)
        )
        y = fastlm.attention(query, key, value, causal=True, scale=8**-0.5).transpose(1, 2).flatten(2)
        y, x = fastlm.layernorm_residual(fastlm.linear(y, w[4], w[5], layout="conv1d"), x, w[6], w[7], 1e-5)
        return x + fastlm.gelu_mlp(y, *w[8:], approximate="tanh", layout="conv1d")

    return call


def bert_direct(layer):
    inner, out = layer.attention.self, layer.attention.output
    w = weights_of(
        inner.query,
        inner.key,
        inner.value,
        out.dense,
        out.LayerNorm,
        layer.intermediate.dense,
        layer.output.dense,
        layer.output.LayerNorm,
    )

    def call(x):
        query, key, value = (fastlm.linear(x, w[i], w[i + 1]).view(1, 4, 2, 8).transpose(1, 2) for i in (0, 2, 4))
        y = fastlm.attention(query, key, value, scale=8**-0.5).transpose(1, 2).flatten(2)
        x, _ = fastlm.layernorm_residual(fastlm.linear(y, w[6], w[7]), x, w[8], w[9], 1e-12)
        x, _ = fastlm.layernorm_residual(fastlm.gelu_mlp(x, *w[10:14]), x, w[14], w[15], 1e-12)
        return x

    return call


def weights_of(*modules):
    return [p for module in modules for p in (module.weight, module.bias)]


def tiny_layer(model):
    """A layer, the same by direct calls, and the arguments that its model calls it with."""
    if model == "gpt2":
        whole = transformers.GPT2Model(
            transformers.GPT2Config(
                n_embd=16, n_head=2, n_layer=1, n_positions=8, vocab_size=9, bos_token_id=0, eos_token_id=0
            )
        )
    else:
        whole = transformers.BertModel(
            transformers.BertConfig(
                hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64, vocab_size=9
            )
        )
    fastlm.accelerate(whole.eval())
    layer, seen = (whole.h if model == "gpt2" else whole.encoder.layer)[0], []
    with layer.register_forward_pre_hook(lambda module, args, kwargs: seen.extend((args, kwargs)), with_kwargs=True):
        whole(torch.randint(9, (1, 4)), use_cache=False)
    return layer, (gpt2_direct if model == "gpt2" else bert_direct)(layer), *seen


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "for training"])
@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_python_time_of_a_layer(benchmark, model, gradients):
    layer, bare, (x, *args), kwargs = tiny_layer(model)
    x = x.detach()
    with torch.set_grad_enabled(gradients), threads(1):
        calls = {"layer": lambda: layer(x, *args, **kwargs), "direct": lambda: bare(x)}
        assert torch.equal(calls["layer"](), calls["direct"]())
        benchmark(calls["layer"])
        taken = interleaved({name: timed(call) for name, call in calls.items()}, 4000)
    layers, bares = ([1e6 * seconds for seconds in statistics.quantiles(taken[name], n=4)] for name in calls)
    more = [f"{a - b:.1f}" for a, b in zip(layers, bares, strict=True)]
    benchmark.extra_info["microseconds beyond its operators, by quartiles"] = " / ".join(more)
    benchmark.extra_info["microseconds of its operators"] = round(bares[1], 1)
