"""Replayed and eager steps give the same. Without a GPU, recordings of operators emulate CUDA graphs (recorded.py)."""

import contextlib

import pytest
import torch

from fastlm.models.cache import KVCache
from fastlm.models.decoding import graphs
from tests.models.decoding.recorded import Recording
from tests.models.decoding.test_decode import Recorder, left_padded, prompts
from tests.models.hugging_face import ours_like, tiny_gpt2


@pytest.fixture
def recordings(monkeypatch):
    """Emulated CUDA graphs of 8 steps: the list of all captured graphs, in order."""
    made = []

    def capture(step, generator):
        return made.append(Recording(step, generator)) or made[-1]

    monkeypatch.setattr(graphs, "can_capture", lambda model, device: True)
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "STEPS_PER_GRAPH", 8)
    return made


@pytest.fixture
def replays(recordings):
    """Number of replays of each graph so far."""
    return lambda: [recording.replays for recording in recordings]


def eager_and_captured(model, *arguments, **settings):
    return (model.generate(*arguments, cuda_graphs=captured, **settings) for captured in (False, True))


@pytest.mark.parametrize(
    "shape, new, expected",
    [((1, 1), 40, [6, 7, 7, 7, 7]), ((4, 5), 30, [7, 7, 7]), ((2, 8), 5, []), ((2, 7), 1, []), ((1, 9), 2, [])],
    ids=str,
)
def test_same_tokens(shape, new, expected, replays):
    eager, replayed = eager_and_captured(ours_like(tiny_gpt2()), prompts(*shape), new)
    assert torch.equal(replayed, eager) and replayed.shape == (shape[0], shape[1] + new)
    assert replays() == expected


@pytest.mark.parametrize("prompt", [5, 47, 48, 49])
def test_beyond_the_context(prompt, replays):
    """Steps beyond the context of 48 tokens are launched one by one."""
    eager, replayed = eager_and_captured(ours_like(tiny_gpt2()), prompts(2, prompt), 60)
    assert torch.equal(replayed, eager) and replayed.shape == (2, prompt + 60)
    assert bool(replays()) == (prompt == 5)


def test_left_padded(replays):
    ids, mask = left_padded()
    eager, replayed = eager_and_captured(ours_like(tiny_gpt2()), ids, 30, attention_mask=mask)
    assert torch.equal(replayed, eager) and sum(replays()) > 20


@pytest.mark.parametrize("seed", [None, 5])
def test_same_samples(seed, replays):
    ours, ids, outcomes = ours_like(tiny_gpt2()), prompts(3, 5), []
    for captured in (False, True):
        torch.manual_seed(1)
        outcomes.append(ours.generate(ids, 30, temperature=0.9, top_k=40, top_p=0.95, seed=seed, cuda_graphs=captured))
    assert torch.equal(*outcomes) and sum(replays()) > 20


@pytest.mark.parametrize("rows, streamed", [(1, False), (4, False), (1, True)])
def test_finished_rows(rows, streamed, replays):
    """The check for finished rows runs at intervals only; tokens generated after the end are cut off."""
    ours, ids = ours_like(tiny_gpt2()), prompts(rows, 5)
    free = ours.generate(ids, 40, cuda_graphs=False)
    eos = free[:, 12].unique().tolist()
    recorders = Recorder(), Recorder()
    eager, replayed = (
        ours.generate(
            ids, 40, eos_token_id=eos, pad_token_id=130, cuda_graphs=captured, streamer=recorder if streamed else None
        )
        for captured, recorder in zip((False, True), recorders, strict=True)
    )
    assert torch.equal(replayed, eager) and replayed.shape[1] < 45
    if streamed:
        assert len(recorders[1].seen) == len(recorders[0].seen) == replayed.shape[1] - 4
        assert all(torch.equal(a, b) for a, b in zip(*(recorder.seen for recorder in recorders), strict=True))


def test_replays_run_no_python_code(replays):
    """The model runs once for the prompt and twice per graph, however many tokens each graph covers."""
    ours, calls = ours_like(tiny_gpt2()), []
    model = ours.transformer.h[0].mlp
    own = model.forward
    model.forward = lambda *given: (calls.append(1), own(*given))[1]
    ours.generate(prompts(1, 5), 35)  # windows end at 8 (too few steps for a graph), 16, 24, 32, 39
    assert len(calls) == 1 + 3 + 4 * 2


def test_empty_slots_do_not_affect_results(replays, monkeypatch):
    """The cache is allocated uninitialised; here it contains NaN."""
    original = KVCache.append

    def append(self, buffers, layer, new, end):
        allocated_now = buffers[layer] is None
        result = original(self, buffers, layer, new, end)
        if allocated_now:
            buffers[layer][:, :, end:] = torch.nan
        return result

    monkeypatch.setattr(KVCache, "append", append)
    eager, replayed = eager_and_captured(ours_like(tiny_gpt2()), prompts(2, 5), 20)
    assert torch.equal(replayed, eager)


def test_models_with_hooks_are_not_captured():
    """Hooks are Python code, which a graph does not run."""
    ours = ours_like(tiny_gpt2())
    gpu = torch.device("cuda", 0)
    assert graphs.can_capture(ours, gpu) and not graphs.can_capture(ours, torch.device("cpu"))
    for register in (ours.transformer.h[1].register_forward_hook, ours.lm_head.register_forward_pre_hook):
        handle = register(lambda *given: None)
        assert not graphs.can_capture(ours, gpu)
        handle.remove()
    assert graphs.can_capture(ours, gpu)


class Stream:
    waits_for = ()

    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        self.waits_for += (other,)


class Graph:
    """Like torch.cuda.CUDAGraph: a step that synchronised invalidates the capture, and its end reports that too."""

    generators, invalidated, begun = (), False, None

    def register_generator_state(self, generator):
        self.generators += (generator,)

    def pool(self):
        return id(self)

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.begun = pool, torch.cuda.current_stream()

    def capture_end(self):
        if self.invalidated:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.fixture
def cuda(monkeypatch):
    """The part of torch.cuda that capture() uses: two user streams, one of them current."""
    streams, current = [Stream(), Stream()], [0]

    @contextlib.contextmanager
    def on(stream):
        streams.append(stream)
        before, current[0] = current[0], len(streams) - 1
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[current[0]])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(graphs, "latest_graphs", {})
    graphs.capture_stream.cache_clear()
    yield streams, current
    graphs.capture_stream.cache_clear()


def test_captures_run_on_a_side_stream(cuda):
    """One side stream per current stream, ordered after it; graphs share a memory pool and use the given generator."""
    streams, current = cuda
    steps, generator = [], torch.Generator()
    first = graphs.capture(lambda: steps.append(torch.cuda.current_stream()), generator)
    second = graphs.capture(lambda: steps.append(torch.cuda.current_stream()), None)
    current[0] = 1
    third = graphs.capture(lambda: steps.append(torch.cuda.current_stream()), None)
    assert first.generators == (generator,) and second.generators == third.generators == ()
    assert [graph.begun for graph in (first, second, third)] == [
        (None, steps[0]),
        (id(first), steps[1]),
        (None, steps[2]),
    ]
    assert steps[0] is steps[1] is not steps[2] and not {*steps} & {*streams[:2]}
    assert steps[0].waits_for == (streams[0],) * 2 and steps[2].waits_for == (streams[1],)


def test_error_of_a_step_that_synchronises(cuda, monkeypatch):
    monkeypatch.setattr(Graph, "invalidated", True)

    def step():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(
        RuntimeError,
        match=r"generate: .* could not be captured as a CUDA graph; pass cuda_graphs=False .*previous error",
    ):
        graphs.capture(step, None)


def test_recording_refuses_to_synchronise():
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="synchronises"):
        Recording(lambda: x.sum().item(), None)
    recording = Recording(lambda: x.mul_(2).add_(x.sum() * 0), None)
    assert x.tolist() == [1, 1, 1]
    recording.replay()
    recording.replay()
    assert x.tolist() == [4, 4, 4]
