"""Continuing sequences token by token: the prompt in one pass, then one row per sequence and step against the cache."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from fastlm.backends.gpu import on
from fastlm.generation import graphs
from fastlm.generation.sampling import Sampling
from fastlm.generation.steps import Steps
from fastlm.ops.boundary import mismatch

if TYPE_CHECKING:
    from fastlm.models.gpt2 import GPT2LMHeadModel

PATIENCE = 16  # steps after which it is looked at, on a GPU, whether all rows have ended: that waits for it


class Streamer(Protocol):
    """Sees tokens as they come; Hugging Face's streamers fit."""

    def put(self, value: Tensor) -> None:
        """First the prompt (batch, tokens), then every step's tokens (batch,), on the CPU."""

    def end(self) -> None:
        """No more will come."""


def generate(
    model: "GPT2LMHeadModel",
    input_ids: Tensor,
    max_new_tokens: int = 20,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    streamer: Streamer | None = None,
    pad_token_id: int | None = None,
    cuda_graphs: bool = True,
) -> Tensor:
    """Continues every row of input_ids, by default with the likeliest tokens. Dropout is off meanwhile, whatever mode the model is in.

    Args:
        input_ids: (batch, tokens). Shorter rows are padded on the left, with any token, and attention_mask says where.
        max_new_tokens: how many tokens to add at most; with the prompt they must fit into the context.
        temperature, top_k, top_p: see fastlm.generation.sampling.Sampling.
        eos_token_id: the token that ends a row, or several; None: the config's; (): none does.
        seed: of the draws, for this call; None: they come from PyTorch's global generator.
        attention_mask: (batch, tokens), 0 at padding.
        streamer: sees the prompt, then the tokens of each step.
        pad_token_id: what follows the end of a row; None: the config's, or the (first) token that ends rows.
        cuda_graphs: on a GPU, replay the steps after the prompt from CUDA graphs, unless a module has forward hooks. False: launch each step for itself, as a
            model needs whose forward() looks at values.

    Returns:
        (batch, tokens + the new ones): prompt and continuation. Fewer than max_new_tokens were added where every row ended before.
    """
    sampling = Sampling(temperature, top_k, top_p)
    context = model.config.n_positions
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise mismatch("input_ids", "shape (batch, tokens), at least one of each", tuple(input_ids.shape))
    room = context - input_ids.shape[1]
    if room < 1:
        raise mismatch("input_ids", f"fewer tokens than the context of {context}", input_ids.shape[1])
    if not isinstance(max_new_tokens, int) or not 1 <= max_new_tokens <= room:
        raise mismatch(
            "max_new_tokens",
            f"a whole number from 1 to {room}: the context of {context} less the prompt of {input_ids.shape[1]}",
            max_new_tokens,
        )
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise mismatch(
                "attention_mask", f"shape {tuple(input_ids.shape)}, as input_ids", tuple(attention_mask.shape)
            )
        if not attention_mask[:, -1].all():
            raise mismatch(
                "attention_mask",
                "padding on the left, so that every row ends in a real token",
                "a last column with zeros",
            )
        attention_mask = None if attention_mask.all() else attention_mask.bool()
    eos = tuple_of(model.config.eos_token_id if eos_token_id is None else eos_token_id)
    pad = next((p for p in (pad_token_id, model.config.pad_token_id, *eos) if p is not None), 0)
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    steps_of = graphs.CapturedSteps if cuda_graphs and graphs.possible(model, input_ids.device) else Steps
    with evaluating(model), torch.inference_mode(), on(input_ids):
        sequences = continued(
            steps_of(model, input_ids, max_new_tokens, sampling, eos, pad, generator, attention_mask), streamer
        )
    return sequences.clone()  # outside inference mode, so that training on them is possible


def continued(step: Steps, streamer: Streamer | None) -> Tensor:
    if streamer is not None:
        streamer.put(step.sequences[:, : step.prompt].cpu())
    patience = 1 if step.waits or streamer is not None else PATIENCE
    for end in range(step.prompt, step.capacity):
        step(end)
        if streamer is not None:
            streamer.put(step.sequences[:, end].cpu())
        if step.endings.numel() and (end - step.prompt + 1) % patience == 0 and step.ended.all():
            break
    if streamer is not None:
        streamer.end()
    return step.sequences[:, : step.prompt + int(step.begun.cpu())]


def tuple_of(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards for every module the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
