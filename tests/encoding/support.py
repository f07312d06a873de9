"""Small models with a tokenizer, as directories and as models of sentence-transformers."""

import json
import random
import string

import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors

from tests.integrations.support import VOCAB, tiny

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = [a + b for a in string.ascii_lowercase[:6] for b in string.ascii_lowercase[:20]]


def tokenizer(special=True, **settings):
    """A tokenizer of words. special: with [CLS] and [SEP] around a text."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    assert len(vocabulary) <= VOCAB
    found = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        found.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokens = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, **tokens, **settings)


def texts(number, longest=30, seed=0):
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, longest))) for _ in range(number)]


def save(folder, family="Bert", head="Model", pooling=None, after=(), special=True, **changes):
    """A directory with a small model; pooling: the settings of a SentenceTransformer's Pooling."""
    torch.manual_seed(1)
    model = tiny(family, head, **changes)
    model.save_pretrained(folder)
    tokenizer(special).save_pretrained(folder)
    if pooling is not None:
        names = ["Transformer", "Pooling", *after]
        paths = ["", *(f"{i}_{name}" for i, name in enumerate(names[1:], 1))]
        for path in paths:
            (folder / path).mkdir(exist_ok=True)
        described = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (name, path) in enumerate(zip(names, paths, strict=True))
        ]
        write(folder / "modules.json", described)
        write(folder / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": False})
        write(folder / "1_Pooling/config.json", {"word_embedding_dimension": model.config.hidden_size, **pooling})
    return folder


def write(path, content):
    path.write_text(json.dumps(content))
