import pytest
import torch

from fastlm.backends import cpu
from fastlm.benchmarking.profile import OURS, THEIRS, profile_step
from fastlm.benchmarking.whole import Subject

GPT = Subject("GPT-2", 2, 32, 2, 50, 2, 16)


@pytest.fixture(scope="module")
def found():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield profile_step(GPT, "float32", steps=2, recompute=2)
    torch.set_num_threads(threads)


def test_every_kernel_of_a_step_is_seen_as_often_as_it_is_called(found):
    calls = {part.name: part.calls for part in found.parts if part.library == OURS}
    assert (
        calls["attention_forward"]
        == calls["attention_backward"]
        == calls["gelu_mlp_forward"]
        == calls["gelu_mlp_backward"]
        == GPT.layers
    )
    assert calls["linear_forward"] == calls["linear_backward"] == 2 * GPT.layers
    assert calls["layernorm_residual_forward"] == calls["layernorm_residual_backward"] == 2 * GPT.layers + 1
    assert calls["linear_cross_entropy_forward"] == 1 and calls["adamw"] >= 1


def test_the_parts_and_the_rest_are_the_step(found):
    assert any(part.library == THEIRS and part.name == "index_select" for part in found.parts)  # of the embedding
    assert all(part.seconds >= 0 for part in found.parts) and [*found.parts] == sorted(
        found.parts, key=lambda part: -part.seconds
    )
    assert 0 < found.outside < 1  # on sizes as small as these Python is much of it
    assert sum(part.seconds for part in found.parts) + found.outside * found.seconds == pytest.approx(found.seconds)
    assert found.as_dict()["outside"] == found.outside


def test_the_kernels_are_left_as_they_were(found):
    assert not hasattr(cpu.kernels, "marked") and cpu.kernels.__name__.startswith("fastlm._cpu_")
