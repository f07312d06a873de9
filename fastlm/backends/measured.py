"""The rows of the table that come with fastlm: data from measurements, with the machine that they were taken on.

A CPU's key is its microarchitecture and the widest instruction set that it can run, as table.cpu_key() returns it.
"""

from fastlm.backends.rule import Rule

CPUS: dict[str, tuple[Rule, ...]] = {
    # Two cores, PyTorch 2.13. The small-M products were measured when their weights were packed, which they no longer
    # are; single queries in fp32.
    "zen4/avx512_bf16": (
        Rule("linear", "float32", {"rows": (None, 4)}),
        Rule("linear", "bfloat16"),  # nothing to fuse: PyTorch's backward is 2–4 % faster
        Rule("gelu_mlp", "float32", {"rows": (None, 4)}),
        Rule("gelu_mlp", "bfloat16", {"rows": (None, 255)}),
        Rule("linear_cross_entropy", "bfloat16"),  # PyTorch is 4–9 % faster with gradients, 5 % slower without
        Rule("attention", "float32", {"query_len": (None, 1), "packed": (0, 0)}),
    ),
    # Two cores, PyTorch 2.13: forward and backward together, no operator was slower at any size of `fastlm bench`.
    "zen5/avx512_bf16": (),
}

# A CPU with AMX that has no rows of its own: two cores of a Xeon with AMX, PyTorch 2.13. PyTorch's bf16 products are as
# fast as ours; it is selected where nothing around them was faster on one thread. Up to 16 rows, where the weight is
# read unpacked, ours were 1.0–1.9 times as fast. PyTorch's large, wide fp32 products were 5–10 % faster.
WITH_AMX = (
    Rule("linear", "bfloat16", {"rows": (17, None), "conv1d": (1, 1)}),
    Rule("gelu_mlp", "bfloat16", {"rows": (17, None), "conv1d": (0, 0)}),
    Rule("linear_cross_entropy", "bfloat16"),
    *(Rule(name, "float32", {"rows": (182, None), "in_width": (512, None)}) for name in ("linear", "gelu_mlp")),
)

# The same CPU where fastlm's kernels cannot use AMX: the system forbids it, the compiler is too old, or another ISA is
# forced.
AMX_UNUSED = (
    *(rule for rule in WITH_AMX if rule.dtype == "float32"),
    *(Rule(name, "bfloat16") for name in ("linear", "gelu_mlp", "linear_cross_entropy")),
    Rule("attention", "bfloat16", {"query_len": (182, None), "packed": (0, 0)}),
)

# Small calls on any CPU. An autograd.Function in Python costs some 50–100 µs more, forward and backward, than the
# autograd of PyTorch's own operators, which is more than the kernels save: for these three operators PyTorch's calls
# compose to the same result.
SMALL_CALLS = (
    Rule("layernorm_residual", "float32", {"elements": (None, 1 << 15)}),
    Rule("linear", "float32", {"multiply_adds": (None, 1 << 19)}),
    Rule("linear_cross_entropy", "float32", {"multiply_adds": (None, 1 << 20)}),
)

# By torch.cuda.get_device_name(), from `make gpu`, which writes such rows. No GPU was measured yet.
GPUS: dict[str, tuple[Rule, ...]] = {}
