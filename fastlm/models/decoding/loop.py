"""The decoding loop: the prompt in one forward pass (prefill), then one token per sequence and step."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fastlm.backends.gpu import on_device
from fastlm.core.errors import mismatch
from fastlm.models.base import PretrainedModel
from fastlm.models.decoding import graphs
from fastlm.models.decoding.sampling import Sampling
from fastlm.models.decoding.steps import DecodingSteps

# On a GPU, the number of steps between two checks of whether all rows have finished; a check synchronises.
CHECK_INTERVAL = 16


class Streamer(Protocol):
    """Receives tokens as they are generated; Hugging Face's streamers have this interface."""

    def put(self, value: Tensor) -> None:
        """Called first with the prompt (batch, tokens), then with each step's tokens (batch,), on the CPU."""

    def end(self) -> None:
        """Called once, after the last token."""


def generate(
    model: PretrainedModel,
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
    """Generates a continuation of every row of input_ids, greedily by default.

    Every token is predicted from the tokens before it, of which the model reads the last max_position_embeddings (its
    context): beyond it, the window slides, and each step takes as long as the whole context. Dropout is disabled,
    whether the model is in training mode or not.

    Args:
        input_ids: (batch, tokens). Shorter rows are padded on the left with any token; attention_mask marks padding.
        max_new_tokens: maximum number of tokens to add.
        temperature, top_k, top_p: see fastlm.generation.Sampling.
        eos_token_id: the token or tokens that end a row; None: those of the model's config; (): none.
        seed: of the random generator of this call; None: PyTorch's default generator is used.
        attention_mask: (batch, tokens), 0 at padding.
        streamer: receives the prompt, then the tokens of each step.
        pad_token_id: the token that follows the end of a row; None: the config's, or else the first eos token.
        cuda_graphs: on a GPU, replay the steps after the prompt from CUDA graphs, unless a module has forward hooks.
            False: launch every kernel of every step. Models whose forward() reads tensor values on the host need it.

    Returns:
        (batch, tokens + new tokens): prompt and continuation. Fewer than max_new_tokens are added when every row
        has ended earlier.

    Raises:
        ValueError: an argument is invalid; the message names it.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise mismatch("input_ids", "shape (batch, tokens) with at least one of each", tuple(input_ids.shape))
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise mismatch("max_new_tokens", "an integer >= 1", max_new_tokens)
    if seed is not None and not (isinstance(seed, int) and -(2**63) <= seed < 2**64):
        raise mismatch("seed", "an integer in [-2^63, 2^64)", seed)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise mismatch(
                "attention_mask", f"shape {tuple(input_ids.shape)}, as input_ids", tuple(attention_mask.shape)
            )
        if not attention_mask[:, -1].all():
            raise mismatch("attention_mask", "padding on the left only", "zeros in the last column")
        attention_mask = None if attention_mask.all() else attention_mask.bool()
    eos = as_tuple(model.config.eos_token_id if eos_token_id is None else eos_token_id)
    pad = next((p for p in (pad_token_id, model.config.pad_token_id, *eos) if p is not None), 0)
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    use_graphs = cuda_graphs and graphs.can_capture(model, input_ids.device)
    steps_class = graphs.CapturedSteps if use_graphs else DecodingSteps
    with evaluation_mode(model), torch.inference_mode(), on_device(input_ids):
        steps = steps_class(model, input_ids, max_new_tokens, sampling, eos, pad, generator, attention_mask)
        sequences = run(steps, streamer)
    return sequences.clone()  # outside inference mode: an ordinary tensor, which can be trained on


def run(steps: DecodingSteps, streamer: Streamer | None) -> Tensor:
    if streamer is not None:
        streamer.put(steps.sequences[:, : steps.prompt].cpu())
    interval = 1 if steps.synchronous or streamer is not None else CHECK_INTERVAL
    for position in range(steps.prompt, steps.capacity):
        steps(position)
        if streamer is not None:
            streamer.put(steps.sequences[:, position].cpu())
        if steps.eos.numel() and (position - steps.prompt + 1) % interval == 0 and steps.finished.all():
            break
    if streamer is not None:
        streamer.end()
    return steps.sequences[:, : steps.prompt + int(steps.num_generated.cpu())]


def as_tuple(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode; on exit, restores the mode of every module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
