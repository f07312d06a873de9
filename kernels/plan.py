"""The launches of a call, made again for a call of the same kind.

What an implementation derives from shapes, strides, dtypes, alignments and settings is the same for every such call.
A plan holds the finished arguments of all its launches; only addresses are filled in.
"""

import torch

import fastlm.kernels.launch as launcher

MAX_PLANS = 1024  # of an operator and direction
variant = None  # of the launch configurations: benchmarks/tune_triton.py changes them


def layout(x):
    """What launches depend on in a tensor besides its alignment; None for None."""
    if x is None:
        return None
    if launcher.HIP:
        return x.shape, x.stride(), x.dtype, x.untyped_storage().nbytes() < 2**31
    return x.shape, x.stride(), x.dtype


def addresses_of(tensors):
    """(addresses, 0 for None; what launches depend on in these).

    That is which are below an alignment of 16 bytes, and which are equal: with other equal ones another plan is needed.
    """
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    aligned = equal = None
    for address in addresses:
        if address & 15:
            aligned = tuple([address & 15 for address in addresses])
            break
    given = len(addresses) - addresses.count(0)
    if len(set(addresses)) < given + (given < len(addresses)):
        equal = tuple([addresses.index(address) for address in addresses])
    return addresses, (aligned, equal)


class Plan:
    """Launches, whose tensors are given by their addresses. workspace: the float32 elements that they need besides."""

    __slots__ = "device", "launches", "workspace"

    def __init__(self, launches, device, workspace):
        self.launches, self.device, self.workspace = launches, device, workspace

    def launch(self, addresses):
        """addresses: of each tensor in the order of record(), and of the workspace."""
        stream = launcher.current_stream()(self.device)
        for run, programs, function, metadata, arguments, places in self.launches:
            arguments = arguments.copy()
            for at, index, offset in places:
                arguments[at] = addresses[index] + offset
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

    def find(self, key):
        """The plan, or None: then the call computes it, in record(). A profiler's hooks need Triton's own launches."""
        plan = self.get((variant, key))
        return plan if plan is None or not launcher.has_launch_hooks() else None

    def launch(self, key, like, tensors, compute):
        """compute(new) on the device of `like`, where all results are among the tensors; or its launches by the plan.

        new(shape): uninitialised float32 memory for the launches.
        """
        plan = self.find(key)
        if plan is None:
            workspace = Workspace(like)
            self.record(key, tensors, workspace, like.device.index, lambda: compute(workspace.part) or ())
            return
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        if plan.workspace:
            workspace = like.new_empty(plan.workspace, dtype=torch.float32)
            addresses.append(workspace.data_ptr())
        plan.launch(addresses)

    def record(self, key, tensors, workspace, device, compute):
        """compute(), which launches kernels for these tensors, for its results and for parts of the workspace.

        The launches become a plan if each of their tensors has the address of one of these. The plan takes the
        addresses of `tensors`, then of the results, then of the workspace. The key tells which inputs are at the same
        address.
        """
        if launcher.INTERPRETED:
            return compute()
        launcher.recording.launches = recorded = []
        try:
            results = compute()
        finally:
            launcher.recording.launches = None
        named = *tensors, *results
        places = [(x.data_ptr(), index, 0) for index, x in enumerate(named) if x is not None]
        places += [(x.data_ptr(), len(named), offset) for x, offset in workspace.parts]
        launches = [planned(launch, places) for launch in recorded]
        if launches and None not in launches:
            if len(self) >= MAX_PLANS:
                self.clear()
            self[variant, key] = Plan(launches, device, workspace.size)
        return results


def planned(launch, places):
    """A launch of a plan, or None if it has another tensor. places: (address, index, offset)."""
    binary, programs, arguments, constants = launch
    values, found = [*arguments, *constants], []
    for at, value in enumerate(values):
        if hasattr(value, "data_ptr"):
            address = value.data_ptr()
            same = [(index, offset) for other, index, offset in places if other == address]
            if not same:
                return None
            values[at] = 0
            found.append((at, *same[0]))
    return binary.run, programs, binary.function, binary.packed_metadata, values, found
