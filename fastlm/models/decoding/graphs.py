"""Decoding steps as CUDA graphs: one graph launch per token in place of hundreds of small kernel launches.

A graph repeats the same kernels on the same memory. A captured step therefore reads the position of its token from
a tensor instead of a Python number, and attends to as many cache slots as any of its replays needs; a mask hides the
slots that are still empty.
"""

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.models.base import PretrainedModel
from fastlm.models.cache import KVCache
from fastlm.models.decoding.steps import DecodingSteps

# Tokens per graph. A replay attends to at most this many empty slots; each new graph costs two eager steps.
STEPS_PER_GRAPH = 128
MIN_REPLAYS = 4  # fewer replays than this do not repay a capture
CAPTURE_LOCK = threading.Lock()  # two threads cannot capture on the same stream

# The latest graph of each replaying stream. The next graph shares its memory pool: PyTorch frees the pools of
# destroyed graphs only when memory runs out.
latest_graphs: dict[torch.cuda.Stream, torch.cuda.CUDAGraph] = {}


class SlotCache(KVCache):
    """A view of a KV cache for a captured step.

    The new token is written to the slot given by `slot`, a (1,) int64 tensor, and the first `window` slots are
    attended to, whether filled or not.
    """

    def __init__(self, cache: KVCache, slot: Tensor, window: int) -> None:
        super().__init__(len(cache.keys), cache.capacity)
        self.keys, self.values, self.slot = cache.keys, cache.values, slot
        self.length = window - 1  # the new token counts as the last one: only the mask hides keys

    def append(self, buffers: list[Tensor | None], layer: int, new: Tensor, end: int) -> Tensor:
        buffer = buffers[layer]
        assert buffer is not None  # allocated by the prompt
        buffer.index_copy_(2, self.slot, new)
        return buffer[:, :, :end]


class CapturedSteps(DecodingSteps):
    """DecodingSteps on a GPU. After the prompt, a captured step is replayed until it no longer covers the sequence;
    then a wider one is captured. Steps beyond the context are launched one by one.

    Attributes read and written by the graphs:
        token: (batch, 1), the latest token of every row.
        slot: (1,) int64, its cache slot.
        position: (batch or 1, 1) int64, its position in the row without padding.
        filled: (batch, tokens + max_new_tokens) bool, slots that hold real tokens.
    """

    synchronous = False
    window = 0  # cache slots that a step attends to at present
    captured = False  # whether self.graph attends to that many

    def __call__(self, position: int) -> None:
        if position > self.context:
            self.slide(position)
            return
        if position == self.prompt:
            super().__call__(position)
            self.prepare()
            return
        window = min(-(-position // STEPS_PER_GRAPH) * STEPS_PER_GRAPH, self.cache.capacity)
        if window != self.window:
            self.window, self.captured = window, False
            self.step()  # once eagerly, as kernels cannot be compiled during a capture
        elif self.captured or window - position >= MIN_REPLAYS:
            if not self.captured:
                self.graph = capture(self.step, self.generator)
                self.captured = True
            self.graph.replay()
        else:
            self.step()

    def prepare(self) -> None:
        """Sets up the tensors of the graphs after the prompt and the first token."""
        for buffer in (*self.cache.keys, *self.cache.values):
            assert buffer is not None  # allocated by the prompt
            buffer[:, :, self.prompt :].zero_()  # a masked slot must be finite: 0 · NaN is NaN
        self.slot = self.num_generated.new_full((1,), self.prompt)
        self.token = self.sequences[:, self.prompt, None].clone()
        position = self.slot if self.position_ids is None else self.position_ids[:, self.prompt]
        self.position = position.clone()[:, None]
        if self.attention_mask is None:
            self.filled = self.finished.new_ones(self.sequences.shape)
        else:
            self.filled = self.attention_mask.clone()
        self.filled[:, self.prompt + 1 :] = False

    def step(self) -> None:
        cache = SlotCache(self.cache, self.slot, self.window)
        mask = self.filled[:, : self.window]
        logits = self.model(self.token, cache, mask, position_ids=self.position, logits_to_keep=1).logits
        self.token.copy_(self.next_tokens(logits)[:, None])
        self.slot += 1
        self.position += 1
        self.sequences.index_copy_(1, self.slot, self.token)
        self.filled.index_fill_(1, self.slot, True)


def can_capture(model: PretrainedModel, device: torch.device) -> bool:
    """Whether the model is on a GPU, has no forward hooks (a graph repeats kernels, not Python code) and no layer with
    a window, whose tokens move within its cache."""
    return (
        device.type == "cuda"
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        and all(window is None for window in model.new_cache(1).windows)
    )


@functools.cache
def capture_stream(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """The stream for captures to be replayed on `stream`: always the same, as cuBLAS keeps a workspace per stream."""
    return torch.cuda.Stream(stream.device)


def capture(step: Callable[[], None], generator: torch.Generator | None) -> torch.cuda.CUDAGraph:
    """Captures the kernel launches of `step` for replay on the current stream.

    `step` must have run once before, so that all its kernels are compiled. Unlike the context manager
    torch.cuda.graph, this neither collects garbage nor empties PyTorch's memory cache, which would synchronise.

    Args:
        generator: the random generator that the step draws from; None: the default one.

    Raises:
        RuntimeError: the step synchronises with the GPU, which a graph cannot.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    current = torch.cuda.current_stream()
    with CAPTURE_LOCK, torch.cuda.stream(capture_stream(current)):
        torch.cuda.current_stream().wait_stream(current)
        pool = latest_graphs[current].pool() if current in latest_graphs else None
        try:
            # "thread_local": other threads may use the GPU during the capture.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        except RuntimeError as error:
            raise RuntimeError(
                f"generate: a decoding step could not be captured as a CUDA graph; pass cuda_graphs=False ({error})"
            ) from error
        latest_graphs[current] = graph
    return graph
