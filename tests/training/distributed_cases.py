"""What the processes of tests/training/test_distributed.py run: python -m tests.training.distributed_cases FOLDER JOB…

Every process group has a timeout, uses the loopback interface only, and is not destroyed: gloo's destructor holds the
GIL while it waits for a thread that may itself need the GIL.
"""

import contextlib
import dataclasses
import datetime
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from fastlm.core.errors import Ended
from fastlm.models import load_model
from fastlm.training import data
from fastlm.training.batches import training_batch
from fastlm.training.checkpoints import Checkpoints, newest
from fastlm.training.distributed import Group
from fastlm.training.loop import train
from fastlm.training.models import build, set_recompute
from fastlm.training.objectives import NextToken
from fastlm.training.report import Report
from fastlm.training.settings import WHOLE_LAYERS, Settings
from fastlm.training.trainer import Trainer
from fastlm.training.whole import is_sharded

# A batch of 7 is not divisible by the number of processes, nor are the widths.
TINY = Settings(layers=2, heads=1, width=18, context=16, batch=7, steps=10, warmup=2, eval_every=4, lr=3e-3)
CASES = {
    "next-token": TINY,
    "masked-token": dataclasses.replace(TINY, objective="masked-token", micro_batch=2, ema=0.9, recompute=3),
    "packed": dataclasses.replace(TINY, architecture="llama", documents="packed", micro_batch=2),
    "float16": dataclasses.replace(TINY, dtype="fp16", grad_clip=0.0),
}
KINDS = ("ddp", "fsdp")
CHAIN = dataclasses.replace(TINY, steps=20, ema=0.9, skip_spikes=8.0, checkpoint_every=3)
WIRE = dataclasses.replace(TINY, width=66, batch=8)  # no parameter but the embedding of positions is divisible by 4
STOPS = {1: 5, 2: 10, 4: 15}  # the step after which so many processes are interrupted


def corpus_of(folder, settings):
    masked = settings.objective == "masked-token"
    return data.load(
        [folder / "text.jsonl"], tokenizer="char", masked=masked, documents=settings.documents, val_fraction=0.3
    )


class NotLearnedFrom:
    """The loss of the third step is NaN in the last process only, and the gradient of the fifth."""

    def __init__(self, group, passes):
        self.last, self.steps, self.loss = group.rank == group.size - 1, -passes, NextToken().loss

    def __call__(self, model, inputs, targets):
        loss = self.loss(model, inputs, targets)
        self.steps += model.training
        if model.training and self.last and self.steps == 3:
            return loss * torch.nan
        if model.training and self.last and self.steps == 5:
            return loss + (0 * model.transformer.ln_f.bias.sum()).sqrt()
        return loss


class Norms(Report):
    def __init__(self):
        self.norms = []

    def on_step(self, step):
        self.norms.append(step.grad_norm)


class Interrupt(Report):
    """Sends SIGTERM to this process after a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, step):
        if step.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def outcome(result):
    weights = dict(result.model.state_dict()) if result.state is None else result.state
    return {
        "losses": result.losses,
        "evaluations": result.evaluations,
        "skipped": result.skipped,
        "overflows": result.overflows,
        "interrupted": result.interrupted,
        "weights": {name: x.clone() for name, x in weights.items()},
    }


def compared(folder, name, kind="ddp", dtype=None):
    """Trains a case from the start."""
    settings = dataclasses.replace(CASES[name], parallel=kind)
    corpus = corpus_of(folder, settings)
    model = build(settings, corpus.tokenizer)
    report = Norms()
    found = train(settings, corpus, model if dtype is None else model.to(dtype), report=report)
    return outcome(found) | {"norms": report.norms}


def skipping(folder, kind="ddp"):
    settings = dataclasses.replace(TINY, parallel=kind)
    group = Group.current()
    passes = 0 if group.size == 1 else 1 if kind == "fsdp" else 2  # before the first step
    return outcome(train(settings, corpus_of(folder, settings), loss=NotLearnedFrom(group, passes), group=group))


def failing(folder, kind="fsdp"):
    """The last process that writes cannot write the second checkpoint. The first one knows it some steps later."""
    write_part, write = FileSystemWriter.write_data, Checkpoints.write

    def fail(self, *rest):
        if str(self.path).endswith("6") and dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return write_part(self, *rest)

    def write_slowly(self, step, *rest):
        try:
            if kind == "ddp" and step == 6:
                raise OSError(28, "No space left on device")
            write(self, step, *rest)
        finally:
            if dist.get_rank() == 0:
                time.sleep(0.5)

    FileSystemWriter.write_data, Checkpoints.write = fail, write_slowly
    try:
        chained(folder, kind, None, f"failing-{kind}")
    except OSError as error:
        return str(error)
    except Ended:
        assert kind == "ddp" and dist.get_rank() == 1
    finally:
        FileSystemWriter.write_data, Checkpoints.write = write_part, write


class WithUnused(torch.nn.Module):
    """A model of which a parameter has no part in the loss."""

    def __init__(self, model):
        super().__init__()
        self.model, self.unused = model, torch.nn.Linear(3, 3)

    def loss(self, model, inputs, targets):
        return NextToken().loss(self.model, inputs, targets)


def unused(folder, kind="ddp"):
    settings = dataclasses.replace(TINY, parallel=kind, dropout=0.1, micro_batch=2)
    corpus = corpus_of(folder, settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WithUnused(build(settings, corpus.tokenizer))
    return outcome(train(settings, corpus, model, loss=model.loss))


def accelerated(folder, kind="ddp"):
    """A model of transformers."""
    import transformers

    import fastlm

    settings = dataclasses.replace(TINY, parallel=kind)
    corpus = corpus_of(folder, settings)
    sizes = {
        "n_embd": 18,
        "n_layer": 2,
        "n_head": 1,
        "n_positions": 16,
        "vocab_size": corpus.tokenizer.get_vocab_size(),
    }
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off))
    fastlm.accelerate(model)

    def loss(model, inputs, targets):
        return model(input_ids=inputs, labels=targets, shift_labels=targets).loss

    return outcome(train(settings, corpus, model, loss=loss))


def with_adapters(folder, settings):
    from fastlm.integrations.lora import LoraModel

    with Group.current().first():
        if not (folder / "base").exists():
            build(settings, corpus_of(folder, settings).tokenizer).save_pretrained(folder / "base")
    return LoraModel(folder / "base", rank=3, alpha=6, dropout=0.0, seed=0)


def adapted(folder, kind="ddp"):
    """With low-rank adapters. The weights that they are added to are sharded as well; one process has them whole."""
    settings, group = dataclasses.replace(TINY, parallel=kind, sample_every=4), Group.current()
    model, samples = with_adapters(folder, settings), []
    if kind == "fsdp":
        set_recompute(model, WHOLE_LAYERS)

    def sample(whole):
        samples.append(whole(torch.arange(8)[None]).logits[0, -1].detach())
        return ""

    found = train(settings, corpus_of(folder, settings), model, loss=model.loss, sample=sample)
    sharded = kind == "fsdp" and group.size > 1
    assert all(is_sharded(p) == sharded for p in model.parameters())
    assert all(p.is_meta == (sharded and group.rank > 0) for p in model.own[0].parameters())
    assert bool(samples) == (group.rank == 0)
    return outcome(found) | {"samples": samples}


def chained(folder, kind="ddp", stop=None, name="run"):
    """Goes on with the run in the folder until it is interrupted, in the first process only."""
    settings, run = dataclasses.replace(CHAIN, parallel=kind), folder / name
    group = Group.current()
    with group.first():
        start, _ = newest(run)
    corpus, loss = corpus_of(folder, settings), None
    if name.startswith("adapters"):
        model = with_adapters(folder, settings)
        loss = model.loss
        if start is not None:
            model.load_training_state(start.tensors())
    else:
        model = build(settings, corpus.tokenizer) if start is None else load_model(start.folder, dtype=torch.float32)
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    sharded = kind == "fsdp" and group.size > 1
    writer = Checkpoints(run, keep=2, tokenizer=corpus.tokenizer, group=group if sharded else None)
    with writer:
        checkpoints = writer if sharded or group.rank == 0 else None
        report = Interrupt(stop)
        options = {"report": report, "checkpoints": checkpoints, "start": start, "group": group}
        return outcome(train(settings, corpus, model, loss, **options))


def sent_bytes():
    """By all TCP connections of this process: tcpi_bytes_sent of Linux's struct tcp_info."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(descriptor))) as connection:
                    if connection.family != socket.AF_UNIX:
                        information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                        total += struct.unpack_from("Q", information, 200)[0]
    return total


def bytes_per_step(folder, kind="ddp", micro_batch="8", steps=3):
    """What the first process sends in a step, on average."""
    settings, group = dataclasses.replace(WIRE, parallel=kind, micro_batch=int(micro_batch)), Group.current()
    corpus = corpus_of(folder, settings)
    trainer = Trainer(build(settings, corpus.tokenizer), settings, NextToken().loss, group=group)
    trainer.warm_up()
    before = 0
    for step in range(steps + 1):
        group.meet()
        if step == 1:
            before = sent_bytes()
        share = training_batch(corpus.train, settings, NextToken(), step, group.share(settings.batch))
        trainer.begin_step(*share, settings.lr, settings.tokens_per_step)
        trainer.read()
    group.meet()
    return (sent_bytes() - before) / steps


def run_job(folder, job):
    """A job is the name of a case or of a function above, and its arguments, separated by commas."""
    name, *arguments = job.split(",")
    if name == "chained":
        return chained(folder, arguments[0], int(arguments[1]), *arguments[2:])
    if name == "bytes":
        return bytes_per_step(folder, *arguments)
    if name in ("skipping", "failing", "unused", "accelerated", "adapted"):
        return globals()[name](folder, *arguments)
    return compared(folder, name, *arguments)


def main():
    folder, jobs = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    for job in jobs:
        found = run_job(folder, job)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{job}-{dist.get_world_size()}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
