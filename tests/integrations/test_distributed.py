"""Data-parallel and fully sharded training in two processes, against one process without fastlm."""

import os
import socket
import sys

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlm
from fastlm.integrations import parts
from tests.integrations.support import padded, tiny

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is tested on Linux")
MODELS = (("GPT2", "LMHeadModel"), ("Bert", "ForMaskedLM"))


def model_and_batch(family, head):
    torch.manual_seed(7)
    model = tiny(family, head).train()
    x, mask = padded(9, 5, 7, 4, tokens=9)
    return model, x, mask


def shard(x, mask, rows):
    return {"input_ids": x[rows], "attention_mask": mask[rows], "labels": x[rows].masked_fill(mask[rows] == 0, -100)}


def run(rank, port, kind, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for family, head in MODELS:
        model, x, mask = model_and_batch(family, head)
        fastlm.accelerate(model)
        layers = model.transformer.h if family == "GPT2" else model.bert.encoder.layer
        if kind == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        calls, function = [], parts.gelu_mlp
        parts.gelu_mlp = lambda *args, calls=calls, function=function, **kwargs: (
            calls.append(1),
            function(*args, **kwargs),
        )[1]
        for _ in range(2):
            wrapped.zero_grad()
            wrapped(**shard(x, mask, slice(2 * rank, 2 * rank + 2))).loss.backward()
        parts.gelu_mlp = function
        found = {
            name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        if rank == 0:
            torch.save((found, len(calls), type(layers[0]).__name__), results / f"{family}.pt")
    # The process group is not destroyed, neither explicitly nor with its last reference. gloo's destructor holds the
    # GIL while it waits for a thread that may itself need the GIL to finish.
    dist.barrier()
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(kind, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(run, (port, kind, tmp_path), nprocs=2, start_method="spawn")
    for family, head in MODELS:
        model, x, mask = model_and_batch(family, head)
        sum(model(**shard(x, mask, rows)).loss / 2 for rows in (slice(0, 2), slice(2, 4))).backward()
        found, calls, layer_class = torch.load(tmp_path / f"{family}.pt")
        assert calls == 4 and layer_class.startswith("FSDP") == (kind == "fsdp")  # two layers, two steps
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        for name in expected:
            if not name.endswith("key.bias"):
                torch.testing.assert_close(
                    found[name], expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
                )
