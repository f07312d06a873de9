"""Worker processes that encode texts: those of encode_worker.py, which this process asks through pipes."""

import concurrent.futures
import contextlib
import pickle
import queue
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fastlm.core.errors import mismatch
from fastlm.training.data import encode_worker

Encoded = tuple[np.ndarray, list[int]]  # the ids of several texts, one after another, and the number of each


class Workers:
    """Encodes lists of texts in so many processes. Leaving the block ends them.

    Neither a fork nor multiprocessing: a fork of a process with threads may deadlock, and multiprocessing would run a
    user's script again in each process.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, count: int):
        self.count = count
        self.processes = [start() for _ in range(count)]
        self.idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        for process in self.processes:
            self.idle.put(process)
        self.threads = concurrent.futures.ThreadPoolExecutor(count)
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):
                send(process, (tokenizer.to_str(), dtype))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()  # a thread that waits for it gets the end of the file
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.communicate()

    def submit(self, texts: Sequence[str]) -> "concurrent.futures.Future[Encoded]":
        return self.threads.submit(self.encode, texts)

    def encode(self, texts: Sequence[str]) -> Encoded:
        process = self.idle.get()
        try:
            send(process, texts)
            assert process.stdout is not None
            answer = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            expected = "as many processes as there is memory for"
            raise mismatch("threads", expected, f"{self.count}, of which one was killed") from None
        finally:
            self.idle.put(process)
        if isinstance(answer, str):
            raise outside_vocabulary(answer)
        return answer


def start() -> subprocess.Popen:
    # -c: the directory of a file that is run would come first in sys.path.
    code = f"import runpy; runpy.run_path({str(Path(encode_worker.__file__))!r}, run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches this process only, which then ends the others
    )


def send(process: subprocess.Popen, content: object) -> None:
    assert process.stdin is not None
    pickle.dump(content, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
    process.stdin.flush()


def outside_vocabulary(reason: object) -> ValueError:
    return mismatch("data", "characters of the tokenizer's vocabulary", f"others ({reason})")
