"""The backend triton: where it is selected, its messages, and its launches, all without a GPU."""

import re
import subprocess
import sys
import types
import warnings

import pytest
import torch

import fastlm
from fastlm.backends import gpu as gpu_backends
from fastlm.backends import measured, registry, selection, table
from fastlm.backends import triton as backend
from fastlm.backends.rule import Rule
from fastlm.ops.attention.spec import Sizes as AttentionSizes
from fastlm.ops.layernorm_residual.spec import Sizes
from fastlm.ops.linear.spec import Sizes as LinearSizes
from tests.kernels.support import kernel_modules, set_architecture
from tests.support import floats, implementation_module, on_backends, set_logits_bytes

CUDA = torch.device("cuda", 0)
OPERATORS = registry.operators()
LAYERNORM, LINEAR, ATTENTION = (OPERATORS[name] for name in ("layernorm_residual", "linear", "attention"))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU, as far as backend selection asks for one."""
    card = types.SimpleNamespace(name="Card", capability=(9, 0), shared=227 << 10)
    for operator in registry.operators().values():
        if operator.implements("triton"):
            operator.implementation("triton")  # imports kernels, which are interpreted if the variable is set then
    monkeypatch.setattr(backend, "device_type", "cuda")
    monkeypatch.setattr(backend, "missing", lambda: "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: card.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: card.capability)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: types.SimpleNamespace(shared_memory_per_block_optin=card.shared),
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # without a table of the user

    def forget():
        for cached in (backend.gpu_refusals, backend.architecture, backend.race_refusals):
            cached.cache_clear()
        table.forget()
        selection.forget()

    forget()
    yield card
    forget()


def decide(operator, sizes, dtype=torch.bfloat16, forced=None):
    return selection.decide(operator, CUDA, dtype, forced, sizes)


def decided(dtype=torch.bfloat16, forced=None, width=768):
    return decide(LAYERNORM, Sizes(40, width, False), dtype, forced)


def test_triton_is_first_on_a_gpu(gpu):
    assert decided() == ("triton", None)
    assert decided(torch.float64) == ("torch", "layernorm_residual: torch instead of triton")
    for operator in OPERATORS.values():
        if operator.implements("triton"):
            sizes = operator.sizes(*[1] * len(operator.size_names))
            assert decide(operator, sizes, torch.float16)[0] == "triton"


def set_rules(monkeypatch, card, *rules):
    monkeypatch.setitem(measured.GPUS, card, rules)
    table.forget()


def make_available(monkeypatch, *names):
    """Only these backends are available, and cuda refuses no call."""
    for name in registry.BACKENDS:
        reasons = [] if name in names else ["is not compiled here"]
        monkeypatch.setattr(registry.load(name), "unavailable", lambda reasons=reasons: reasons)
    monkeypatch.setattr(registry.load("cuda"), "refuses", lambda device, dtype: [])


def test_a_rule_of_the_gpus_table_selects_pytorch(gpu, monkeypatch):
    rule = Rule("layernorm_residual", "bfloat16", {"width": (None, 512)})
    set_rules(monkeypatch, "Card", rule)
    assert decided(width=512) == ("torch", None)
    assert decided(width=513)[0] == "triton"
    assert decided(torch.float16, width=512)[0] == "triton"
    measured.GPUS.pop("Card")
    set_rules(monkeypatch, "Another", rule)
    assert decided(width=512)[0] == "triton"


@pytest.mark.parametrize(
    "available, width, expected",
    [
        (("triton", "cuda", "torch"), 512, ("cuda", None)),
        (("triton", "cuda", "torch"), 513, ("triton", None)),
        (("triton", "cuda", "torch"), 2000, ("torch", None)),
        # The other backends keep their order, and the fallback is counted.
        (("triton", "torch"), 512, ("triton", "layernorm_residual: triton instead of cuda")),
        (("torch",), 512, ("torch", "layernorm_residual: torch instead of cuda")),
        # A rule for PyTorch that PyTorch refuses is skipped.
        (("cuda",), 2000, ("cuda", "layernorm_residual: cuda instead of triton")),
    ],
)
def test_a_rule_of_the_gpus_table_selects_any_backend(gpu, available, width, expected, monkeypatch):
    cuda = Rule("layernorm_residual", "bfloat16", {"width": (None, 512)}, "cuda")
    set_rules(monkeypatch, "Card", cuda, Rule("layernorm_residual", "bfloat16", {"width": (2000, None)}))
    make_available(monkeypatch, *available)
    assert decided(width=width) == expected


def test_a_rule_for_pytorch_that_it_refuses_is_skipped(gpu, monkeypatch):
    """PyTorch's dropout has other bits. That the rule does not apply then is no fallback."""
    make_available(monkeypatch, "triton", "cuda", "torch")
    rules = Rule("layernorm_residual", "bfloat16"), Rule("layernorm_residual", "bfloat16", {"rows": (None, 40)}, "cuda")
    set_rules(monkeypatch, "Card", *rules)
    for rows, dropout, expected in ((40, False, "torch"), (40, True, "cuda"), (41, True, "triton")):
        assert decide(LAYERNORM, Sizes(rows, 8, dropout)) == (expected, None)


def test_the_users_own_table_of_a_gpu(gpu, monkeypatch):
    set_rules(monkeypatch, "Card", Rule("layernorm_residual", "bfloat16"))
    file = table.user_table()
    file.parent.mkdir()
    row = '{"operator": "layernorm_residual", "dtype": "bfloat16", "where": {"rows": [null, 40]}, "first": "cuda"}'
    for content, expected in (
        (f'{{"Card": [{row}]}}', "cuda"),
        ('{"Card": []}', "triton"),
        ('{"another": []}', "torch"),
    ):
        make_available(monkeypatch, "triton", "cuda", "torch")
        file.write_text(content)
        table.forget()
        assert decided() == (expected, None)


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"operator": "layernorm", "dtype": "bfloat16"}', "operator: expected one of adamw, .*, got 'layernorm'"),
        ('{"operator": "linear", "dtype": "bf16"}', "dtype: expected one of float32, bfloat16, float16, got 'bf16'"),
        (
            '{"operator": "linear", "dtype": "bfloat16", "first": "cpu"}',
            "first: expected one of triton, cuda, torch, got 'cpu'",
        ),
        (
            '{"operator": "linear", "dtype": "bfloat16", "where": {"width": [1, 2]}}',
            "where: expected some of rows, in_width, out_width, conv1d, got 'width'",
        ),
        (
            '{"operator": "linear", "dtype": "bfloat16", "where": {"rows": ["few", 2]}}',
            r"rows: expected two integers or null, got \['few', 2\]",
        ),
        ('{"operator": "linear", "dtype": "bfloat16", "where": {"rows": [1]}}', "unpack"),
        ('{"operator": "linear"}', "dtype"),
        ('{"operator": [], "dtype": {}}', "operator: expected one of"),
        ("7", "has no attribute 'get'"),
    ],
)
def test_a_malformed_table_of_a_gpu_is_reported_once_and_ignored(gpu, row, reason, monkeypatch):
    set_rules(monkeypatch, "Card", Rule("layernorm_residual", "bfloat16"))
    table.user_table().parent.mkdir()
    table.user_table().write_text(f'{{"Card": [{row}]}}')
    message = rf"table.json: cannot be read \(.*{reason}.*\); the measurements that come with fastlm apply"
    with pytest.warns(RuntimeWarning, match=message):
        assert decided() == ("torch", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decided() == ("torch", None)


def test_each_model_of_gpu_is_reported(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["Card", "Other", "Card"][index])
    rules = [
        Rule("attention", "bfloat16", {"query_len": (None, 32)}, "cuda"),
        Rule("layernorm_residual", "float16", {"rows": (None, 181)}),
    ]
    set_rules(monkeypatch, "Card", *rules, Rule("gelu_mlp", "bfloat16", {"conv1d": (0, 0)}, "cuda"))
    order = "triton, cuda, torch, reference"
    unmeasured = f"Other: not measured, backend order {order} (fastlm info --measure measures it)"
    assert fastlm.info().gpus == [
        "Card: cuda for attention in bfloat16 (query_len ≤ 32); gelu_mlp in bfloat16 (not conv1d), "
        f"torch for layernorm_residual in float16 (rows ≤ 181); otherwise {order}",
        unmeasured,
    ]
    set_rules(monkeypatch, "Card")
    assert fastlm.info().gpus == [f"Card: {order}, as measured", unmeasured]
    assert f"GPU: {unmeasured}\n" in str(fastlm.info())


def test_no_gpu_is_reported_if_pytorch_cannot_initialise_cuda(gpu, monkeypatch):
    def refuse(index):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", refuse)
    assert fastlm.info().gpus == []


@pytest.mark.parametrize(
    "changed, reason",
    [
        (
            {"capability": (7, 5)},
            "needs an architecture of sm_80 or later, and Card is sm_75 (auto takes another backend)",
        ),
        ({"shared": 48 << 10}, "needs 64 KiB of shared memory, and Card has 48 (auto takes another backend)"),
    ],
)
def test_an_unsupported_gpu_is_named_and_the_next_backend_selected(gpu, changed, reason):
    vars(gpu).update(changed)
    assert decided() == ("torch", "layernorm_residual: torch instead of triton")
    with pytest.raises(fastlm.Unsupported) as raised:
        decided(forced="triton")
    cpu, cuda = (
        ", ".join(LAYERNORM.refusals(name, CUDA, torch.bfloat16, Sizes(40, 768, False))) for name in ("cpu", "cuda")
    )
    others = "torch is available, but not selected; reference is available, but not selected"
    call = "layernorm_residual on cuda:0 in torch.bfloat16 with backend='triton'"
    assert str(raised.value) == f"{call}: cpu {cpu}; triton {reason}; cuda {cuda}; {others}"


@pytest.mark.parametrize(
    "version, capability, refused",
    [
        ("3.6.0", (8, 6), False),
        ("3.6.0", (9, 0), True),
        ("3.7.0", (10, 0), True),
        ("3.6.0", (12, 0), False),
        ("3.7.1+git1", (9, 0), False),
        ("3.7.1", (10, 3), False),
        ("3.8.0", (9, 0), False),
        ("3.8.0", (10, 0), True),
        ("3.9.0", (10, 0), False),
        ("3.10.0", (10, 0), False),
    ],
)
def test_attention_is_refused_where_triton_leaves_out_a_fence(gpu, version, capability, refused, monkeypatch):
    monkeypatch.setattr("triton.__version__", version)
    gpu.capability = capability
    reasons = ATTENTION.refusals("triton", CUDA, torch.bfloat16, AttentionSizes(*[1] * len(AttentionSizes._fields)))
    assert bool(reasons) == refused
    for reason in reasons:
        message = rf"needs Triton 3\.7\.1.* or later on sm_\d+, not {re.escape(version)}, which leaves out a fence .*"
        assert re.fullmatch(message, reason)
    assert not LAYERNORM.refusals("triton", CUDA, torch.bfloat16, Sizes(40, 768, False))


def test_tensors_on_other_devices(gpu):
    for device in ("cpu", "mps:0"):
        reasons = backend.backend.refuses(torch.device(device), torch.float32)
        assert reasons == [f"supports CUDA and ROCm tensors, not {device} (.to('cuda') moves them)"]


def select(device, dtype=torch.bfloat16):
    x = types.SimpleNamespace(is_cpu=False, device=device)
    return selection.select(LAYERNORM, x, dtype, Sizes(40, 768, False), None).backend.name


def test_each_gpu_is_checked(gpu, monkeypatch):
    """An old GPU next to a new one, whichever is used first."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    for _ in range(2):
        for index, name in enumerate(("triton", "torch")):
            assert select(torch.device("cuda", index)) == name


def test_a_row_too_wide_for_registers(gpu):
    assert decided(width=16384)[0] == "triton" and decided(width=16385)[0] == "torch"
    with pytest.raises(fastlm.Unsupported, match="triton holds a row in registers: width up to 16384, not 16385"):
        decided(forced="triton", width=16385)


@pytest.mark.parametrize("packed", [False, True])
def test_a_head_too_wide_for_a_tile(gpu, packed):
    sizes = AttentionSizes(*[0] * len(AttentionSizes._fields))._replace(packed=packed)
    assert decide(ATTENTION, sizes._replace(head_dim=256)) == ("triton", None)
    assert decide(ATTENTION, sizes._replace(head_dim=257)) == ("torch", "attention: torch instead of triton")
    with pytest.raises(fastlm.Unsupported, match="triton holds heads of head_dim up to 256, not 257;"):
        decide(ATTENTION, sizes._replace(head_dim=257), forced="triton")


MISSING = backend.missing  # before a test replaces it


def test_no_triton_and_an_old_one(gpu, monkeypatch):
    for start, version in (
        ("needs Triton, which cannot be imported", None),
        ("needs Triton 3.6 or later, not 3.5.1", "3.5.1"),
    ):
        monkeypatch.setitem(sys.modules, "triton", version and types.SimpleNamespace(__version__=version))
        reason = MISSING.__wrapped__()
        assert reason.startswith(start) and "\n" not in reason
        monkeypatch.setattr(backend, "missing", lambda reason=reason: reason)
        assert decided()[0] == "torch"
        assert registry.unavailable("triton") == [reason] == fastlm.info().backends["triton"]


def test_without_a_gpu_and_without_the_interpreter():
    code = (
        "import torch, fastlm; torch.cuda.is_available = lambda: False; "
        "fastlm.linear(torch.ones(2, 2), torch.ones(2, 2), backend='triton')"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    reasons = "triton finds no GPU (torch.cuda.is_available() is false)", "triton needs Triton"
    assert any(reason in done.stderr for reason in reasons)


def test_the_interpreter_is_refused_on_a_gpu(gpu, monkeypatch):
    """It rounds and multiplies bfloat16 in another way."""
    for value, refused in (("1", True), ("True", True), ("0", False), ("", False)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        expected = ["does not run in Triton's interpreter (unset TRITON_INTERPRET)"] if refused else []
        assert registry.unavailable("triton") == fastlm.info().backends["triton"] == expected
        assert decided()[0] == ("torch" if refused else "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(fastlm.Unsupported, match=r"triton does not run in .* \(unset TRITON_INTERPRET\);"):
        decided(forced="triton")
    monkeypatch.setattr(backend, "device_type", "cpu")  # as accept("cpu") makes it
    assert registry.unavailable("triton") == []


def test_a_fallback_is_counted(gpu):
    gpu.capability = (7, 0)
    what = "layernorm_residual: torch instead of triton"
    before = fastlm.info().fallbacks.get(what, 0)
    for _ in range(2):
        assert select(CUDA, torch.float32) == "torch"
    assert fastlm.info().fallbacks[what] == before + 2


@on_backends("triton")
def test_the_interpreter_is_used_on_a_cpu_only_if_forced(backend):
    x, sizes = floats(4, 8), LinearSizes(4, 8, 8, False)
    assert selection.decide(LINEAR, x.device, x.dtype, None, sizes)[0] != "triton"
    assert selection.decide(LINEAR, x.device, x.dtype, "triton", sizes)[0] == "triton"
    with pytest.raises(fastlm.Unsupported, match=r"triton supports CPU tensors, not cuda:0 \(\.to\('cpu'\) "):
        selection.decide(LINEAR, CUDA, x.dtype, "triton", sizes)


def set_all(value):
    torch.backends.fp32_precision = value


def set_cuda(value):
    torch.backends.cudnn.fp32_precision = value  # PyTorch's name for all of CUDA


def set_products(value):
    torch.backends.cuda.matmul.fp32_precision = value


def allow_tf32(value):
    torch.backends.cuda.matmul.allow_tf32 = value


@pytest.fixture
def precisions():
    """Restores the settings that a user can change by PyTorch's older and newer API."""
    settings = torch.backends, torch.backends.cudnn, torch.backends.cuda.matmul
    before, older = [each.fp32_precision for each in settings], torch.get_float32_matmul_precision()
    yield
    for each in settings:
        each.fp32_precision = "ieee"
    torch.set_float32_matmul_precision(older)  # PyTorch records it separately
    for each, value in zip(settings, before, strict=True):
        each.fp32_precision = value


@pytest.mark.parametrize(
    "steps, wanted",
    [
        ([], "ieee"),
        ([(torch.set_float32_matmul_precision, "highest")], "ieee"),
        ([(torch.set_float32_matmul_precision, "high")], "tf32"),
        ([(torch.set_float32_matmul_precision, "medium")], "tf32"),
        ([(torch.set_float32_matmul_precision, "high"), (torch.set_float32_matmul_precision, "highest")], "ieee"),
        ([(allow_tf32, True)], "tf32"),
        ([(set_products, "tf32")], "tf32"),
        ([(set_products, "ieee")], "ieee"),
        ([(set_products, "none")], "ieee"),
        ([(set_cuda, "tf32")], "tf32"),
        ([(set_all, "tf32")], "tf32"),  # inherited
        ([(set_all, "ieee")], "ieee"),
        ([(set_all, "tf32"), (set_products, "ieee")], "ieee"),  # the more specific setting applies
        ([(set_all, "tf32"), (set_cuda, "ieee")], "ieee"),
        ([(set_all, "ieee"), (set_products, "tf32")], "tf32"),
        ([(set_all, "tf32"), (set_products, "ieee"), (set_products, "none")], "tf32"),
        ([(torch.set_float32_matmul_precision, "high"), (set_products, "ieee")], "ieee"),  # the later one applies
    ],
    ids=lambda part: (
        " ".join(f"{set_by.__name__}={value}" for set_by, value in part) if isinstance(part, list) else part
    ),
)
def test_products_of_float32_follow_the_users_precision(steps, wanted, precisions, monkeypatch):
    x = floats(1)
    set_products("none")
    for set_by, value in steps:
        set_by(value)
    assert gpu_backends.precision(x) == wanted and gpu_backends.precision(x.bfloat16()) == "ieee"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert gpu_backends.precision(x) == "ieee"


# Launches


class Kernel:
    """Records the launches by Triton (slow), the direct ones (fast), and those with launch hooks (hooked)."""

    def __init__(self):
        self.slow, self.fast, self.hooked = [], [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.slow.append((grid, arguments, options))
            return Compiled(self)

        return run


class Compiled:
    """Like Triton's: launched by run(), or with launch hooks by compiled[grid]."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.hooked.append((grid, arguments))

    def run(self, *given):
        *grid, stream, function, metadata, of_launch, on_enter, on_exit = given[:9]
        assert (stream, function, metadata) == (
            "stream",
            "function",
            "metadata",
        ) and of_launch is on_enter is on_exit is None
        self.kernel.fast.append((tuple(grid), given[9:]))


@pytest.fixture
def launch(monkeypatch):
    """kernels/launch.py as on a GPU, with empty caches."""
    pytest.importorskip("triton")
    from fastlm.kernels import launch

    monkeypatch.setattr(launch, "compiled", {})
    monkeypatch.setattr(launch, "repeated", {})
    monkeypatch.setattr(launch, "current_stream", lambda: lambda device: "stream")
    return launch


def test_the_second_launch_of_a_kind_is_direct(launch):
    kernel, x = Kernel(), torch.zeros(64)

    def go(*arguments, constants=(32,), device=0, warps=4):
        launch.launch(kernel, 7, arguments, constants, warps, 2, device)

    go(x, 48, 0.5, None)
    # Another tensor, and scalars of the same kinds, new and seen before.
    for number, (size, factor) in enumerate([(64, 0.25), (64, 0.25), (48, 0.5)], start=1):
        go(torch.ones(64), size, factor, None)
        assert len(kernel.slow) == 1 and len(kernel.fast) == number
        assert (
            kernel.fast[-1][0] == (7, 1, 1)
            and kernel.fast[-1][1][0].sum() == 64
            and kernel.fast[-1][1][1:] == (size, factor, None, 32)
        )
    assert kernel.slow[0][2] == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    others = [
        (x.half(), 48, 0.5, None),
        (x[1:], 48, 0.5, None),
        (x, 49, 0.5, None),
        (x, 1, 0.5, None),
        (x, 2**40, 0.5, None),
        (x, 48, 0.5, x),
    ]
    for other in others:
        go(*other)
    go(x, 48, 0.5, None, constants=(64,))
    go(x, 48, 0.5, None, device=1)
    go(x, 48, 0.5, None, warps=8)
    assert len(kernel.slow) == 1 + len(others) + 3
    launch.launch(kernel, 0, (x,), (), 4, 2, 0)  # nothing to do
    assert len(kernel.slow) == 1 + len(others) + 3 and len(kernel.fast) == 3


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_are_called(hook, launch):
    import triton

    kernel, x, chain = Kernel(), torch.zeros(64), getattr(triton.knobs.runtime, hook)
    for _ in range(2):
        launch.launch(kernel, 7, (x, 48), (32,), 4, 2, 0)
    chain.add(print)
    try:
        launch.launch(kernel, 7, (x, 48), (32,), 4, 2, 0)
    finally:
        chain.remove(print)
    assert len(kernel.slow) == len(kernel.fast) == 1 and kernel.hooked == [((7, 1, 1), (x, 48, 32))]
    launch.launch(kernel, 7, (x, 48), (32,), 4, 2, 0)
    assert len(kernel.fast) == 2


def compiled_for(kernel, arguments, constants):
    """What Triton recompiles a kernel for. Of integers with do_not_specialize it is only whether they have 32 bits."""
    from fastlm.kernels.launch import kind

    if hasattr(kernel, "params"):
        names, plain = (
            [parameter.name for parameter in kernel.params],
            {parameter.name for parameter in kernel.params if parameter.do_not_specialize},
        )
    else:  # interpreted
        names, plain = kernel.arg_names, set(kernel.kwargs.get("do_not_specialize") or ())
    kinds = (kind(value)[2] if name in plain else kind(value) for name, value in zip(names, arguments, strict=False))
    return kernel, constants, *kinds


def attention_of(queries, keys):
    q, k = torch.zeros(2, queries, 4, 64, requires_grad=True), torch.zeros(2, keys, 2, 64, requires_grad=True)
    fastlm.attention(
        q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2), causal=True, dropout_p=0.1, backend="triton"
    ).sum().backward()


def packed_of(tokens):
    x, starts = torch.zeros(tokens, 4, 64, requires_grad=True), torch.tensor([0, tokens])
    fastlm.attention_varlen(x, x, x, starts, starts, causal=True, backend="triton").sum().backward()


def block_of(rows):
    x, w = torch.zeros(rows, 64, requires_grad=True), torch.zeros(64, 64, requires_grad=True)
    y, s = fastlm.layernorm_residual(x, x, w[0], w[1], dropout_p=0.1, backend="triton")
    y = fastlm.gelu_mlp(y, w, w[0], w, w[1], backend="triton")
    target = torch.zeros(rows, dtype=torch.int64)
    loss = fastlm.linear_cross_entropy(y + s, w, target, w[0], backend="triton")
    (loss + sum(x.sum() for x in fastlm.linear_log_prob(y + s, w, target, w[0], backend="triton"))).backward()


@on_backends("triton")
@pytest.mark.parametrize("card", ["sm_90", "sm_80", "gfx942"])  # with the fused products of gelu_mlp and without
@pytest.mark.parametrize(
    "run, combines",
    [
        pytest.param(lambda n: attention_of(n, n), [], id="attention"),
        # The kernel that combines the splits is compiled for up to 2, 4, … 128 of them.
        pytest.param(lambda n: attention_of(1, n + 256), [2, 8], id="decode"),
        pytest.param(packed_of, [], id="packed"),
        pytest.param(block_of, [], id="the rest of a layer"),
    ],
)
def test_no_length_is_recompiled(run, combines, card, backend, monkeypatch):
    """At odd and even lengths and multiples of 16, every launch of a step is of a kind that the first length had."""
    launched = []
    set_architecture(monkeypatch.setattr, card)
    for operator in ("linear_cross_entropy", "linear_log_prob"):  # several chunks with odd numbers of rows
        set_logits_bytes(monkeypatch, implementation_module(operator, "triton"), 100 * 64 * 4)
    for kernels in kernel_modules():
        monkeypatch.setattr(
            kernels,
            "launch",
            lambda kernel, programs, arguments, constants, *rest, **options: launched.append(
                (kernel, arguments, constants)
            ),
        )
    seen = []
    for length in (320, 100, 333, 400, 512, 1031):
        launched.clear()
        run(length)
        seen.append({compiled_for(*launch) for launch in launched})
    others = set.union(*seen) - seen[0]
    assert seen[0] and sorted(constants[-1] for _, constants, *_ in others) == combines, "\n".join(
        f"{kind[0]}: {kind[1:]}" for kind in others
    )


@pytest.mark.parametrize("hip, kinds", [(False, 1), (True, 2)])
def test_on_amd_storage_beyond_2_gib_is_another_kind(hip, kinds, launch, monkeypatch):
    """Triton compiles 32-bit offsets if the storage, not the view of it, allows them."""
    monkeypatch.setattr(launch, "HIP", hip)
    kernel = Kernel()
    for length in (16, 2**31 - 1, 2**31, 2**33):
        x = torch.empty(length, dtype=torch.int8, device="meta")
        for view in (x, x[:16]):
            launch.launch(kernel, 7, (view, 16), (32,), 4, 2, 0)
    assert len(kernel.slow) == kinds and len(kernel.fast) == 8 - kinds
    assert [arguments[0].untyped_storage().nbytes() for _, arguments, _ in kernel.slow] == [16, 2**31][:kinds]


def test_the_caches_are_bounded(launch, monkeypatch):
    monkeypatch.setattr(launch, "MAX_ENTRIES", 3)
    for constant in range(20):
        kernel = Kernel()
        for size in (32, 32, 64, 96, 128):
            launch.launch(kernel, 1, (size,), (constant,), 4, 2, 0)
        assert len(kernel.slow) == 1 and len(kernel.fast) == 4
    assert len(launch.compiled) <= 3 and len(launch.repeated) <= 3
