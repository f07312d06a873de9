"""`fastlm.encode` and `fastlm.rerank`. transformers is imported only when one of them is called."""

import os
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fastlm.integrations.encoding.schedule import MAX_TOKENS_PER_BATCH

__all__ = ["encode", "rerank"]


def encode(
    model: nn.Module | str | os.PathLike,
    texts: Iterable[str],
    *,
    tokenizer: Any = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    max_length: int | None = None,
    max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH,
    progress: bool | None = None,
) -> Tensor:
    """The embeddings of texts, in the order given.

    Texts are sorted by length and batches cut by the number of tokens: real ones if the model runs unpadded (an encoder
    through `fastlm.accelerate`), padded ones otherwise. The next texts are tokenized in a thread while the model runs.
    The pooling reads packed hidden states without padding them again. An embedding is computed in evaluation mode and
    without gradients; the model's mode is restored.

    Args:
        model: a transformers encoder or decoder, best after `fastlm.accelerate`; an `Encoder` or decoder of
            fastlm.models; a SentenceTransformer; or the directory of one, which is loaded and accelerated. Of a
            SentenceTransformer and its directory, the modules set pooling, normalisation, prompts and maximal length
            unless an argument does.
        texts: any iterable of strings, which is read to its end first.
        tokenizer: of transformers, or its directory; None: the SentenceTransformer's, or that in the model's directory.
        pooling: "mean", "cls" (the first token), "last", "max", "weightedmean" (weights 1, 2, 3, …) or
            "mean_sqrt_len_tokens"; None: the model's own, otherwise "last" for a causal model and "mean" for others.
        normalize: scale embeddings to length 1; None: as the modules of a SentenceTransformer do, otherwise True.
        prompt: is put before every text; None: the default prompt of a SentenceTransformer, if it has one.
        prompt_name: the name of one of its prompts.
        max_length: number of tokens to which longer texts are truncated; one warning counts them. None: the model's.
        max_tokens_per_batch: a longer text is a batch of its own.
        progress: show a progress bar on stderr; None: if it is a terminal, after a second.

    Returns:
        (len(texts), width), float32, on the CPU.

    Raises:
        TypeError, ValueError: an argument that does not fit, a text without tokens, or NaN: the message names the
            text or the weight.
        FileNotFoundError: the directory has no model or tokenizer.
        ImportError: transformers is not installed.
    """
    from fastlm.integrations.encoding import embed

    return embed.encode(
        model,
        texts,
        tokenizer=tokenizer,
        pooling=pooling,
        normalize=normalize,
        prompt=prompt,
        prompt_name=prompt_name,
        max_length=max_length,
        max_tokens_per_batch=max_tokens_per_batch,
        progress=progress,
    )


def rerank(
    model: nn.Module | str | os.PathLike,
    query: str,
    texts: Iterable[str],
    *,
    tokenizer: Any = None,
    activation: str | None = None,
    max_length: int | None = None,
    max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH,
    progress: bool | None = None,
) -> Tensor:
    """The relevance of texts to a query by a cross-encoder, in the order given. Higher is more relevant.

    Pairs of query and text are scheduled as the texts of `fastlm.encode` are.

    Args:
        model: a transformers model for the classification of sequences with one label, best after `fastlm.accelerate`;
            a CrossEncoder of sentence-transformers; or the directory of either, which is loaded and accelerated.
        query: paired with every text.
        texts: any iterable of strings, which is read to its end first.
        tokenizer: of transformers, or its directory; None: the CrossEncoder's, or that in the model's directory.
        activation: of the model's output: "sigmoid" or "identity"; None: the model's own, otherwise "sigmoid", as in
            sentence-transformers.
        max_length: number of tokens to which longer pairs are truncated; one warning counts them. None: the model's.
        max_tokens_per_batch: a longer pair is a batch of its own.
        progress: show a progress bar on stderr; None: if it is a terminal, after a second.

    Returns:
        (len(texts),), float32, on the CPU.

    Raises:
        TypeError, ValueError, FileNotFoundError, ImportError: as `fastlm.encode`.
    """
    from fastlm.integrations.encoding import pairs

    return pairs.rerank(
        model,
        query,
        texts,
        tokenizer=tokenizer,
        activation=activation,
        max_length=max_length,
        max_tokens_per_batch=max_tokens_per_batch,
        progress=progress,
    )
