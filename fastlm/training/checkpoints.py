"""Checkpoints of a run, from which it goes on bit for bit: RUN/checkpoints/step-00000250 and so on.

Each is a directory in Hugging Face's format, to which these files are added:

training.safetensors   the states of the optimiser and the random generators, the loss of every step, skipped steps
training.json          step, evaluations, seconds, versions
SHA256SUMS             of the other files, in the format of sha256sum

A run whose processes have parts of the parameters has files of torch.distributed.checkpoint (.metadata and a .distcp
file of each process) instead of training.safetensors.

It is written to a directory beside its place, flushed to the disk and renamed, so that a process that is killed leaves
all of it or nothing. A thread writes from a copy; training waits for the copy only.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from fastlm.core.errors import mismatch
from fastlm.core.locks import locked
from fastlm.models.checkpoint import read_file, writing
from fastlm.models.config import CONFIG
from fastlm.training.checkpoint import (
    CHECKPOINTS,
    STEP,
    Trained,
    one_line,
    saved_in,
    step_of,
    versions,
    write_json,
    write_model,
)
from fastlm.training.distributed import Group
from fastlm.training.whole import is_sharded, local_of

FORMAT = 3  # of a checkpoint and of run.json; a change that older code cannot read needs the next number
PARTIAL = ".partial-"  # the name of a directory that is not complete begins with it
TENSORS, METRICS, SUMS = "training.safetensors", "training.json", "SHA256SUMS"
INDEX = ".metadata"  # of the files of torch.distributed.checkpoint
NEEDED = {CONFIG, "model.safetensors", "tokenizer.json", METRICS}
LOSSES = "losses"  # the name of their tensor; a skipped step may have one that is not finite
FINITE_PART = 2**20  # elements that are checked at a time
BFLOAT16_INF = 0x7F80  # the bits of infinity, all of which are set in NaN
MODEL = "model."  # prefix of the model's tensors among those that are copied

Evaluation = tuple[int, float, float]  # step, training loss, validation loss


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint on the disk."""

    folder: Path
    step: int
    seconds: float  # of the training steps
    evaluations: list[Evaluation]
    report: dict[str, Any]  # of Report.on_save

    @classmethod
    def read(cls, folder: Path) -> "Saved":
        """Raises ValueError if it is of another format; KeyError, OSError or ValueError if it is damaged."""
        content = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        check_format(content, folder / METRICS)
        evaluations = [tuple(evaluation) for evaluation in content["evaluations"]]
        return cls(folder, content["step"], content["seconds"], evaluations, content.get("report", {}))

    def tensors(self, wanted: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """wanted: names and tensors of which this process wants its part only, if they are sharded."""
        if (self.folder / INDEX).exists():
            from fastlm.training import shard_files  # takes long to import

            return shard_files.read(self.folder, wanted or {})
        return read_file(self.folder / TENSORS)

    @property
    def val_loss(self) -> float | None:
        """The validation loss of its weights, if they were evaluated."""
        return next((val_loss for step, _, val_loss in self.evaluations if step == self.step), None)


@contextlib.contextmanager
def locked_run(run: Path) -> Iterator[None]:
    """Creates the directory of the checkpoints of a run. Inside the block, no other process can train the run."""
    folder = run / CHECKPOINTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise OSError(f"out: could not create {str(folder)!r}: {one_line(failure)}") from failure
    with locked(folder, wait=False) as held:
        if held is False:
            raise mismatch("out", "a run that no other process trains", repr(str(run)))
        for partial in folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(partial, ignore_errors=True)
        yield


class Checkpoints:
    """Writes the checkpoints of a run.

    Args:
        run: its directory.
        keep: number of checkpoints to keep; that with the lowest validation loss is kept besides.
        tokenizer_settings: the contents of tokenizer_config.json; None: those for a tokenizer of this package.
        group: the processes that each write their part of a sharded model; None: this one alone.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep: int,
        tokenizer: Tokenizer,
        tokenizer_settings: str | None = None,
        group: Group | None = None,
    ):
        self.run, self.keep, self.tokenizer, self.tokenizer_settings = run, keep, tokenizer, tokenizer_settings
        self.group = group or Group()
        self.copies: dict[str, Tensor] = {}
        self.thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self.written: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.thread.shutdown()  # a checkpoint that is being written is completed

    def save(
        self,
        step: int,
        model: Trained,
        tensors: Mapping[str, Tensor],
        metrics: dict[str, Any],
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Starts to write a checkpoint. The tensors may change as soon as this returns.

        It waits for the previous checkpoint, whose errors it raises.

        Args:
            state: the state dict of the whole model, in the first process, if `model` is sharded.
        """
        self.wait()
        copies = self.copy(model, tensors, state)
        self.written = self.thread.submit(self.write, step, model, copies, metrics)

    def failed(self, *, wait: bool = False) -> bool:
        """Whether the last checkpoint could not be written; False as long as it is being written and `wait` is not set.

        wait() raises the error.
        """
        if self.written is None or not (wait or self.written.done()):
            return False
        return self.written.exception() is not None

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk; raises its error."""
        if self.written is not None:
            written, self.written = self.written, None
            written.result()

    def copy(
        self, model: Trained, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Copies in main memory, which the next call overwrites. Tied parameters stay tied."""
        state = {MODEL + name: x for name, x in (model.state_dict() if state is None else state).items()}
        copies: dict[str, Tensor] = {}
        copied: dict[tuple[int, torch.Size], Tensor] = {}
        for name, tensor in (state | dict(tensors)).items():
            local = local_of(tensor)
            alias = (local.data_ptr() or id(tensor), tensor.shape)  # an empty tensor has no address
            if alias not in copied:
                copy = local_of(self.copies[name]) if name in self.copies else None
                if copy is None or copy.shape != local.shape:
                    copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                copy.copy_(local.detach())
                copied[alias] = with_place_of(tensor, copy)
            copies[name] = copied[alias]
        self.copies = copies
        return copies

    def write(self, step: int, model: Trained, tensors: Mapping[str, Tensor], metrics: dict[str, Any]) -> None:
        """In the directory beside its place the first process writes the model, and each its part of the rest."""
        final = self.run / CHECKPOINTS / f"{STEP}{step:08}"
        folder = final.with_name(PARTIAL + final.name)
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith(MODEL)}
        first = self.group.rank == 0
        try:
            with self.together():
                check_finite(tensors, step)
                if first:
                    folder.mkdir()
                    state = {name.removeprefix(MODEL): x for name, x in tensors.items() if name.startswith(MODEL)}
                    write_model(folder, model, self.tokenizer, self.tokenizer_settings, state=state)
                    write_json(folder / METRICS, {"format": FORMAT, "step": step, **metrics, "versions": versions()})
            if self.group.size > 1:
                from fastlm.training import shard_files

                shard_files.write(folder, others, self.group)
            with self.together():
                own = {file.name: sha256(file) for file in folder.glob(shard_files_of(self.group.rank))}
            sums = {name: digest for some in self.group.written(own) for name, digest in some.items()}
            with self.together():
                if first:
                    if self.group.size == 1:
                        with writing(folder / TENSORS) as path:
                            save_file(others, path)
                    self.complete(folder, final, sums)
                    self.prune(step)
        except OSError as failure:
            raise OSError(f"out: could not save the checkpoint {str(final)!r}: {one_line(failure)}") from failure
        finally:
            if first:
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All processes leave the block; if one raises an error, the others raise it, too."""
        failure: Exception | None = None
        try:
            yield
        except (OSError, ValueError) as error:
            failure = error
        failures = [error for error in self.group.written(failure) if error is not None]
        if failure is not None:
            raise failure
        if failures:
            raise failures[0]

    def complete(self, folder: Path, final: Path, sums: Mapping[str, str]) -> None:
        """Adds the checksums, flushes the files to the disk and renames the directory. sums: those that are known."""
        digests = {file.name: sums.get(file.name) or sha256(file) for file in sorted(folder.iterdir())}
        (folder / SUMS).write_text("".join(f"{x}  {name}\n" for name, x in digests.items()), encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            flush(path)
        if final.exists():
            remove(final)  # a damaged one, from before the run was resumed
        folder.rename(final)
        flush(final.parent)

    def prune(self, step: int) -> None:
        """Deletes all but the newest and the best. Those after `step` are damaged: the run was resumed before them."""
        folders = [folder for folder in saved_in(self.run) if step_of(folder) <= step]
        kept = set(folders[-self.keep :])
        losses: dict[Path, float] = {}
        for folder in folders:
            with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged one is not the best
                if (val_loss := Saved.read(folder).val_loss) is not None:
                    losses[folder] = val_loss
        if losses:
            kept.add(min(losses, key=lambda folder: losses[folder]))
        for folder in saved_in(self.run):
            if folder not in kept:
                remove(folder)


def newest(run: Path) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint that is not damaged, if there is any, and what is wrong with those after it.

    Raises:
        ValueError: all are damaged, or the newest is of another format.
    """
    damages: list[str] = []
    for folder in reversed(saved_in(run)):
        if damage := damage_of(folder):
            damages.append(damage)
        else:
            return Saved.read(folder), damages
    if damages:
        raise mismatch("resume", "a checkpoint that is not damaged", damages[0])
    return None, damages


def clear(run: Path) -> None:
    """Deletes all checkpoints."""
    for folder in saved_in(run):
        remove(folder)


def remove(folder: Path) -> None:
    """Deletes a checkpoint. A process that is killed meanwhile leaves none that looks complete."""
    partial = folder.with_name(PARTIAL + "old-" + folder.name)
    shutil.rmtree(partial, ignore_errors=True)
    folder.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        if missing := (NEEDED | {INDEX if INDEX in sums else TENSORS}) - set(sums):
            return f"{folder / SUMS} without {min(missing)}"
        return next(
            (f"{folder / name}, which has changed" for name in sums if sha256(folder / name) != sums[name]), None
        )
    except (OSError, ValueError) as failure:
        return f"{folder} ({one_line(failure)})"


def check_format(content: dict[str, Any], path: Path) -> None:
    if content.get("format") != FORMAT:
        version = content.get("versions", {}).get("fastlm", "another version")
        got = f"format {content.get('format')} in {path}, written by fastlm {version}"
        raise mismatch("resume", f"format {FORMAT}", got)


def sha256(path: Path, read: Callable[[int], None] = lambda count: None) -> str:
    """The SHA-256 of a file. read: is called with the number of bytes of each part that is read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
            read(len(chunk))
    return digest.hexdigest()


def check_unchanged(argument: str, sums: Mapping[str, str]) -> None:
    for path, digest in sums.items():
        if not Path(path).is_file():
            raise mismatch(argument, f"the file {path}, which the run was started with", "none")
        if sha256(Path(path)) != digest:
            raise mismatch(argument, f"the file {path} as the run was started with", "a changed one")


def shard_files_of(rank: int) -> str:
    """The pattern of the names that torch.distributed.checkpoint gives the files of a process."""
    return f"__{rank}_*.distcp"


def with_place_of(tensor: Any, copy: Tensor) -> Tensor:
    """The copy of a part of a tensor, with its place in the tensor if this process has a part only."""
    if not is_sharded(tensor):
        return copy
    from fastlm.training.sharded import sharded_like

    return sharded_like(tensor, copy)


def check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    for name, tensor in tensors.items():
        if name != LOSSES and tensor.is_floating_point() and not is_finite(local_of(tensor)):
            expected = f"a learning rate with finite weights and moments (at step {step} {name} is not finite)"
            raise mismatch("lr", expected, "a larger one")


def is_finite(x: Tensor) -> bool:
    """Whether all elements of a contiguous tensor in main memory are finite.

    By numpy, as PyTorch's operators would start threads of this thread. With more threads than cores, libgomp's do not
    wait for the next parallel loop any more but sleep, and each loop of the training has to wake them.
    """
    bits = x.dtype == torch.bfloat16  # which numpy does not have
    values = (x.view(torch.int16) if bits else x).reshape(-1).numpy()
    parts = (values[i : i + FINITE_PART] for i in range(0, len(values), FINITE_PART))
    return all((part & BFLOAT16_INF != BFLOAT16_INF).all() if bits else numpy.isfinite(part).all() for part in parts)


def flush(path: Path) -> None:
    """Waits until a file or a directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
