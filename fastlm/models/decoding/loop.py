"""The decoding loop: the prompt in one forward pass (prefill), then one token per sequence and step."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fastlm.backends.gpu import on_device
from fastlm.core.errors import check_flag, check_integer, check_tensor, mismatch, wrong_type
from fastlm.core.modules import evaluation_mode
from fastlm.models.base import PretrainedModel
from fastlm.models.decoding import graphs
from fastlm.models.decoding.sampling import Sampling
from fastlm.models.decoding.steps import DecodingSteps
from fastlm.ops.operator import check_memory

# On a GPU, the number of steps between two checks of whether all rows have finished; a check synchronises.
CHECK_INTERVAL = 16


@runtime_checkable
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
    check_tensor("input_ids", input_ids)
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask)
    check_memory(("input_ids", "attention_mask"), input_ids, attention_mask)
    if seed is not None:
        seed = check_integer("seed", seed, "an integer in [-2^63, 2^64)", range(-(2**63), 2**64))
    if not isinstance(streamer, Streamer | None):
        raise wrong_type("streamer", "an object with put() and end()", streamer)
    cuda_graphs = check_flag("cuda_graphs", cuda_graphs)
    eos, pad = token_ids(model, eos_token_id, pad_token_id)
    sampling = Sampling(temperature, top_k, top_p)
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise mismatch("input_ids", "shape (batch, tokens) with at least one of each", tuple(input_ids.shape))
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens, "an integer >= 1", range(1, 2**31))
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise mismatch(
                "attention_mask", f"shape {tuple(input_ids.shape)}, as input_ids", tuple(attention_mask.shape)
            )
        if attention_mask.device != input_ids.device:
            raise mismatch("attention_mask", f"a tensor on {input_ids.device}, as input_ids", attention_mask.device)
        if not attention_mask[:, -1].all():
            raise mismatch("attention_mask", "padding on the left only", "zeros in the last column")
        attention_mask = None if attention_mask.all() else attention_mask.bool()
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


def token_ids(
    model: PretrainedModel, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None
) -> tuple[tuple[int, ...], int]:
    """The tokens that end a row, and the one that follows them."""
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
    eos = () if eos is None else tuple(eos) if isinstance(eos, tuple | list) else (eos,)
    eos = tuple(check_integer("eos_token_id", token, "a token id or several") for token in eos)
    if pad_token_id is not None:
        pad_token_id = check_integer("pad_token_id", pad_token_id, "a token id")
    return eos, next((p for p in (pad_token_id, model.config.pad_token_id, *eos) if p is not None), 0)
