"""Encodes texts with a tokenizer, also as the program of a worker process.

The process reads the tokenizer and then lists of texts from stdin, and writes their ids or an error to stdout, all in
pickle's format. It ends at the end of stdin, thus with the process that started it. It imports nothing of the package:
PyTorch would take seconds and hundreds of megabytes in each process.
"""

import os
import pickle
import sys
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], dtype: np.dtype) -> tuple[np.ndarray, list[int]]:
    """The ids of all texts, one after another, and the number of each."""
    found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    lengths = [len(one) for one in found]
    ids = np.empty(sum(lengths), dtype=dtype)
    end = 0
    for one, length in zip(found, lengths, strict=True):
        ids[end : end + length] = one.ids
        end += length
    return ids, lengths


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    content, dtype = pickle.load(requests)
    tokenizer = Tokenizer.from_str(content)
    while True:
        try:
            texts = pickle.load(requests)
        except EOFError:
            return
        try:
            answer: object = encode_texts(tokenizer, texts, dtype)
        except Exception as error:  # the library raises plain Exception
            answer = str(error)
        try:
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except BrokenPipeError:  # the process that started this one was killed
            os._exit(1)


if __name__ == "__main__":
    main()
