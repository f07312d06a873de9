"""Bytes on the wire and seconds per step of a run on several processes: the model of docs/scale.md.

`python -m fastlm.training.scale` prints its tables.

n processes, P bytes of parameters (float32, 4 bytes each, and as many of gradients). In a ring every process sends

    all-reduce       2 (n − 1) / n · P      in 2 (n − 1) messages one after the other; in a tree 2 log₂ n
    all-gather         (n − 1) / n · P      in n − 1
    reduce-scatter     (n − 1) / n · P      in n − 1; over gloo, which has none of its own, an all-reduce

DDP: an all-reduce of all gradients. FSDP: of every micro-batch, an all-gather of each layer for the forward and one for
the backward pass, and one of the other parameters for both; of a step, a reduce-scatter of all gradients. FSDP pads the
first dimension of a parameter to a multiple of n.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastlm.training.config import PRESETS
from fastlm.training.flops import flops_of_step
from fastlm.training.models import BUILDERS
from fastlm.training.settings import Settings
from fastlm.training.whole import layers_of

FLOAT = 4  # bytes
BUCKET = 25 * 2**20  # bytes of gradients that DDP adds up at once
PROCESSES = (8, 64, 512)
VOCABULARIES = {"gpt2-124m": 50257, "gpt2-1558m": 50257, "smollm2-135m": 49152}
Shapes = Sequence[torch.Size]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Assumptions; those of the defaults are for nodes of eight H100 with a network of 400 Gbit/s for each GPU."""

    flops: float = 989e12  # of a GPU per second, the peak of dense bfloat16 products
    utilisation: float = 0.4  # of the peak, in forward and backward passes
    per_node: int = 8
    node_bandwidth: float = 360e9  # bytes per second that a GPU sends within a node: 80 % of NVLink's 450 GB/s
    bandwidth: float = 40e9  # of a network adapter, one for each GPU: 80 % of 50 GB/s
    node_latency: float = 3e-6  # seconds of a message
    latency: float = 10e-6

    def seconds(self, sent: float, messages: float, processes: int) -> float:
        """For as many rings as GPUs in a node, each of which leaves the node through another adapter, as NCCL's."""
        if processes <= self.per_node:
            return sent / self.node_bandwidth + messages * self.node_latency
        latency = ((self.per_node - 1) * self.node_latency + self.latency) / self.per_node  # of a ring, on average
        return sent / min(self.node_bandwidth, self.per_node * self.bandwidth) + messages * latency


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of a process in a step."""

    sent: float  # bytes
    messages: float  # one after the other


@dataclasses.dataclass(frozen=True)
class Step:
    traffic: Traffic
    compute: float  # seconds
    communication: float
    exposed: float  # communication that no computation hides

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def shapes_of(model: nn.Module) -> tuple[list[Shapes], Shapes]:
    """The shapes of the parameters of each layer, and of all others."""
    layers = layers_of(model)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    return [[p.shape for p in layer.parameters()] for layer in layers], [
        p.shape for p in model.parameters() if id(p) not in inside
    ]


def bytes_of(shapes: Shapes) -> int:
    return FLOAT * sum(shape.numel() for shape in shapes)


def padded_bytes(shapes: Shapes, processes: int) -> int:
    return FLOAT * sum(
        math.ceil(shape[0] / processes) * processes * math.prod(shape[1:]) for shape in shapes if shape.numel()
    )


def ddp(layers: Sequence[Shapes], others: Shapes, processes: int) -> Traffic:
    """Of each bucket of gradients the messages are those of a tree, as NCCL chooses it for many processes."""
    size = sum(map(bytes_of, layers)) + bytes_of(others)
    share = (processes - 1) / processes
    return Traffic(2 * share * size, 2 * math.ceil(math.log2(processes)) * math.ceil(size / BUCKET))


def fsdp(
    layers: Sequence[Shapes], others: Shapes, processes: int, micro_batches: int = 1, *, gloo: bool = False
) -> Traffic:
    inside, outside = sum(padded_bytes(shapes, processes) for shapes in layers), padded_bytes(others, processes)
    share, reduced = (processes - 1) / processes, 2 if gloo else 1
    sent = share * (micro_batches * (2 * inside + outside) + reduced * (inside + outside))
    gathers = micro_batches * (2 * len(layers) + 1)
    return Traffic(sent, (processes - 1) * (gathers + reduced * (len(layers) + 1)))


def step(
    model: Any, settings: Settings, processes: int, kind: str, micro_batch: int, cluster: Cluster | None = None
) -> Step:
    """A step of a run.

    Gradients of DDP travel during the backward pass (two thirds of the computation), except for the last bucket, and
    those of several micro-batches during the last one. The parameters of FSDP travel during all of the computation,
    except for those outside of the layers, which come first.

    Args:
        model: it may be on the meta device.
        micro_batch: number of sequences of a process that run at once.
    """
    cluster = cluster or Cluster()
    layers, others = shapes_of(model)
    micro_batches = math.ceil(math.ceil(settings.batch / processes) / micro_batch)
    # The process with the most sequences decides.
    share = math.ceil(settings.batch / processes) / settings.batch
    compute = flops_of_step(model, settings) * share / (cluster.flops * cluster.utilisation)
    traffic = ddp(layers, others, processes) if kind == "ddp" else fsdp(layers, others, processes, micro_batches)
    communication = cluster.seconds(traffic.sent, traffic.messages, processes)
    if kind == "ddp":
        last = communication * min(1.0, BUCKET / (sum(map(bytes_of, layers)) + bytes_of(others)))
        hiding = compute * 2 / 3 / micro_batches
    else:
        part = padded_bytes(others, processes) * (processes - 1) / processes
        last, hiding = cluster.seconds(part, processes - 1, processes), compute
    return Step(traffic, compute, communication, last + max(0.0, communication - last - hiding))


def table(preset: str, cluster: Cluster | None = None) -> str:
    """In Markdown, for a preset with its batch."""
    settings = Settings(**{name: x for name, x in PRESETS[preset].items() if name != "tokenizer"})
    with torch.device("meta"):
        model = new_model(settings, VOCABULARIES[preset])
    one = step(model, settings, 1, "ddp", settings.at_once, cluster).compute
    lines = [
        "| GPUs | | sent per GPU and step | computation | communication | not hidden | step | efficiency |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for processes in PROCESSES:
        for kind in ("ddp", "fsdp"):
            found = step(model, settings, processes, kind, settings.at_once, cluster)
            times = [found.compute, found.communication, found.exposed, found.seconds]
            shown = " | ".join(f"{1000 * seconds:,.1f} ms" for seconds in times)
            efficiency = one / processes / found.seconds
            lines.append(
                f"| {processes} | {kind} | {found.traffic.sent / 1e9:,.2f} GB | {shown} | {100 * efficiency:.0f} % |"
            )
    return "\n".join(lines)


def new_model(settings: Settings, vocabulary: int) -> Any:
    """A model of the settings' architecture for a vocabulary of this size."""

    class Vocabulary:
        def get_vocab_size(self) -> int:
            return vocabulary

        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in range(vocabulary)}

    architecture = settings.architecture or "gpt2"
    return BUILDERS[architecture](settings, Vocabulary(), None)  # type: ignore[arg-type]


if __name__ == "__main__":
    for preset in VOCABULARIES:
        print(f"`{preset}`\n\n{table(preset)}\n")
