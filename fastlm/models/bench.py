"""The models whose generation `fastlm bench` measures."""

from typing import Any, cast

import torch
from torch import nn

from fastlm.models.config import GPT2Config
from fastlm.models.decoder import CausalLM
from fastlm.models.decoder_config import LlamaConfig
from fastlm.models.gpt2 import GPT2LMHeadModel
from fastlm.models.language_model import LanguageModel

GENERATORS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
    "smollm2": {  # of 135 million parameters
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True,
    },
}


def generator(name: str, dtype: torch.dtype, sizes: dict[str, Any] | None = None) -> LanguageModel:
    """One of GENERATORS with random weights, or of its architecture with other sizes."""
    torch.manual_seed(0)
    sizes = sizes or GENERATORS[name]
    if name == "gpt2":
        config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return GPT2LMHeadModel(config).to(dtype).eval()
    return CausalLM(LlamaConfig(**sizes)).to(dtype).eval()


def bytes_per_token(model: LanguageModel) -> int:
    """Of the weights that a new token reads: all but embeddings, which are looked up, unless tied to the output."""
    output = cast(Any, model).lm_head.weight
    looked_up = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return sum(p.nbytes for p in model.parameters() if p is output or not any(p is weight for weight in looked_up))
