"""The arithmetic of a training step."""

from torch import nn

from fastlm.models.encoder import EncoderForMaskedLM
from fastlm.models.language_model import LanguageModel
from fastlm.models.layers import Conv1D
from fastlm.training.objectives import CHOSEN
from fastlm.training.settings import Settings


def flops_of_step(model: LanguageModel | EncoderForMaskedLM, settings: Settings, adapters: int | None = None) -> float:
    """The floating-point operations that a step needs at least.

    A multiply-add (2) per weight of a projection and token, of those outside `base_model` per predicted token, twice
    that in the backward pass; the two products of attention, in the backward pass two for each and the scores again.
    Embeddings are not counted.

    Args:
        adapters: the number of weights of adapters on all projections. Those of the model are frozen, and their
            gradients not computed.
    """
    causal = settings.objective == "next-token"
    predicted = 1.0 if causal else CHOSEN
    in_base = set(model.base_model.modules())
    products = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            products += module.weight.numel() * (1.0 if module in in_base else predicted)
    keys = (settings.context + 1) / 2 if causal else settings.context
    attention = 3.5 * 2 * 2 * model.config.num_hidden_layers * keys * model.config.hidden_size
    passes = 3 if adapters is None else 2
    return settings.tokens_per_step * (passes * 2 * products + 3 * 2 * (adapters or 0) + attention)
