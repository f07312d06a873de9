"""Text from a trained model: the cache of keys and values, sampling, decoding, tokenizers. `predict` explains one step."""

from fastlm.generation.cache import KVCache
from fastlm.generation.decode import generate
from fastlm.generation.tokenizer import Tokenizer, load_tokenizer

__all__ = ["KVCache", "Tokenizer", "generate", "load_tokenizer"]
