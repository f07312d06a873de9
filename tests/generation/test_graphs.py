"""Steps replayed from graphs against steps that are launched one by one. Without a GPU the graphs are recordings of operators (recorded.py)."""

import contextlib

import pytest
import torch

from fastlm.generation import KVCache, graphs
from tests.generation.recorded import Recording
from tests.generation.test_decode import Recorder, left_padded, prompts
from tests.models.hugging_face import ours_like, tiny_gpt2


@pytest.fixture
def recordings(monkeypatch):
    """CUDA graphs of `STRETCH` steps on this device: those that were made, in order."""
    made = []

    def capture(step, generator):
        return made.append(Recording(step, generator)) or made[-1]

    monkeypatch.setattr(graphs, "possible", lambda model, device: True)
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "STRETCH", 8)
    return made


@pytest.fixture
def replays(recordings):
    """How many there were so far, of each graph."""
    return lambda: [recording.replays for recording in recordings]


def both_ways(model, *arguments, **settings):
    return (model.generate(*arguments, cuda_graphs=captured, **settings) for captured in (False, True))


@pytest.mark.parametrize(
    "shape, new, expected",
    [((1, 1), 40, [6, 7, 7, 7, 7]), ((4, 5), 30, [7, 7, 7]), ((2, 8), 5, []), ((2, 7), 1, []), ((1, 9), 2, [])],
    ids=str,
)
def test_the_same_tokens(shape, new, expected, replays):
    step_by_step, replayed = both_ways(ours_like(tiny_gpt2()), prompts(*shape), new)
    assert torch.equal(replayed, step_by_step) and replayed.shape == (shape[0], shape[1] + new)
    assert replays() == expected


def test_left_padded(replays):
    ids, mask = left_padded()
    step_by_step, replayed = both_ways(ours_like(tiny_gpt2()), ids, 30, attention_mask=mask)
    assert torch.equal(replayed, step_by_step) and sum(replays()) > 20


@pytest.mark.parametrize("seed", [None, 5])
def test_the_same_draws(seed, replays):
    ours, ids, outcomes = ours_like(tiny_gpt2()), prompts(3, 5), []
    for captured in (False, True):
        torch.manual_seed(1)
        outcomes.append(ours.generate(ids, 30, temperature=0.9, top_k=40, top_p=0.95, seed=seed, cuda_graphs=captured))
    assert torch.equal(*outcomes) and sum(replays()) > 20


@pytest.mark.parametrize("rows, streamed", [(1, False), (4, False), (1, True)])
def test_ends(rows, streamed, replays):
    """Whether all rows have ended is looked at now and then only; what was made after that is cut off."""
    ours, ids = ours_like(tiny_gpt2()), prompts(rows, 5)
    free = ours.generate(ids, 40, cuda_graphs=False)
    eos = free[:, 12].unique().tolist()
    recorders = Recorder(), Recorder()
    step_by_step, replayed = (
        ours.generate(
            ids, 40, eos_token_id=eos, pad_token_id=130, cuda_graphs=captured, streamer=recorder if streamed else None
        )
        for captured, recorder in zip((False, True), recorders, strict=True)
    )
    assert torch.equal(replayed, step_by_step) and replayed.shape[1] < 45
    if streamed:
        assert len(recorders[1].seen) == len(recorders[0].seen) == replayed.shape[1] - 4
        assert all(torch.equal(a, b) for a, b in zip(*(recorder.seen for recorder in recorders), strict=True))


def test_nothing_of_a_step_is_in_python(replays):
    """The prompt is read, then the model runs twice a graph, whatever number of tokens that makes."""
    ours, calls = ours_like(tiny_gpt2()), []
    model = ours.transformer.h[0].mlp
    own = model.forward
    model.forward = lambda *given: (calls.append(1), own(*given))[1]
    ours.generate(prompts(1, 5), 35)  # to places 8 (too few for a graph), 16, 24, 32, 39
    assert len(calls) == 1 + 3 + 4 * 2


def test_memory_without_tokens_is_not_seen(replays, monkeypatch):
    """A cache is made of memory as it comes: NaN, here."""
    made = KVCache.append

    def append(self, store, layer, new, end):
        fresh = store[layer] is None
        result = made(self, store, layer, new, end)
        if fresh:
            store[layer][:, :, end:] = torch.nan
        return result

    monkeypatch.setattr(KVCache, "append", append)
    step_by_step, replayed = both_ways(ours_like(tiny_gpt2()), prompts(2, 5), 20)
    assert torch.equal(replayed, step_by_step)


def test_who_looks_at_each_step_sees_each_step():
    """Hooks are Python, which a graph does not repeat."""
    ours = ours_like(tiny_gpt2())
    gpu = torch.device("cuda", 0)
    assert graphs.possible(ours, gpu) and not graphs.possible(ours, torch.device("cpu"))
    for register in (ours.transformer.h[1].register_forward_hook, ours.lm_head.register_forward_pre_hook):
        handle = register(lambda *given: None)
        assert not graphs.possible(ours, gpu)
        handle.remove()
    assert graphs.possible(ours, gpu)


class Stream:
    waits_for = ()

    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        self.waits_for += (other,)


class Graph:
    """As CUDA's: a step that waits has spoilt it, which its end says too."""

    generators, spoilt, begun = (), False, None

    def register_generator_state(self, generator):
        self.generators += (generator,)

    def pool(self):
        return id(self)

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.begun = pool, torch.cuda.current_stream()

    def capture_end(self):
        if self.spoilt:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.fixture
def cuda(monkeypatch):
    """As far as a capture asks: torch.cuda with two streams of a user's, and the one that is current."""
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
    monkeypatch.setattr(graphs, "newest", {})
    graphs.beside.cache_clear()
    yield streams, current
    graphs.beside.cache_clear()


def test_captures_take_place_beside_the_current_stream(cuda):
    """On the same one each time, after what is on the current one, in the memory of the one before; and draw from the generator that is given."""
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


def test_a_step_that_waits_is_told_what_to_do(cuda, monkeypatch):
    monkeypatch.setattr(Graph, "spoilt", True)

    def step():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(
        RuntimeError,
        match=r"a step of generate could not be captured; cuda_graphs=False launches each step for itself .*previous error",
    ):
        graphs.capture(step, None)


def test_the_recording_refuses_to_wait():
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="waits"):
        Recording(lambda: x.sum().item(), None)
    recording = Recording(lambda: x.mul_(2).add_(x.sum() * 0), None)
    assert x.tolist() == [1, 1, 1]
    recording.replay()
    recording.replay()
    assert x.tolist() == [4, 4, 4]
