"""The process of one peer. Its first line says what it is; then it answers one request per line."""

import importlib
import importlib.util
import json
import sys
import time
from importlib import metadata
from pathlib import Path

import torch


def main(name: str, directory: str, threads: int, dtype: str) -> None:
    peer = importlib.import_module(f"benchmarks.peers.{name}")
    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print

    def answer(content: dict) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        run = peer.load(Path(directory), threads, dtype)
    except Exception as error:  # of a library that is not ours
        answer({"failed": " ".join(f"{type(error).__name__}: {error}".split())[:200]})
        return
    options = peer.OPTIONS.format(dtype=dtype)
    answer({"version": metadata.version(peer.PACKAGE), "options": options, "batches": peer.BATCHES})
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        found = [run(texts, request["batch"], request["query"]) for texts in request["calls"]]
        seconds = time.perf_counter() - start
        answer({"seconds": seconds, "results": torch.cat(found).tolist() if request["results"] else None})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
