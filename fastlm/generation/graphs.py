"""A decoding step as a CUDA graph: the hundreds of launches that one token takes, of which each does very little, become one.

A graph repeats the same kernels on the same memory. So a step that is to be captured finds the place of its token in a tensor instead of a Python number, and
looks at as many keys as it will ever be replayed for, of which a mask says which are filled.
"""

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastlm.generation.cache import KVCache
from fastlm.generation.steps import Steps

STRETCH = 128  # tokens that one graph is replayed for: as many keys are looked at in vain at most, and Python runs a step twice to make one
FEWEST = 4  # replays that are worth making one
ONE_AT_A_TIME = threading.Lock()  # two threads cannot capture on one stream

# By the stream that replays it. A later graph uses its memory: that of graphs which are gone PyTorch would keep for nobody until there is none left.
newest: dict[torch.cuda.Stream, torch.cuda.CUDAGraph] = {}


class PlacedCache(KVCache):
    """A cache as a captured step sees it: the new token goes to `place`, (1,) int64, and the first `seen` places are looked at, filled or not."""

    def __init__(self, cache: KVCache, place: Tensor, seen: int) -> None:
        super().__init__(0, cache.capacity)
        self.keys, self.values, self.place = cache.keys, cache.values, place
        self.length = seen - 1  # the new token is taken for the last of them: the mask alone hides any

    def append(self, store: list[Tensor | None], layer: int, new: Tensor, end: int) -> Tensor:
        kept = store[layer]
        assert kept is not None  # the prompt's
        kept.index_copy_(2, self.place, new)
        return kept[:, :, :end]


class CapturedSteps(Steps):
    """The same on a GPU: after the prompt what one graph does is repeated, until more keys must be looked at, for which another is made.

    Attributes, which a graph reads and writes:
        token: (batch, 1), the last one of every row; place: (1,) int64, where it stands.
        position: (batch or 1, 1) int64, its number within the row, padding not counted.
        filled: (batch, tokens + max_new_tokens), where there is a token that is not padding.
    """

    waits = False
    seen = 0  # places that the steps look at now
    captured = False  # whether the graph does

    def __call__(self, end: int) -> None:
        if end == self.prompt:
            super().__call__(end)
            self.prepare()
            return
        seen = min(-(-end // STRETCH) * STRETCH, self.capacity)
        if seen != self.seen:
            self.seen, self.captured = seen, False
            self.in_place()  # once without a graph: what is new is compiled, which cannot be captured
        elif self.captured or seen - end >= FEWEST:
            if not self.captured:
                self.graph = capture(self.in_place, self.generator)
                self.captured = True
            self.graph.replay()
        else:
            self.in_place()

    def prepare(self) -> None:
        """After the prompt and the first token. What stands in the memory of a cache where no token is must be finite: a weight of 0 does not hide a NaN."""
        for kept in (*self.cache.keys, *self.cache.values):
            assert kept is not None  # the prompt has been written there
            kept[:, :, self.prompt :].zero_()
        self.place = self.begun.new_full((1,), self.prompt)
        self.token = self.sequences[:, self.prompt, None].clone()
        self.position = (self.place if self.positions is None else self.positions[:, self.prompt]).clone()[:, None]
        self.filled = self.ended.new_ones(self.sequences.shape) if self.real is None else self.real.clone()
        self.filled[:, self.prompt + 1 :] = False

    def in_place(self) -> None:
        cache = PlacedCache(self.cache, self.place, self.seen)
        logits = self.model(
            self.token, cache, self.filled[:, : self.seen], position_ids=self.position, logits_to_keep=1
        ).logits
        self.token.copy_(self.chosen(logits)[:, None])
        self.place += 1
        self.position += 1
        self.sequences.index_copy_(1, self.place, self.token)
        self.filled.index_fill_(1, self.place, True)


def possible(model: nn.Module, device: torch.device) -> bool:
    """On a GPU, and where nobody's hooks are to be called with each step: a graph repeats kernels, not Python."""
    return device.type == "cuda" and not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )


@functools.cache
def beside(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """Where captures take place of what is replayed on `stream`: always the same, as cuBLAS keeps memory for every stream that it has seen."""
    return torch.cuda.Stream(stream.device)


def capture(step: Callable[[], None], generator: torch.Generator | None) -> torch.cuda.CUDAGraph:
    """What `step` launches on the current device, for replaying on the current stream; it must have run before, so that nothing is compiled now.

    Unlike the context manager torch.cuda.graph this neither collects garbage nor gives PyTorch's cached memory back to the driver, for which
    everything on the GPU would have to end.

    Args:
        generator: what the step draws from, if not the default one.

    Raises:
        RuntimeError: the step waits for the GPU, which a graph cannot.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    current = torch.cuda.current_stream()
    with ONE_AT_A_TIME, torch.cuda.stream(beside(current)):
        torch.cuda.current_stream().wait_stream(current)
        pool = newest[current].pool() if current in newest else None
        try:
            graph.capture_begin(
                pool, capture_error_mode="thread_local"
            )  # other threads may go on with what they do on the GPU
            try:
                step()
            finally:
                graph.capture_end()
        except RuntimeError as why:
            raise RuntimeError(
                f"a step of generate could not be captured; cuda_graphs=False launches each step for itself ({why})"
            ) from why
        newest[current] = graph
    return graph
