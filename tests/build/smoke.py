"""smoke.py compiled|plain|one-thread: an installed fastlm imports and computes. Run it outside the checkout."""

import importlib.util
import pathlib
import sys
import warnings

import torch

expected = sys.argv[1]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastlm
said = [str(warning.message) for warning in caught if "fastlm" in str(warning.message)]
info = fastlm.info()

if expected == "plain":
    assert len(said) == 1 and "compiler" in said[0], said
    assert info.isa is None and "compiler" in info.build and info.build in str(info), str(info)
    assert info.backends["cpu"] and not info.backends["torch"] and not info.backends["reference"], info.backends
    backends = ("torch", "reference")
else:
    assert said == [], said
    assert info.isa and not info.build, str(info)
    assert info.openmp == (expected == "compiled"), str(info)
    assert ("1 thread (built without OpenMP)" in str(info)) == (expected == "one-thread"), str(info)
    backends = ("cpu", "torch", "reference")

# The Triton kernels are installed inside the package only.
kernels = importlib.util.find_spec("fastlm.kernels")
assert kernels is not None and pathlib.Path(kernels.origin).with_name("attention.py").exists(), kernels
assert importlib.util.find_spec("kernels") is None

torch.manual_seed(0)
heads, x, wide, vocabulary = torch.randn(2, 3, 40, 16), torch.randn(70, 48), torch.randn(96, 48), torch.randn(301, 48)
targets, ones = torch.randint(301, (70,)), torch.ones(48)
OPERATORS = {
    "attention": lambda backend, x: fastlm.attention(heads * x.mean(), heads, heads, causal=True, backend=backend),
    "layernorm_residual": lambda backend, x: fastlm.layernorm_residual(x, x, ones, backend=backend)[0],
    "gelu_mlp": lambda backend, x: fastlm.gelu_mlp(x, wide, None, wide.t().contiguous(), None, backend=backend),
    "glu_mlp": lambda backend, x: fastlm.glu_mlp(x, wide, wide, wide.t().contiguous(), backend=backend),
    "linear": lambda backend, x: fastlm.linear(x, wide, backend=backend),
    "linear_cross_entropy": lambda backend, x: fastlm.linear_cross_entropy(x, vocabulary, targets, backend=backend),
    "linear_log_prob": lambda backend, x: fastlm.linear_log_prob(x, vocabulary, targets, backend=backend)[0],
}
for name, operator in OPERATORS.items():
    results = {}
    for backend in (None, *backends):
        leaf = x.clone().requires_grad_()
        output = operator(backend, leaf)
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(output, leaf, upstream)
        results[backend] = output.detach(), gradient
    for backend in (None, *backends):
        for ours, truth in zip(results[backend], results["reference"], strict=True):
            torch.testing.assert_close(
                ours, truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item(), msg=f"{name} on {backend}"
            )

stepped = {}
for backend in (None, *backends):
    parameter = wide.clone().requires_grad_()
    parameter.grad = wide.flip(0).contiguous()
    fastlm.optim.AdamW([parameter], max_grad_norm=1.0, backend=backend).step()
    stepped[backend] = parameter.detach()
for backend in (None, *backends):
    torch.testing.assert_close(stepped[backend], stepped["reference"], rtol=1e-5, atol=1e-5, msg=f"AdamW on {backend}")
print(f"{expected}: {', '.join(OPERATORS)} and AdamW agree on {', '.join(backends)}")
