"""The launches of a call, made again for a call of the same kind.

What an implementation derives from shapes, strides, dtypes, alignments and settings is the same for every such call.
A plan holds the finished arguments of all its launches and the layouts of the results; only the results are allocated,
and addresses filled in. Each result is an allocation of its own: parts of a common one would take PyTorch as long to
make, and would keep each other in memory.
"""

from collections.abc import Callable

import torch

import fastlm.kernels.launch as launcher
from fastlm.kernels.copies import Descriptors, TensorDescriptor, encoding

New = Callable[[tuple[int, ...]], torch.Tensor]
MAX_PLANS = 1024  # of an operator and direction
variant = None  # of the launch configurations: benchmarks/tune_triton.py changes them


def described(tensors):
    """(their addresses, 0 for None; what launches depend on in them besides).

    That is layouts, which addresses are below an alignment of 16 bytes, and which are equal: with other equal ones
    another plan is needed.
    """
    addresses, found, low = [], [], 0
    for x in tensors:
        if x is None:
            addresses.append(0)
            found.append(None)
        else:
            address = x.data_ptr()
            addresses.append(address)
            low |= address
            found += x.shape, x.stride(), x.dtype
            if launcher.HIP:
                found.append(x.untyped_storage().nbytes() < 2**31)
    if low & 15:
        found.append(tuple([address & 15 for address in addresses]))
    given = len(addresses) - addresses.count(0)
    if len({*addresses}) < given + (given < len(addresses)):
        found += "equal", *[addresses.index(address) for address in addresses]
    return addresses, found


class Plan:
    """Launches, whose tensors are given by their addresses.

    results: of each result its shape, its strides and its dtype, the latter None for that of the tensor `like` of the
    call; None for a result that is None. workspace: the float32 elements that the launches need besides.
    """

    __slots__ = "device", "launches", "results", "workspace"

    def __init__(self, launches, device, results, workspace):
        self.launches, self.device, self.results, self.workspace = launches, device, results, workspace

    def launch(self, addresses):
        """addresses: of each tensor of the call, of its results, and of the workspace."""
        stream = launcher.current_stream()(self.device)
        for run, programs, function, metadata, arguments, places, copies in self.launches:
            arguments = arguments.copy()
            for at, index, offset in places:
                arguments[at] = addresses[index] + offset
            for at, index, offset, descriptors in copies:
                arguments[at] = descriptors[addresses[index] + offset]
            run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)


class Workspace:
    """Parts of one allocation in float32, which a later call of the same kind makes at once."""

    def __init__(self, like):
        self.like, self.parts, self.size = like, [], 0

    def part(self, shape):
        """An uninitialised part, aligned to 16 bytes; here an allocation of its own.

        With three dimensions, each matrix can be an argument by itself.
        """
        made = self.like.new_empty(shape, dtype=torch.float32)
        self.parts.append((made, 4 * self.size))
        if len(shape) == 3:
            self.parts += [(made[i], 4 * (self.size + i * made[0].numel())) for i in range(1, shape[0])]
        self.size += -(-made.numel() // 4) * 4
        return made


class Plans(dict):
    """Plans by what their launches depend on: the layouts of all tensors, and the settings."""

    def call(self, like, tensors, settings, compute):
        """The results of compute(new), whose kernels run on the device of `like`, the current one; by a plan from the
        second time on.

        compute allocates the results and launches kernels, and does nothing else on the device. Its kernels read
        `tensors`, write the results, and use what new(shape) returns, uninitialised float32 memory. `settings` are all
        the rest that it depends on.
        """
        device = like.device.index
        addresses, kinds = described(tensors)
        key = variant, device, *settings, *kinds
        plan = self.get(key)
        if plan is None or launcher.has_launch_hooks():  # a profiler's hooks need Triton's own launches
            return self.record(key, like, tensors, compute)
        results, new = [], like.new_empty_strided
        for result in plan.results:
            if result is None:
                results.append(None)
                addresses.append(0)
            else:
                shape, strides, dtype = result  # fewer arguments cost PyTorch less time to parse
                made = new(shape, strides) if dtype is None else new(shape, strides, dtype=dtype)
                results.append(made)
                addresses.append(made.data_ptr())
        if plan.workspace:
            workspace = like.new_empty(plan.workspace, dtype=torch.float32)
            addresses.append(workspace.data_ptr())
        plan.launch(addresses)
        return tuple(results)

    def record(self, key, like, tensors, compute):
        """compute(), whose launches become a plan if each of their tensors has the address of one that is known.

        The plan takes the addresses of `tensors`, then of the results, then of the workspace. The key tells which
        inputs are at the same address.
        """
        workspace = Workspace(like)
        launcher.recording.launches = recorded = []
        try:
            results = compute(workspace.part)
        finally:
            launcher.recording.launches = None
        named = *tensors, *results
        places = [(x.data_ptr(), index, 0) for index, x in enumerate(named) if x is not None]
        places += [(x.data_ptr(), len(named), offset) for x, offset in workspace.parts]
        launches = [planned(launch, places) for launch in recorded]
        own = {id(x) for x in tensors if x is not None}
        if launches and None not in launches and not any(id(result) in own for result in results):
            if len(self) >= MAX_PLANS:
                self.clear()
            made = [
                None if x is None else (tuple(x.shape), x.stride(), None if x.dtype == like.dtype else x.dtype)
                for x in results
            ]
            self[key] = Plan(launches, like.device.index, made, workspace.size)
        return results


def planned(launch, places):
    """A launch of a plan, or None if it has another tensor. places: (address, index, offset)."""
    binary, programs, arguments, constants = launch
    run, encoders = encoding(binary)
    values, found, copies = [], [], []
    for value in (*arguments, *constants):
        descriptor = isinstance(value, TensorDescriptor)
        tensor = value.base if descriptor else value
        if not hasattr(tensor, "data_ptr"):
            values.append(value)
            continue
        address = tensor.data_ptr()
        same = [(index, offset) for other, index, offset in places if other == address]
        if not same:
            return None
        if descriptor:
            copies.append((len(values), *same[0], Descriptors(value, next(encoders, None))))
            values += [0, *value.shape, *value.strides] if run is not binary.run else [0]
        else:
            found.append((len(values), *same[0]))
            values.append(0)
    return run, programs, binary.function, binary.packed_metadata, values, found, copies
