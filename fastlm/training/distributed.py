"""The processes of a run. One process is a group of size 1, without a process group of PyTorch."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastlm.core.errors import Ended, mismatch

TIMEOUT = "FASTLM_TIMEOUT"  # the variable with the seconds after which a process that does not answer ends the run
SECONDS = 600.0  # without it
PATIENCE = datetime.timedelta(days=1)  # for the first process to tokenize the text or to write the model


class Group:
    """Processes that train one model together.

    Numbers and objects travel over gloo, whatever the device, so that nothing waits for a GPU.

    Attributes:
        rank: of this process, from 0; only the first one prints and writes.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self.numbers = self.patient = self.writing = None
        if size > 1:
            seconds = timeout()
            self.numbers = dist.new_group(backend="gloo", timeout=seconds)
            self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
            self.writing = dist.new_group(backend="gloo", timeout=seconds)  # of the threads that write checkpoints

    @classmethod
    def current(cls) -> "Group":
        """That of the default process group of PyTorch; without one, of this process alone. A collective call."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def share(self, count: int) -> range:
        """The places of this process among so many; the shares differ by at most one."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def largest_share(self, count: int) -> int:
        return -(-count // self.size)

    def total(self, *numbers: float) -> list[float]:
        """The sums of numbers over all processes, in float64; the same bits in each."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        dist.all_reduce(sums, group=self.numbers)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        return self.total(flag)[0] > 0

    def add(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place, on its device."""
        if self.size > 1:
            dist.all_reduce(x, group=self.numbers if x.is_cpu else None)
        return x

    def sent(self, value: Any) -> Any:
        """The value that the first process has."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self.numbers, device=torch.device("cpu"))
        return values[0]

    def written(self, value: Any) -> list[Any]:
        """The values of all processes. For the threads that write checkpoints."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.writing)
        return values

    def meet(self) -> None:
        """Waits for all processes, however long it takes."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1, device="cpu"), group=self.patient)

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Runs the block in the first process, then in the others, which find what it has left on the disk.

        All leave it together, however long it takes.

        Raises:
            Ended: in the others, if the first process raised an error.
        """
        if self.size == 1:
            yield
            return
        succeeded = torch.zeros(1, dtype=torch.int64, device="cpu")
        if self.rank == 0:
            try:
                yield
                succeeded += 1
            finally:
                dist.broadcast(succeeded, src=0, group=self.patient)
        else:
            dist.broadcast(succeeded, src=0, group=self.patient)
            if not succeeded.item():
                raise Ended
            yield
        self.meet()


def timeout() -> datetime.timedelta:
    given = os.environ.get(TIMEOUT, str(SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e8:
        raise mismatch(TIMEOUT, "a number of seconds above 0", repr(given))
    return datetime.timedelta(seconds=seconds)


def in_environment(name: str, default: int) -> int:
    """One of the variables that torchrun sets."""
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise mismatch(name, "an integer", repr(value))
    return int(value)


def process_count() -> int:
    """The number of processes that torchrun, or who sets the same variables, has started."""
    return in_environment("WORLD_SIZE", 1)


def is_several() -> bool:
    return process_count() > 1


def restarts() -> int:
    """How often torchrun has started the processes again, after one of them failed."""
    return in_environment("TORCHELASTIC_RESTART_COUNT", 0)


def join(device: torch.device) -> Group:
    """The group of the processes that torchrun has started; a group of one process without torchrun.

    Args:
        device: of this process, see local_device.
    """
    if is_several() and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        from torch.distributed.rendezvous import rendezvous  # not in every build of PyTorch

        try:
            store, rank, size = next(rendezvous("env://", timeout=timeout()))
            # After a restart torchrun's store may have the addresses of the processes before.
            store = dist.PrefixStore(f"restart {restarts()}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout())
        except (ValueError, RuntimeError) as failure:
            expected = "the variables that torchrun sets, and processes that answer"
            raise mismatch("WORLD_SIZE", expected, str(failure).partition("\n")[0]) from None
    return Group.current()


def local_device(device: torch.device) -> torch.device:
    """The device of this process for the one that was chosen: each process on a machine has a GPU of its own."""
    if not is_several() or device.type != "cuda":
        return device
    rank, count = in_environment("LOCAL_RANK", 0), torch.cuda.device_count()
    if rank >= count:
        expected = f"at most as many processes on a machine as GPUs, {count}, or --device cpu"
        raise mismatch("device", expected, f"process {rank + 1}")
    return torch.device("cuda", rank)


def local_threads() -> int | None:
    """The number of threads of this process on a CPU, a share of those of the machine; None: as PyTorch chooses.

    torchrun sets OMP_NUM_THREADS=1 where the user has set nothing. Any other value is the user's.
    """
    if not is_several() or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // in_environment("LOCAL_WORLD_SIZE", 1))


def lost_process(error: BaseException) -> str | None:
    """The reason in an error of a collective operation, if another process has ended or does not answer."""
    words = " ".join(str(error).split())
    known = "gloo", "NCCL", "onnection", "imed out", "timeout", "ProcessGroup"
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in words for word in known)):
        return (words.rpartition("] ")[2] or words).partition(". ")[0]
    return None
