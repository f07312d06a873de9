"""Compares fastlm.encode and fastlm.rerank with PyTorch and the peers on this machine."""

import dataclasses
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.peers.common import check_model
from benchmarks.peers.shapes import SHAPES, write
from benchmarks.peers.texts import PAIRS, PROFILES, QUERY
from fastlm.benchmarking.measure import Ratio, interleaved
from fastlm.core.errors import mismatch

PEERS = ("openvino", "onnxruntime", "ctranslate2")
OTHERS = (*PEERS, "fastlm_models")
OURS, BASELINE, COMPILED = "fastlm_encode", "pytorch", "pytorch_compiled"
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}  # of unit vectors or scores, against PyTorch
console = Console()


class Peer:
    """A process that computes embeddings or scores on request."""

    def __init__(self, name: str, directory: Path, threads: int, dtype: str = "float32") -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.peers.worker", name, str(directory), str(threads), dtype]
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

    def run(
        self, calls: list[list[str]], batch: int, query: str | None = None, results: bool = False
    ) -> dict[str, Any]:
        """calls: the texts of each call of the library."""
        assert self.process.stdin
        request = {"calls": calls, "batch": batch, "query": query, "results": results}
        self.process.stdin.write(json.dumps(request) + "\n")
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
    difference: float  # the largest of the results, from PyTorch's


def missing(name: str) -> str:
    """How to install a peer; "" if it is installed."""
    needs = getattr(importlib.import_module(f"benchmarks.peers.{name}"), "NEEDS", (name,) if name in PEERS else ())
    absent = [package for package in needs if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(absent)} (pip install '.[peers]')" if absent else ""


def main(
    model: Annotated[Path, typer.Option(help="Directory of a SentenceTransformer with mean pooling.")],
    peers: Annotated[str, typer.Option(help=f"Comma-separated list of {', '.join(OTHERS)}.")] = ",".join(PEERS),
    profiles: Annotated[str, typer.Option(help="Comma-separated list of lengths of texts.")] = ",".join(PROFILES),
    shape: Annotated[
        str | None,
        typer.Option(
            help=f"Random weights of this shape in place of the model's: {', '.join(SHAPES)} (which scores pairs)."
        ),
    ] = None,
    number: Annotated[int | None, typer.Option(help="Number of texts; default: that of the profile.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Measure torch.compile too.")] = False,
    dtype: Annotated[str, typer.Option(help=f"Of weights and activations: {' or '.join(TOLERANCES)}.")] = "float32",
    threads: Annotated[int, typer.Option(help="Number of threads of each.")] = 2,
    seconds: Annotated[float, typer.Option(help="For each profile and order, but at least five rounds.")] = 60.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Compare fastlm.encode with PyTorch and the peers, from texts to embeddings or scores."""
    check_model(model)
    if shape is not None and shape not in SHAPES:
        raise mismatch("shape", f"one of {', '.join(SHAPES)}", repr(shape))
    if dtype not in TOLERANCES:
        raise mismatch("dtype", f"one of {', '.join(TOLERANCES)}", repr(dtype))
    names = peers.split(",") if peers else []
    for name in names:
        if name not in OTHERS:
            raise mismatch("peers", f"a comma-separated list of {', '.join(OTHERS)}", repr(name))
    chosen = profiles.split(",")
    for name in chosen:
        if name not in PROFILES:
            raise mismatch("profiles", f"a comma-separated list of {', '.join(PROFILES)}", repr(name))
    query, makers = (QUERY, PAIRS) if shape == "reranker" else (None, {name: PROFILES[name] for name in chosen})
    absent = {name: how for name in names if (how := missing(name))}
    wanted = [name for name in (OURS, BASELINE, *[COMPILED] * compiled, *names) if name not in absent]
    running, rows = [], []
    try:
        with tempfile.TemporaryDirectory() as folder:
            directory = model if shape is None else write(shape, model, Path(folder, shape))
            running = [Peer(name, directory, threads, dtype) for name in wanted]
            absent |= {peer.name: peer.described["failed"] for peer in running if "failed" in peer.described}
            measured = [peer for peer in running if peer.name not in absent]
        for peer in measured:
            console.print(f"{peer.name}: {peer.described['version']}; {peer.described['options']}")
        for profile, (make, usual) in makers.items():
            texts = make(usual if number is None else number)
            orders = {"as they come": [texts], "sorted": [sorted(texts, key=len, reverse=True)]}
            if profile == "queries":
                orders["one at a time"] = [[text] for text in texts]
            for order, calls in orders.items():
                rows += compare(measured, profile, order, calls, query, seconds, TOLERANCES[dtype])
    finally:
        for peer in running:
            peer.close()
    show(rows, absent, TOLERANCES[dtype])
    if json_file:
        content = {
            "threads": threads,
            "dtype": dtype,
            "shape": shape,
            "peers": {peer.name: peer.described for peer in measured},
            "absent": absent,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        json_file.write_text(json.dumps(content, indent=1) + "\n")


def compare(
    running: list[Peer],
    profile: str,
    order: str,
    calls: list[list[str]],
    query: str | None,
    seconds: float,
    tolerance: float,
) -> list[Row]:
    """Each at the fastest batch size of those at which its results are PyTorch's, if there is one."""
    baseline = next(peer for peer in running if peer.name == BASELINE)
    expected = torch.tensor(baseline.run(calls, baseline.described["batches"][0], query, True)["results"])
    batches, differences = {}, {}
    for peer in running:
        taken, off = {}, {}
        for batch in peer.described["batches"]:
            answer = peer.run(calls, batch, query, True)
            taken[batch] = answer["seconds"]
            off[batch] = (torch.tensor(answer["results"]) - expected).abs().max().nan_to_num(torch.inf).item()
        right = [batch for batch in taken if off[batch] <= tolerance] or [*taken]
        batches[peer.name] = min(right, key=lambda batch: taken[batch])
        differences[peer.name] = off[batches[peer.name]]
    timers = {peer.name: timer(peer, calls, batches[peer.name], query) for peer in running}
    found = interleaved(timers, 30, budget=seconds)
    rows = []
    for name, times in found.items():
        rate = sum(map(len, calls)) / statistics.median(times)
        rows.append(Row(profile, order, name, batches[name], rate, Ratio.of(found[OURS], times), differences[name]))
    return rows


def timer(peer: Peer, calls: list[list[str]], batch: int, query: str | None) -> Any:
    return lambda n=1: sum(peer.run(calls, batch, query)["seconds"] for _ in range(n)) / n


def show(rows: list[Row], absent: dict[str, str], tolerance: float) -> None:
    table = Table()
    for column in ("texts", "order", "library", "batch", "texts/s", "fastlm is faster by", "difference"):
        table.add_column(column)
    for row in rows:
        difference = f"{row.difference:.1e}{'' if row.difference <= tolerance else ': other results'}"
        cells = (row.profile, row.order, row.peer, str(row.batch), f"{row.texts_per_second:.1f}")
        table.add_row(*cells, str(row.speedup), difference)
    for name, how in absent.items():
        table.add_row("", "", name, "", "", how.replace("[", r"\["), "")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
