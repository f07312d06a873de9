"""Embeddings and relevance scores of many texts. api.py has the public functions."""
