import itertools

import pytest
import torch

from fastlm.models import packing
from tests.models.hugging_face import DECODERS, ENCODERS, encoder_like, ours_like, tiny_decoder, tiny_encoder, tiny_gpt2


def test_gather_and_scatter_gradients():
    index = torch.tensor([0, 2, 3, 7])
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for function, inputs in ((packing.Gather.apply, (x, index)), (packing.Scatter.apply, (y, index, 8))):
        assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


ENDS = torch.tensor([0, 5, 12, 16, 24])  # two rows of twelve tokens: sequences of 5, 7, 4 and 8
KINDS = ["gpt2", *DECODERS, *(family for family in ENCODERS if family not in ("MPNet", "Gemma3Text"))]


def model_of(kind):
    if kind == "gpt2":
        return ours_like(tiny_gpt2())
    return ours_like(tiny_decoder(kind)) if kind in DECODERS else encoder_like(tiny_encoder(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_those_of_a_batch_each(kind):
    """Logits, loss and gradients."""
    model = model_of(kind).double().eval()
    ids = torch.randint(2, 131, (2, 12))
    labels = torch.randint(131, (2, 12)).masked_fill(torch.rand(2, 12) < 0.2, -100)
    packed_output = model(input_ids=ids, labels=labels, cu_seqlens=ENDS)
    packed_loss = packed_output.loss
    gradients = torch.autograd.grad(packed_loss, list(model.parameters()), allow_unused=True)
    total, count = 0.0, 0
    for begin, end in itertools.pairwise(ENDS.tolist()):
        own = slice(begin, end)
        alone = model(input_ids=ids.flatten()[own][None], labels=labels.flatten()[own][None])
        torch.testing.assert_close(packed_output.logits.flatten(0, 1)[own], alone.logits[0])
        predicted = labels.flatten()[own] if kind in ENCODERS else labels.flatten()[own][1:]
        if (targets := int((predicted >= 0).sum())) > 0:
            total, count = total + alone.loss * targets, count + targets
    torch.testing.assert_close(packed_loss, total / count)
    expected = torch.autograd.grad(total / count, list(model.parameters()), allow_unused=True)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-6)
    model.train()
    if kind == "gpt2" or kind in DECODERS:  # without logits; dropout is 0
        torch.testing.assert_close(model(input_ids=ids, labels=labels, cu_seqlens=ENDS).loss, packed_loss)
        model.gradient_checkpointing_enable()
        again = torch.autograd.grad(
            model(input_ids=ids, labels=labels, cu_seqlens=ENDS).loss, list(model.parameters()), allow_unused=True
        )
        for ours, theirs in zip(again, gradients, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_packed_positions():
    positions = packing.positions_of(ENDS, 2, 12)
    assert positions.tolist() == [[*range(5), *range(7)], [*range(4), *range(8)]]
    assert packing.cu_seqlens_of(positions).tolist() == ENDS.tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "Bert"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"cu_seqlens": ENDS[:2]}, r"cu_seqlens: expected shape \(sequences \+ 1,\) with at least 2 .*, got \(2,\)"),
        ({"cu_seqlens": ENDS[None]}, r"cu_seqlens: expected shape .*, got \(1, 5\)"),
        ({"cu_seqlens": ENDS.float()}, "cu_seqlens: expected dtype torch.int32 or torch.int64, got torch.float32"),
        ({"cu_seqlens": [0, 12, 24]}, "cu_seqlens: expected a tensor, got list"),
        ({"cu_seqlens": ENDS + 1}, r"cu_seqlens: expected ascending values from 0 to 24, got \[1, 6, 13, 17, 25\]"),
        ({"cu_seqlens": torch.tensor([0, 13, 12, 24])}, "cu_seqlens: expected ascending values from 0 to 24, got .*"),
        (
            {"cu_seqlens": torch.tensor([0, 13, 24])},
            "cu_seqlens: expected a sequence that begins at each row, at multiples of 12, got .*",
        ),
        (
            {"attention_mask": torch.ones(2, 12)},
            "attention_mask: expected none with cu_seqlens, got a .*",
        ),
    ],
)
def test_invalid_boundaries(kind, change, message):
    arguments = {"input_ids": torch.randint(131, (2, 12)), "cu_seqlens": ENDS} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        model_of(kind)(**arguments)


def test_boundaries_exclude_a_cache():
    ids = torch.randint(131, (2, 12))
    for kind in ("gpt2", "llama"):
        with pytest.raises(ValueError, match="use_cache: expected none with cu_seqlens, got True"):
            model_of(kind)(input_ids=ids, cu_seqlens=ENDS, use_cache=True)
    with pytest.raises(ValueError, match="cu_seqlens: expected None, as mpnet has relative positions, got a tensor"):
        model_of("MPNet")(input_ids=ids, cu_seqlens=ENDS)
