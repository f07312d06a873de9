"""CUDA graphs emulated on a CPU: the operators of a function are recorded and replayed on the same tensors.

As with a graph, Python code runs during recording only, recording has no side effects, and temporaries are replaced by
those of the replay. Operators that return a value to Python raise an error, as they do during a capture.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SYNCHRONISING = {
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
        if function._schema.name in SYNCHRONISING:
            raise RuntimeError(f"{function} synchronises")
        for argument, given in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in pytree.tree_leaves(given):
                    self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        results = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, results))
        return results


class Recording:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self, step, generator):
        source = generator or torch.default_generator
        state, recorder = source.get_state(), Recorder()
        with recorder:
            step()
        source.set_state(state)
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
