"""Llama in transformers, with the weights of a fastlm.models.CausalLM: the baseline of its training and generation."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastlm.models.decoder import CausalLM


class PlainLlama:
    """The interface of PlainGPT2 and PlainBert, for a model of transformers."""

    @staticmethod
    def like(model: CausalLM) -> nn.Module:
        import transformers

        theirs: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_dict()))
        theirs.load_state_dict(model.state_dict(), strict=False)  # without the tied output projection
        return theirs.to(model.dtype)

    @staticmethod
    def loss(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs, use_cache=False).logits.flatten(0, 1), targets.flatten())
