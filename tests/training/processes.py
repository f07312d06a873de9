"""Starts the processes of a group, each with a deadline; none outlives the block."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

SECONDS = 100  # until all processes are killed; a group gives up earlier, after FASTLM_TIMEOUT


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def started(count, *command, cwd, **variables):
    """Runs a Python command in `count` processes of a group, over the loopback interface only."""
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    shared |= {"FASTLM_TIMEOUT": "20", "CUDA_VISIBLE_DEVICES": "", **variables}
    running = []
    try:
        for rank in range(count):
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            running.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=cwd,
                    env=environment,
                    start_new_session=True,
                )
            )
        yield running
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in running:
            process.communicate()


def finished(running, seconds=SECONDS):
    """(exit code, stdout, stderr) of each process."""
    end = time.monotonic() + seconds
    return [
        (process.returncode, *output)
        for process in running
        for output in [process.communicate(timeout=max(0.1, end - time.monotonic()))]
    ]


def run(count, *command, cwd, seconds=SECONDS, **variables):
    """Runs the command to its end in all processes."""
    with started(count, *command, cwd=cwd, **variables) as running:
        results = finished(running, seconds)
    assert all(code == 0 for code, *_ in results), "\n".join(f"{code}\n{out}\n{err}" for code, out, err in results)
    return results
