"""Compares fastlm.encode with PyTorch and the peers on this machine."""

import dataclasses
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.peers.common import check_model
from benchmarks.peers.texts import PROFILES
from fastlm.benchmarking.measure import Ratio, interleaved
from fastlm.core.errors import mismatch

PEERS = ("openvino", "onnxruntime", "ctranslate2")
OURS, BASELINE = "fastlm_encode", "pytorch"
TOLERANCE = 1e-4  # of unit vectors, against PyTorch
console = Console()


class Peer:
    """A process that encodes on request."""

    def __init__(self, name: str, directory: Path, threads: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.peers.worker", name, str(directory), str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.described = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failed": f"ended with exit code {self.process.wait()}"}

    def encode(self, calls: list[list[str]], batch: int, results: bool = False) -> dict[str, Any]:
        """calls: the texts of each call of the library."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"calls": calls, "batch": batch, "results": results}) + "\n")
        self.process.stdin.flush()
        answer = self.read()
        if "failed" in answer:
            raise RuntimeError(f"{self.name}: {answer['failed']}")
        return answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@dataclasses.dataclass(frozen=True)
class Row:
    profile: str
    order: str
    peer: str
    batch: int
    texts_per_second: float
    speedup: Ratio  # of fastlm over it
    difference: float  # the largest of the embeddings, from PyTorch's


def missing(name: str) -> str:
    """How to install a peer; "" if it is installed."""
    needs = getattr(importlib.import_module(f"benchmarks.peers.{name}"), "NEEDS", (name,))
    absent = [package for package in needs if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(absent)} (pip install '.[peers]')" if absent else ""


def main(
    model: Annotated[Path, typer.Option(help="Directory of a SentenceTransformer with mean pooling.")],
    peers: Annotated[str, typer.Option(help="Comma-separated list.")] = ",".join(PEERS),
    profiles: Annotated[str, typer.Option(help="Comma-separated list of lengths of texts.")] = ",".join(PROFILES),
    threads: Annotated[int, typer.Option(help="Number of threads of each.")] = 2,
    seconds: Annotated[float, typer.Option(help="For each profile and order, but at least five rounds.")] = 60.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Compare fastlm.encode with PyTorch and the peers, from texts to embeddings in float32."""
    check_model(model)
    names = peers.split(",") if peers else []
    for name in names:
        if name not in PEERS:
            raise mismatch("peers", f"a comma-separated list of {', '.join(PEERS)}", repr(name))
    chosen = profiles.split(",")
    for name in chosen:
        if name not in PROFILES:
            raise mismatch("profiles", f"a comma-separated list of {', '.join(PROFILES)}", repr(name))
    absent = {name: how for name in names if (how := missing(name))}
    running = [Peer(name, model, threads) for name in (OURS, BASELINE, *names) if name not in absent]
    absent |= {peer.name: peer.described["failed"] for peer in running if "failed" in peer.described}
    running = [peer for peer in running if peer.name not in absent]
    for peer in running:
        console.print(f"{peer.name}: {peer.described['version']}; {peer.described['options']}")
    rows = []
    try:
        for profile in chosen:
            make, number = PROFILES[profile]
            texts = make(number)
            orders = {"as they come": [texts], "sorted": [sorted(texts, key=len, reverse=True)]}
            if profile == "queries":
                orders["one at a time"] = [[text] for text in texts]
            for order, calls in orders.items():
                rows += compare(running, profile, order, calls, seconds)
    finally:
        for peer in running:
            peer.close()
    show(rows, absent)
    if json_file:
        content = {
            "threads": threads,
            "peers": {peer.name: peer.described for peer in running},
            "absent": absent,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        json_file.write_text(json.dumps(content, indent=1) + "\n")


def compare(running: list[Peer], profile: str, order: str, calls: list[list[str]], seconds: float) -> list[Row]:
    results, batches = {}, {}
    for peer in running:
        results[peer.name] = torch.tensor(peer.encode(calls, peer.described["batches"][-1], results=True)["embeddings"])
        taken = {batch: peer.encode(calls, batch)["seconds"] for batch in peer.described["batches"]}
        batches[peer.name] = min(taken, key=lambda batch: taken[batch])
    timers = {peer.name: timer(peer, calls, batches[peer.name]) for peer in running}
    found = interleaved(timers, 30, budget=seconds)
    rows = []
    for name, taken in found.items():
        rate = sum(map(len, calls)) / statistics.median(taken)
        difference = (results[name] - results[BASELINE]).abs().max().item()
        rows.append(Row(profile, order, name, batches[name], rate, Ratio.of(found[OURS], taken), difference))
    return rows


def timer(peer: Peer, calls: list[list[str]], batch: int) -> Any:
    return lambda n=1: sum(peer.encode(calls, batch)["seconds"] for _ in range(n)) / n


def show(rows: list[Row], absent: dict[str, str]) -> None:
    table = Table()
    for column in ("texts", "order", "library", "batch", "texts/s", "fastlm is faster by", "difference"):
        table.add_column(column)
    for row in rows:
        difference = f"{row.difference:.1e}{'' if row.difference <= TOLERANCE else ': other results'}"
        cells = (row.profile, row.order, row.peer, str(row.batch), f"{row.texts_per_second:.1f}")
        table.add_row(*cells, str(row.speedup), difference)
    for name, how in absent.items():
        table.add_row("", "", name, "", "", how.replace("[", r"\["), "")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
