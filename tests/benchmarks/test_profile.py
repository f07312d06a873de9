import pytest
import torch

import fastlm
from fastlm.backends import cpu
from fastlm.training.bench import Subject
from fastlm.training.profile import FASTLM, PYTORCH, profile_step

GPT = Subject("GPT-2", 2, 32, 2, 50, 2, 16)


@pytest.fixture(scope="module")
def found():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastlm.use_backend("cpu" if cpu.kernels else None):  # small calls are PyTorch's
        yield profile_step(GPT, "float32", steps=2, recompute=2)
    torch.set_num_threads(threads)


def test_every_call_of_a_kernel_is_counted(found):
    calls = {part.name: part.calls for part in found.parts if part.library == FASTLM}
    for operator in ("attention", "gelu_mlp"):
        assert calls[f"{operator}_forward"] == calls[f"{operator}_backward"] == GPT.layers
    assert calls["linear_forward"] == calls["linear_backward"] == 2 * GPT.layers
    assert calls["layernorm_residual_forward"] == calls["layernorm_residual_backward"] == 2 * GPT.layers + 1
    assert calls["linear_cross_entropy_forward"] == 1 and calls["adamw"] >= 1


def test_the_parts_and_the_rest_are_the_step(found):
    assert any(part.library == PYTORCH and part.name == "index_select" for part in found.parts)  # of the embedding
    seconds = [part.seconds for part in found.parts]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] >= 0
    assert 0 < found.outside < 1  # at these sizes much of it is Python
    assert sum(seconds) + found.outside * found.seconds == pytest.approx(found.seconds)
    assert found.as_dict()["outside"] == found.outside


def test_the_kernels_are_left_as_they_were(found):
    assert type(cpu.kernels.attention_forward).__name__ == "builtin_function_or_method"
