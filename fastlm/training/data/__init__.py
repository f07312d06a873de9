"""Data: files to token ids in shards that are mapped into memory (corpus), and the order of training (order)."""

from fastlm.training.data.corpus import Corpus, check_length, digest_of, load
from fastlm.training.data.sources import Files, find_files
from fastlm.training.data.tokens import Tokens

__all__ = ["Corpus", "Files", "Tokens", "check_length", "digest_of", "find_files", "load"]
