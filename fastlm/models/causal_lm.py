"""The base class of causal language models."""

from fastlm.models.base import PretrainedModel
from fastlm.models.decoding import generate


class CausalLM(PretrainedModel):
    """A model that predicts the next token.

    forward() takes input_ids, past_key_values (a KVCache), attention_mask, position_ids and logits_to_keep, and
    returns an output with logits. The config has max_position_embeddings, num_hidden_layers, eos_token_id and
    pad_token_id.
    """

    generate = generate
