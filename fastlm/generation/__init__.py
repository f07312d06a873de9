"""Text generation with a trained model: tokenizers, `generate`, and `predict`, which shows a single step."""

from fastlm.generation.tokenizer import Tokenizer, load_tokenizer
from fastlm.models.cache import KVCache
from fastlm.models.decoding import Sampling, Streamer, generate

__all__ = ["KVCache", "Sampling", "Streamer", "Tokenizer", "generate", "load_tokenizer"]
