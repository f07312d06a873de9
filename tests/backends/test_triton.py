"""Which calls the Triton kernels support and the reasons for refusing others; kernel launches, without a GPU."""

import subprocess
import sys
import types
import warnings

import pytest
import torch

import fastlm
from fastlm.backends import gpu as gpu_helpers
from fastlm.backends import measured, registry, selection, table
from fastlm.backends import triton as backend
from fastlm.backends.rule import Rule
from fastlm.ops.attention.spec import Sizes as AttentionSizes
from fastlm.ops.layernorm_residual.spec import Sizes as LayerNormSizes
from fastlm.ops.linear.spec import Sizes as LinearSizes
from tests.support import floats, implementation_module, on_backends

CUDA = torch.device("cuda", 0)
OPERATORS = registry.operators()
ATTENTION, LAYERNORM, LINEAR = (OPERATORS[name] for name in ("attention", "layernorm_residual", "linear"))
find_missing = backend.missing.__wrapped__  # the gpu fixture replaces backend.missing


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU as far as backend selection inspects it."""
    card = types.SimpleNamespace(name="Card", capability=(9, 0), shared=227 << 10)
    properties = lambda index: types.SimpleNamespace(shared_memory_per_block_optin=card.shared)  # noqa: E731
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "missing", lambda: "")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: card.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: card.capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(selection, "_selected", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # the user's own table does not apply
    clear_caches()
    yield card
    clear_caches()


def clear_caches():
    backend.gpu_refusals.cache_clear()
    backend.architecture.cache_clear()
    table.forget()


def decide(dtype=torch.bfloat16, forced=None, *, rows=40, width=768, dropout=False):
    """Backend selection for a call of layernorm_residual on the GPU."""
    return selection.decide(LAYERNORM, CUDA, dtype, forced, LayerNormSizes(rows, width, dropout))


def attention_sizes(**changed):
    return AttentionSizes(*[0] * len(AttentionSizes._fields))._replace(**changed)


def test_triton_is_first_on_a_gpu(gpu):
    assert decide() == ("triton", None)
    assert decide(torch.float64) == ("torch", "layernorm_residual: torch instead of triton")
    for operator in OPERATORS.values():
        if operator.name == "adamw":  # PyTorch's own is fused on a GPU
            continue
        sizes = operator.sizes(*[1] * len(operator.size_names))
        assert selection.decide(operator, CUDA, torch.float16, None, sizes) == ("triton", None)
    assert selection.decide(ATTENTION, CUDA, torch.float16, None, attention_sizes(packed=False)) == ("triton", None)


def set_rules(monkeypatch, card, *rules):
    monkeypatch.setitem(measured.GPUS, card, rules)
    table.forget()


def make_available(monkeypatch, *names):
    """Make these backends available, whatever is built here, and no others."""
    for name in registry.BACKENDS:
        reasons = [] if name in names else ["is not compiled here"]
        monkeypatch.setattr(registry.load(name), "unavailable", lambda reasons=reasons: reasons)
    monkeypatch.setattr(registry.load("cuda"), "refuses", lambda device, dtype: [])


def test_a_gpu_s_table_puts_pytorch_first_where_it_is_faster(gpu, monkeypatch):
    rule = Rule("layernorm_residual", "bfloat16", {"width": (None, 512)})
    set_rules(monkeypatch, "Card", rule)
    assert decide(width=512) == ("torch", None)
    assert decide(width=513)[0] == "triton"
    assert decide(torch.float16, width=512)[0] == "triton"
    measured.GPUS.pop("Card")
    set_rules(monkeypatch, "Another", rule)
    assert decide(width=512)[0] == "triton"


@pytest.mark.parametrize(
    "available, width, expected",
    [
        (("triton", "cuda", "torch"), 512, ("cuda", None)),
        (("triton", "cuda", "torch"), 513, ("triton", None)),
        (("triton", "cuda", "torch"), 2000, ("torch", None)),
        # The other backends follow in their usual order, and the fallback is counted.
        (("triton", "torch"), 512, ("triton", "layernorm_residual: triton instead of cuda")),
        (("torch",), 512, ("torch", "layernorm_residual: torch instead of cuda")),
        # PyTorch is not available: selection is as without its row.
        (("cuda",), 2000, ("cuda", "layernorm_residual: cuda instead of triton")),
    ],
)
def test_a_gpu_s_table_puts_any_backend_first(gpu, available, width, expected, monkeypatch):
    cuda = Rule("layernorm_residual", "bfloat16", {"width": (None, 512)}, "cuda")
    set_rules(monkeypatch, "Card", cuda, Rule("layernorm_residual", "bfloat16", {"width": (2000, None)}))
    make_available(monkeypatch, *available)
    assert decide(width=width) == expected


def test_a_row_for_pytorch_is_skipped_without_a_fallback_where_pytorch_refuses(gpu, monkeypatch):
    """PyTorch draws other dropout masks, so with dropout the next matching row applies."""
    make_available(monkeypatch, "triton", "cuda", "torch")
    few_rows = Rule("layernorm_residual", "bfloat16", {"rows": (None, 40)}, "cuda")
    set_rules(monkeypatch, "Card", Rule("layernorm_residual", "bfloat16"), few_rows)
    for rows, dropout, expected in ((40, False, "torch"), (40, True, "cuda"), (41, True, "triton")):
        assert decide(rows=rows, width=8, dropout=dropout) == (expected, None)


def test_the_users_own_table_of_a_gpu(gpu, monkeypatch):
    set_rules(monkeypatch, "Card", Rule("layernorm_residual", "bfloat16"))
    make_available(monkeypatch, "triton", "cuda", "torch")
    file = table.user_table()
    file.parent.mkdir()
    row = '{"operator": "layernorm_residual", "dtype": "bfloat16", "where": {"rows": [null, 40]}, "first": "cuda"}'
    for content, expected in (
        (f'{{"Card": [{row}]}}', "cuda"),
        ('{"Card": []}', "triton"),
        ('{"another": []}', "torch"),
    ):
        file.write_text(content)
        table.forget()
        assert decide() == (expected, None)


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
        ("7", "'int' object has no attribute"),
    ],
)
def test_a_malformed_table_of_a_gpu_is_reported_once_and_ignored(gpu, row, reason, monkeypatch):
    set_rules(monkeypatch, "Card", Rule("layernorm_residual", "bfloat16"))
    table.user_table().parent.mkdir()
    table.user_table().write_text(f'{{"Card": [{row}]}}')
    message = rf"table.json: cannot be read \(.*{reason}.*\); the measurements that come with fastlm apply"
    with pytest.warns(RuntimeWarning, match=message):
        assert decide() == ("torch", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decide() == ("torch", None)


def test_info_reports_each_gpu_model(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["Card", "Other", "Card"][index])
    set_rules(
        monkeypatch,
        "Card",
        Rule("attention", "bfloat16", {"query_len": (None, 32)}, "cuda"),
        Rule("layernorm_residual", "float16", {"rows": (None, 181)}),
        Rule("gelu_mlp", "bfloat16", {"conv1d": (0, 0)}, "cuda"),
    )
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


def test_no_gpu_is_reported_where_cuda_cannot_be_initialised(gpu, monkeypatch):
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
def test_an_unsupported_gpu_is_named_and_the_next_backend_is_selected(gpu, changed, reason):
    """One line: which backend and GPU, why, and what to do."""
    vars(gpu).update(changed)
    assert decide() == ("torch", "layernorm_residual: torch instead of triton")
    with pytest.raises(fastlm.Unsupported) as raised:
        decide(forced="triton")
    sizes = LayerNormSizes(40, 768, False)
    cpu, cuda = (", ".join(LAYERNORM.refusals(name, CUDA, torch.bfloat16, sizes)) for name in ("cpu", "cuda"))
    others = "torch could, but another was forced; reference could, but another was forced"
    assert str(raised.value) == (
        f"layernorm_residual on cuda:0 in torch.bfloat16 with backend='triton': cpu {cpu}; triton {reason}; "
        f"cuda {cuda}; {others}"
    )


def test_tensors_on_other_devices_are_refused(gpu):
    for device in ("cpu", "mps:0"):
        reasons = LINEAR.refusals("triton", torch.device(device), torch.float32, LinearSizes(1, 1, 1, False))
        assert reasons == [f"supports CUDA and ROCm tensors, not {device} (.to('cuda') moves them)"]


def tensor_on_gpu(index=0):
    return types.SimpleNamespace(is_cpu=False, device=torch.device("cuda", index))


def select(x, dtype):
    return selection.select(LAYERNORM, x, dtype, LayerNormSizes(40, 768, False), None)


def test_selection_is_per_gpu(gpu, monkeypatch):
    """An old GPU beside a new one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    for _ in range(2):
        for index, name in enumerate(("triton", "torch")):
            assert select(tensor_on_gpu(index), torch.bfloat16).backend is registry.load(name)
    assert len(selection._selected) == 2


def test_a_row_too_wide_for_registers_is_refused(gpu):
    assert decide(width=16384)[0] == "triton"
    assert decide(width=16385)[0] == "torch"
    with pytest.raises(fastlm.Unsupported, match="triton holds a row in registers: width up to 16384, not 16385"):
        decide(forced="triton", width=16385)


@pytest.mark.parametrize("packed", [False, True])
def test_a_head_too_wide_for_a_tile_is_refused(gpu, packed):
    fits, too_wide = (attention_sizes(packed=packed, head_dim=head_dim) for head_dim in (256, 257))
    assert selection.decide(ATTENTION, CUDA, torch.bfloat16, None, fits) == ("triton", None)
    fallback = "torch", "attention: torch instead of triton"
    assert selection.decide(ATTENTION, CUDA, torch.bfloat16, None, too_wide) == fallback
    with pytest.raises(fastlm.Unsupported, match="triton holds heads of head_dim up to 256, not 257;"):
        selection.decide(ATTENTION, CUDA, torch.bfloat16, "triton", too_wide)


@pytest.mark.parametrize(
    "version, message",
    [(None, "needs Triton, which cannot be imported"), ("3.5.1", "needs Triton 3.6 or later, not 3.5.1")],
)
def test_a_missing_or_old_triton_is_reported(gpu, version, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", version and types.SimpleNamespace(__version__=version))
    reason = find_missing()
    assert reason.startswith(message) and "\n" not in reason
    monkeypatch.setattr(backend, "missing", lambda: reason)
    assert decide()[0] == "torch"
    assert registry.unavailable("triton") == [reason] == fastlm.info().backends["triton"]


def test_without_a_gpu_or_the_interpreter_triton_is_unavailable():
    code = """
import torch, fastlm
torch.cuda.is_available = lambda: False
fastlm.linear(torch.ones(2, 2), torch.ones(2, 2), backend="triton")
"""
    environment = {"PYTHONPATH": ":".join(sys.path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    no_gpu = "triton finds no GPU (torch.cuda.is_available() is false)"
    assert no_gpu in done.stderr or "triton needs Triton" in done.stderr


def test_fallbacks_are_counted_on_every_call(gpu):
    gpu.capability = (7, 0)
    what = "layernorm_residual: torch instead of triton"
    before = fastlm.info().fallbacks.get(what, 0)
    for _ in range(2):
        assert select(tensor_on_gpu(), torch.float32).backend is registry.load("torch")
    assert fastlm.info().fallbacks[what] == before + 2


@on_backends("triton")
def test_the_interpreter_runs_on_cpu_tensors_only_where_it_is_forced(backend):
    x, sizes = floats(4, 8), LinearSizes(4, 8, 8, False)
    assert selection.decide(LINEAR, x.device, x.dtype, None, sizes)[0] != "triton"
    assert selection.decide(LINEAR, x.device, x.dtype, "triton", sizes)[0] == "triton"
    without = r"\(without that variable it supports GPUs\)"
    reason = rf"triton supports CPU tensors under TRITON_INTERPRET=1, not cuda:0 {without};"
    with pytest.raises(fastlm.Unsupported, match=reason):
        selection.decide(LINEAR, CUDA, x.dtype, "triton", sizes)


# The precision of float32 products


def set_all(value):
    torch.backends.fp32_precision = value


def set_cuda(value):
    torch.backends.cudnn.fp32_precision = value  # PyTorch's name for all of CUDA


def set_matmul(value):
    torch.backends.cuda.matmul.fp32_precision = value


def allow_tf32(value):
    torch.backends.cuda.matmul.allow_tf32 = value


set_older = torch.set_float32_matmul_precision


@pytest.fixture
def restored_precision():
    """Restores the settings of PyTorch's older and newer API."""
    settings = torch.backends, torch.backends.cudnn, torch.backends.cuda.matmul
    before, older = [each.fp32_precision for each in settings], torch.get_float32_matmul_precision()
    yield
    for each in settings:
        each.fp32_precision = "ieee"
    torch.set_float32_matmul_precision(older)  # PyTorch stores it separately
    for each, value in zip(settings, before, strict=True):
        each.fp32_precision = value


@pytest.mark.parametrize(
    "steps, expected",
    [
        ([], "ieee"),
        ([(set_older, "highest")], "ieee"),
        ([(set_older, "high")], "tf32"),
        ([(set_older, "medium")], "tf32"),
        ([(set_older, "high"), (set_older, "highest")], "ieee"),
        ([(allow_tf32, True)], "tf32"),
        ([(set_matmul, "tf32")], "tf32"),
        ([(set_matmul, "ieee")], "ieee"),
        ([(set_matmul, "none")], "ieee"),
        ([(set_cuda, "tf32")], "tf32"),
        ([(set_all, "tf32")], "tf32"),  # inherited
        ([(set_all, "ieee")], "ieee"),
        ([(set_all, "tf32"), (set_matmul, "ieee")], "ieee"),  # the more specific setting applies
        ([(set_all, "tf32"), (set_cuda, "ieee")], "ieee"),
        ([(set_all, "ieee"), (set_matmul, "tf32")], "tf32"),
        ([(set_all, "tf32"), (set_matmul, "ieee"), (set_matmul, "none")], "tf32"),
        ([(set_older, "high"), (set_matmul, "ieee")], "ieee"),  # the later one applies
    ],
    ids=lambda part: " ".join(f"{setter.__name__}={value}" for setter, value in part) if type(part) is list else part,
)
def test_float32_products_follow_the_users_precision(steps, expected, restored_precision, monkeypatch):
    x = floats(1)
    set_matmul("none")
    for setter, value in steps:
        setter(value)
    assert gpu_helpers.precision(x) == expected
    assert gpu_helpers.precision(x.bfloat16()) == "ieee"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert gpu_helpers.precision(x) == "ieee"


# Kernel launches


class Kernel:
    """Stands in for a Triton kernel: records launches through Triton, of the compiled kernel, and with launch hooks."""

    def __init__(self):
        self.through_triton, self.direct, self.hooked = [], [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.through_triton.append((grid, arguments, options))
            return Compiled(self)

        return run


class Compiled:
    """Stands in for what Triton compiles: run() launches it, and binary[grid] launches it and calls the hooks."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.hooked.append((grid, arguments))

    def run(self, *given):
        *grid, stream, function, metadata, launch_metadata, enter_hook, exit_hook = given[:9]
        assert (stream, function, metadata) == ("stream", "function", "metadata")
        assert launch_metadata is enter_hook is exit_hook is None
        self.kernel.direct.append((tuple(grid), given[9:]))


@pytest.fixture
def launch(monkeypatch):
    """kernels/launch.py as on a GPU, with nothing launched before."""
    pytest.importorskip("triton")
    from fastlm.kernels import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "compiled", {})
    monkeypatch.setattr(launch, "repeated", {})
    monkeypatch.setattr(launch, "current_stream", lambda: lambda device: "stream")
    return launch


def test_the_second_launch_of_a_kind_is_direct(launch):
    kernel, x = Kernel(), torch.zeros(64)

    def run(*arguments, constants=(32,), device=0, warps=4):
        launch.launch(kernel, 7, arguments, constants, warps, 2, device)

    run(x, 48, 0.5, None)
    # Another tensor, and numbers of the same kinds: new ones, and some seen before.
    for number, (size, factor) in enumerate([(64, 0.25), (64, 0.25), (48, 0.5)], start=1):
        run(torch.ones(64), size, factor, None)
        assert len(kernel.through_triton) == 1 and len(kernel.direct) == number
        grid, (tensor, *others) = kernel.direct[-1]
        assert grid == (7, 1, 1) and tensor.sum() == 64 and others == [size, factor, None, 32]
    assert kernel.through_triton[0][2] == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    other_kinds = [
        (x.half(), 48, 0.5, None),
        (x[1:], 48, 0.5, None),
        (x, 49, 0.5, None),
        (x, 1, 0.5, None),
        (x, 2**40, 0.5, None),
        (x, 48, 0.5, x),
    ]
    for arguments in other_kinds:
        run(*arguments)
    run(x, 48, 0.5, None, constants=(64,))
    run(x, 48, 0.5, None, device=1)
    run(x, 48, 0.5, None, warps=8)
    assert len(kernel.through_triton) == 1 + len(other_kinds) + 3
    launch.launch(kernel, 0, (x,), (), 4, 2, 0)  # an empty grid
    assert len(kernel.through_triton) == 1 + len(other_kinds) + 3 and len(kernel.direct) == 3


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
    assert len(kernel.through_triton) == len(kernel.direct) == 1
    assert kernel.hooked == [((7, 1, 1), (x, 48, 32))]
    launch.launch(kernel, 7, (x, 48), (32,), 4, 2, 0)
    assert len(kernel.direct) == 2


def specialisation(kernel, arguments, constants):
    """All that a compiled kernel depends on: of an integer with do_not_specialize only whether it has 32 bits."""
    from fastlm.kernels.launch import kind

    if hasattr(kernel, "params"):
        names = [parameter.name for parameter in kernel.params]
        plain = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    else:  # interpreted
        names, plain = kernel.arg_names, set(kernel.kwargs.get("do_not_specialize") or ())
    kinds = (kind(value)[2] if name in plain else kind(value) for name, value in zip(names, arguments, strict=False))
    return kernel, constants, *kinds


def run_attention(queries, keys):
    q, k = torch.zeros(2, queries, 4, 64, requires_grad=True), torch.zeros(2, keys, 2, 64, requires_grad=True)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    fastlm.attention(q, k, k, causal=True, dropout_p=0.1, backend="triton").sum().backward()


def run_packed_attention(tokens):
    x, starts = torch.zeros(tokens, 4, 64, requires_grad=True), torch.tensor([0, tokens])
    fastlm.attention_varlen(x, x, x, starts, starts, causal=True, backend="triton").sum().backward()


def run_other_operators(rows):
    x, w = torch.zeros(rows, 64, requires_grad=True), torch.zeros(64, 64, requires_grad=True)
    y, s = fastlm.layernorm_residual(x, x, w[0], w[1], dropout_p=0.1, backend="triton")
    y = fastlm.gelu_mlp(y, w, w[0], w, w[1], backend="triton")
    fastlm.linear_cross_entropy(y + s, w, torch.zeros(rows, dtype=torch.int64), w[0], backend="triton").backward()


def record_launches(monkeypatch, architecture):
    """A list to which every launch appends (kernel, arguments, constants) instead of running, as on this GPU."""
    launched = []

    def launch(kernel, programs, arguments, constants, *rest, **options):
        launched.append((kernel, arguments, constants))

    for operator in OPERATORS.values():
        if not operator.implements("triton"):
            continue
        module = implementation_module(operator.name, "triton")
        if hasattr(module, "architecture"):
            monkeypatch.setattr(module, "architecture", lambda index: architecture)
        for value in vars(module).values():
            if isinstance(value, types.ModuleType) and hasattr(value, "launch"):
                monkeypatch.setattr(value, "launch", launch)
    return launched


@on_backends("triton")
@pytest.mark.parametrize("architecture", ["sm_90", "sm_80", "gfx942"])  # gelu_mlp with fused products, and without
@pytest.mark.parametrize(
    "run, other_kinds",
    [
        pytest.param(lambda n: run_attention(n, n), [], id="attention"),
        # The combine kernel of split-K is compiled for up to 2, 4, … 128 splits.
        pytest.param(lambda n: run_attention(1, n + 256), [2, 8], id="decode"),
        pytest.param(run_packed_attention, [], id="packed"),
        pytest.param(run_other_operators, [], id="the rest of a layer"),
    ],
)
def test_no_length_needs_another_compilation(run, other_kinds, architecture, backend, monkeypatch):
    """Odd lengths, even lengths and multiples of 16 launch only kinds that the first length has launched."""
    launched = record_launches(monkeypatch, architecture)
    # Several chunks, whose number of rows is not a power of two.
    monkeypatch.setattr(implementation_module("linear_cross_entropy", "triton"), "LOGITS_BYTES", 100 * 64 * 4)
    seen = []
    for length in (320, 100, 333, 400, 512, 1031):
        launched.clear()
        run(length)
        seen.append({specialisation(*launch) for launch in launched})
    others = set.union(*seen) - seen[0]
    described = "\n".join(f"{kind[0]}: {kind[1:]}" for kind in others)
    assert seen[0] and sorted(constants[-1] for _, constants, *_ in others) == other_kinds, described


@pytest.mark.parametrize("hip, kinds", [(False, 1), (True, 2)])
def test_on_amd_storage_beyond_2_gib_is_another_kind(hip, kinds, launch, monkeypatch):
    """There Triton compiles 32-bit offsets where the storage, not the view of it, allows them."""
    monkeypatch.setattr(launch, "HIP", hip)
    kernel = Kernel()
    for length in (16, 2**31 - 1, 2**31, 2**33):
        x = torch.empty(length, dtype=torch.int8, device="meta")
        for view in (x, x[:16]):
            launch.launch(kernel, 7, (view, 16), (32,), 4, 2, 0)
    assert len(kernel.through_triton) == kinds and len(kernel.direct) == 8 - kinds
    storages = [arguments[0].untyped_storage().nbytes() for _, arguments, _ in kernel.through_triton]
    assert storages == [16, 2**31][:kinds]


def test_the_number_of_remembered_launches_is_bounded(launch, monkeypatch):
    monkeypatch.setattr(launch, "MOST", 3)
    for constant in range(20):
        kernel = Kernel()
        for size in (32, 32, 64, 96, 128):
            launch.launch(kernel, 1, (size,), (constant,), 4, 2, 0)
        assert len(kernel.through_triton) == 1 and len(kernel.direct) == 4
    assert len(launch.compiled) <= 3 and len(launch.repeated) <= 3
