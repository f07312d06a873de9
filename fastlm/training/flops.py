"""The arithmetic of a training step."""

import re

from torch import nn

from fastlm.models.base import PretrainedModel
from fastlm.training.objectives import CHOSEN
from fastlm.training.settings import Settings

IN_LAYER = re.compile(r"\.(h|layer|layers)\.\d+\.")


def flops_of_step(model: PretrainedModel, settings: Settings) -> float:
    """The floating-point operations that a step needs at least.

    A multiply-add (2) per weight and token, of the head per predicted token, twice that in the backward pass; the two
    products of attention, in the backward pass two for each and the scores again. Embeddings are not counted.
    """
    causal = settings.objective == "next-token"
    predicted = 1.0 if causal else CHOSEN
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    vocabulary, width = model.config.vocab_size, model.config.hidden_size
    products = vocabulary * width * predicted
    for name, p in model.named_parameters():
        if p.dim() != 2 or id(p) in embeddings:
            continue
        if IN_LAYER.search(f".{name}"):
            products += p.numel()
        elif p.shape != (vocabulary, width):  # the output projection, counted above
            products += p.numel() * predicted
    keys = (settings.context + 1) / 2 if causal else settings.context
    attention = 3.5 * 2 * 2 * model.config.num_hidden_layers * keys * width
    return settings.tokens_per_step * (3 * 2 * products + attention)
