"""transformers models after fastlm.accelerate against the same models as they come: eager, and torch.compile (BENCH_COMPILE=0 leaves it out), in turn in one
process. The steps are forward, backward and AdamW.

The last benchmark times what accelerate adds in Python to a layer: against its operators called by hand, on sizes where nothing else counts.
"""

import copy
import statistics

import pytest
import torch
import transformers

import fastlm
from benchmarks.support import COMPILED, in_both_dtypes
from fastlm.benchmarking.compare import DTYPES
from fastlm.benchmarking.machine import threads
from fastlm.benchmarking.measure import Ratio, in_turn, timed

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


def padded(batch, tokens, mean):
    """Token ids of sequences of mixed length, as long as `tokens` at most and `mean` on average."""
    lengths = torch.linspace(2 * mean - tokens if 2 * mean > tokens else 1, tokens if 2 * mean > tokens else 2 * mean - 1, batch).round().long()
    lengths[-1] = tokens
    return {"input_ids": torch.randint(1000, 5000, (batch, tokens)), "attention_mask": (torch.arange(tokens) < lengths[:, None]).long()}


def against_itself(benchmark, model, work, rounds=5):
    """work(model) → a call to time. Ours under pytest-benchmark, then all in turn for the ratios."""
    ours = fastlm.accelerate(copy.deepcopy(model))
    calls = {"fastlm": work(ours), "eager": work(model)}
    if COMPILED:
        calls["compiled"] = work(torch.compile(copy.deepcopy(model)))
    benchmark.pedantic(calls["fastlm"], rounds=3, warmup_rounds=1)
    taken = in_turn({name: timed(call) for name, call in calls.items()}, rounds)
    for name in list(calls)[1:]:
        benchmark.extra_info[f"times as fast as {name}"] = str(Ratio.of(taken["fastlm"], taken[name]))
    benchmark.extra_info["threads"] = torch.get_num_threads()


@in_both_dtypes
def test_encoding(benchmark, dtype):
    """32 sentences of up to 64 tokens, half of the positions padding, with a model of MiniLM's sizes."""
    model = transformers.BertModel(transformers.BertConfig(**MINILM)).eval().to(DTYPES[dtype])
    batch = padded(32, 64, 32)

    def work(model):
        def call():
            with torch.inference_mode():
                return model(**batch)

        return call

    against_itself(benchmark, model, work)


def stepping(batch):
    def work(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step():
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()

        return step

    return work


@in_both_dtypes
def test_finetuning_bert(benchmark, dtype):
    """BERT base with a classifier: 16 sequences padded to 128 tokens, of 64 on average, dropout 0.1."""
    model = transformers.BertForSequenceClassification(transformers.BertConfig()).train().to(DTYPES[dtype])
    against_itself(benchmark, model, stepping(padded(16, 128, 64) | {"labels": torch.randint(0, 2, (16,))}))


@in_both_dtypes
def test_finetuning_gpt2(benchmark, dtype):
    """GPT-2 small: 2 sequences of 512 tokens, dropout 0.1."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).train().to(DTYPES[dtype])
    x = torch.randint(0, 50257, (2, 512))
    against_itself(benchmark, model, stepping({"input_ids": x, "labels": x}))


def by_hand(layer):
    """The operators of a GPT-2 layer of 2 heads of 8, as one would call them."""
    norm1, norm2, a, m = layer.ln_1, layer.ln_2, layer.attn, layer.mlp
    w = [p for module in (norm1, a.c_attn, a.c_proj, norm2, m.c_fc, m.c_proj) for p in (module.weight, module.bias)]

    def call(x):
        y, _ = fastlm.layernorm_residual(x, None, w[0], w[1], 1e-5)
        query, key, value = (part.transpose(1, 2) for part in fastlm.linear(y, w[2], w[3], layout="conv1d").view(1, 4, 3, 2, 8).unbind(2))
        y = fastlm.attention(query, key, value, causal=True, scale=8**-0.5).transpose(1, 2).flatten(2)
        y, x = fastlm.layernorm_residual(fastlm.linear(y, w[4], w[5], layout="conv1d"), x, w[6], w[7], 1e-5)
        return x + fastlm.gelu_mlp(y, *w[8:], approximate="tanh", layout="conv1d")

    return call


@pytest.mark.parametrize("gradients", [False, True])
def test_python_time_of_a_layer(benchmark, gradients):
    config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=1, n_positions=8, vocab_size=9)
    layer = fastlm.accelerate(transformers.GPT2Model(config).eval()).h[0]
    bare, x = by_hand(layer), torch.randn(1, 4, 16)
    with torch.set_grad_enabled(gradients), threads(1):
        assert torch.equal(bare(x), layer(x))
        benchmark(layer, x)
        taken = in_turn({"layer": timed(lambda: layer(x)), "by hand": timed(lambda: bare(x))}, 200, least=0.002)
    extra = statistics.median(a - b for a, b in zip(taken["layer"], taken["by hand"], strict=True))
    benchmark.extra_info |= {"microseconds more than the operators": round(1e6 * extra, 1), "operators": round(1e6 * statistics.median(taken["by hand"]), 1)}
