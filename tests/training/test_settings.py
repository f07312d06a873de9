import math

import pytest

from fastlm.training.settings import Settings


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("objective", "sentiment", "objective: expected one of next-token, masked-token, got 'sentiment'"),
        (
            "dtype",
            "float61",
            "dtype: expected one of float32, bfloat16, float16 (also fp32, bf16, fp16), got 'float61'; did you mean "
            "'float16'?",
        ),
        (
            "dtype",
            "bf61",
            "dtype: expected one of float32, bfloat16, float16 (also fp32, bf16, fp16), got 'bf61'; did you mean "
            "'bf16'?",
        ),
        ("recompute", 4, "recompute: expected one of 0, 1, 2, 3, got 4"),
        ("layers", 0, "layers: expected an integer >= 1, got 0"),
        ("batch", 1.5, "batch: expected an integer >= 1, got 1.5"),
        ("steps", True, "steps: expected an integer >= 1, got True"),
        ("warmup", -1, "warmup: expected an integer >= 0, got -1"),
        ("checkpoint_every", -1, "checkpoint_every: expected an integer >= 0, got -1"),
        ("keep", 0, "keep: expected an integer >= 1, got 0"),
        (
            "schedule",
            "sqrt",
            "schedule: expected one of cosine, linear, constant, wsd, got 'sqrt'",
        ),
        ("architecture", "lama", "architecture: expected one of gpt2, llama, bert, got 'lama'; did you mean 'llama'?"),
        ("architecture", "bert", "objective: expected masked-token for a bert, got 'next-token'"),
        ("kv_heads", 2, "kv_heads: expected no value without --architecture llama, got 2"),
        ("decay_fraction", 0.0, "decay_fraction: expected a number in (0, 1], got 0.0"),
        ("micro_batch", 13, "micro_batch: expected at most batch = 12, got 13"),
        ("max_skipped", 0, "max_skipped: expected an integer >= 1, got 0"),
        ("skip_spikes", -1.0, "skip_spikes: expected a number in [0, inf), got -1.0"),
        ("ema", 1.0, "ema: expected a number in [0, 1), got 1.0"),
        ("patience", -1, "patience: expected an integer >= 0, got -1"),
        ("decay_steps", 0, "decay_steps: expected an integer >= 1, got 0"),
        ("heads", 3, "width: expected a multiple of heads = 3, got 128"),
        ("lr", math.nan, "lr: expected a number in (0, inf), got nan"),
        ("lr", math.inf, "lr: expected a number in (0, inf), got inf"),
        ("min_lr", 1.0, "min_lr: expected a number in [0, 0.001], got 1.0"),
        ("beta1", 1.0, "beta1: expected a number in [0, 1), got 1.0"),
        ("beta2", -0.1, "beta2: expected a number in [0, 1), got -0.1"),
        ("weight_decay", -1.0, "weight_decay: expected a number in [0, inf), got -1.0"),
        ("grad_clip", -1.0, "grad_clip: expected a number in [0, inf), got -1.0"),
        ("dropout", 1.0, "dropout: expected a number in [0, 1), got 1.0"),
        ("seed", 2**63, "seed: expected an integer < 2^63, got 9223372036854775808"),
    ],
)
def test_errors(name, value, message):
    with pytest.raises(ValueError) as error:
        Settings(**{name: value})
    assert str(error.value) == message


def test_inclusive_bounds():
    Settings(min_lr=1e-3, dropout=0.0, weight_decay=0.0, grad_clip=0.0, beta1=0.0, warmup=0)


@pytest.mark.parametrize(
    "short, full", [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("bfloat16", "bfloat16")]
)
def test_short_dtype_names(short, full):
    assert Settings(dtype=short).dtype == full
