"""CUDA graphs without a GPU: what a function does is recorded, operator by operator, and repeated on the same tensors.

As in a graph, Python runs while it is recorded and not again, recording changes nothing, and each temporary result of a repetition stands for the recorded one.
Operators that hand a value to Python raise, as a capture does.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

WAIT = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::_unique2",
}


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function._schema.name in WAIT:
            raise RuntimeError(f"{function} waits for the GPU")
        for argument, given in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in pytree.tree_leaves(given):
                    self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        results = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, results))
        return results


class Recording:
    """As torch.cuda.CUDAGraph."""

    def __init__(self, step, generator):
        drawn_from = generator or torch.default_generator
        state, recorder = drawn_from.get_state(), Recorder()
        with recorder:
            step()
        drawn_from.set_state(state)
        for tensor, value in reversed(recorder.before.values()):
            tensor.copy_(value)
        self.calls, self.replays = recorder.calls, 0

    def replay(self):
        self.replays += 1
        now = {}
        for function, args, kwargs, recorded in self.calls:
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: now.get(id(t), t), (args, kwargs))
            results = function(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(recorded), pytree.tree_leaves(results), strict=True):
                if torch.is_tensor(old):
                    now[id(old)] = new
