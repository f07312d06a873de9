"""The tiles of a packed batch are found by sums over blocks of sequences, under Triton's interpreter."""

import itertools
import random

import pytest
import torch

from fastlm.backends import triton as backend

triton = pytest.importorskip("triton")
tl = triton.language

from fastlm.kernels.attention_tiles import find_tile  # noqa: E402 (without Triton there is none)

TILE = 16

pytestmark = pytest.mark.skipif(backend.device_type != "cpu", reason="needs Triton's interpreter")


@triton.jit
def find_tile_kernel(starts_ptr, num_sequences, found_ptr, first_slot, TILE: tl.constexpr):
    slot = tl.program_id(0)
    batch, tile = find_tile(starts_ptr, num_sequences, first_slot + slot, TILE)
    tl.store(found_ptr + 2 * slot, batch)
    tl.store(found_ptr + 2 * slot + 1, tile)


@pytest.mark.parametrize("sequences", [1, 5, 127, 128, 129, 300])
def test_programs_find_each_tile_once(sequences):
    """Empty sequences have none; programs beyond the last tile find the number of sequences."""
    lengths = random.Random(sequences).choices([0, 0, 1, 3, 16, 17, 40], k=sequences)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    programs = sum(lengths) // TILE + sequences
    found = torch.full((programs, 2), -1, dtype=torch.int32)
    find_tile_kernel[(programs,)](starts, sequences, found, 0, TILE)
    expected = [(i, tile) for i, length in enumerate(lengths) for tile in range(-(-length // TILE))]
    assert list(map(tuple, found.tolist()))[: len(expected)] == expected
    assert (found[len(expected) :, 0] == sequences).all()


def test_thousands_of_sequences_take_few_steps():
    """The last program reads the starts in blocks, not one after the other."""
    sequences, found = 4000, torch.zeros(1, 2, dtype=torch.int32)
    starts, loads = torch.arange(sequences + 1, dtype=torch.int32), []
    load = triton.runtime.interpreter.interpreter_builder.create_masked_load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            triton.runtime.interpreter.interpreter_builder,
            "create_masked_load",
            lambda *arguments: (loads.append(1), load(*arguments))[1],
        )
        find_tile_kernel[(1,)](starts, sequences, found, sequences - 1, TILE)
    assert found[0].tolist() == [sequences - 1, 0] and 0 < len(loads) <= 2 * -(-sequences // 128)
