"""Encodes sentences with an accelerated SentenceTransformer and prints the nearest sentence to each.

python examples/encode_sentences.py path/to/minilm
"""

import sys

from sentence_transformers import SentenceTransformer

import fastlm

SENTENCES = [
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping by the window in the sun.",
    "The central bank raised its interest rate by half a point.",
    "Loans became more expensive after the decision of the monetary authority on Thursday.",
]


def main():
    model = fastlm.accelerate(SentenceTransformer(sys.argv[1]))
    embeddings = model.encode(SENTENCES, normalize_embeddings=True, convert_to_tensor=True)
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-1)
    for sentence, nearest in zip(SENTENCES, similarity.argmax(1).tolist(), strict=True):
        print(f"{sentence}\n    → {SENTENCES[nearest]}")


if __name__ == "__main__":
    main()
