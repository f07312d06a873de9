"""Who may use the Triton kernels, and what is said where they cannot serve; their launches, without a GPU."""

import subprocess
import sys
import types

import pytest
import torch

import fastlm
from fastlm.backends import choice, table
from fastlm.backends import triton as backend
from tests.support import floats, on_backends

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU as far as the questions go that are asked before a launch."""
    card = types.SimpleNamespace(name="Card", capability=(9, 0), shared=227 << 10)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "missing", lambda: "")
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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no table of the user's own
    for cached in (backend.unfit, backend.architecture):
        cached.cache_clear()
    table.forget()
    choice.CHOICES.clear()
    yield card
    for cached in (backend.unfit, backend.architecture):
        cached.cache_clear()
    table.forget()
    choice.CHOICES.clear()


def decided(dtype=torch.bfloat16, forced=None, width=768):
    return choice.decide("layernorm_residual", CUDA, dtype, forced, {"rows": 40, "width": width, "dropout": False})


def test_a_gpu_is_served_by_triton_first(gpu):
    assert decided() == ("triton", None)
    assert decided(torch.float64) == ("torch", "layernorm_residual: torch instead of triton")
    for operator, features in choice.FEATURES.items():
        if operator == "adamw":  # PyTorch's own is fused on a GPU
            continue
        assert choice.decide(operator, CUDA, torch.float16, None, dict.fromkeys(features, 1))[0] == "triton"


def rows_of(monkeypatch, card, *rules):
    monkeypatch.setitem(table.GPUS, card, rules)
    table.forget()


def served(monkeypatch, *names):
    """As if these backends could serve whatever they do not refuse by its features; the others cannot."""
    monkeypatch.setattr(choice, "unavailable", lambda name: [] if name in names else ["is not compiled here"])
    monkeypatch.setattr(choice.load("cuda"), "refuses", lambda *call, **features: [])


def test_a_card_s_table_puts_pytorch_first_where_it_is_faster(gpu, monkeypatch):
    rule = table.Rule("layernorm_residual", "bfloat16", {"width": (None, 512)})
    rows_of(monkeypatch, "Card", rule)
    assert (
        decided(width=512) == ("torch", None)
        and decided(width=513)[0] == "triton"
        and decided(torch.float16, width=512)[0] == "triton"
    )
    table.GPUS.pop("Card")
    rows_of(monkeypatch, "Another", rule)
    assert decided(width=512)[0] == "triton"


@pytest.mark.parametrize(
    "can_serve, width, taken",
    [
        (("triton", "cuda", "torch"), 512, ("cuda", None)),
        (("triton", "cuda", "torch"), 513, ("triton", None)),
        (("triton", "cuda", "torch"), 2000, ("torch", None)),
        (
            ("triton", "torch"),
            512,
            ("triton", "layernorm_residual: triton instead of cuda"),
        ),  # the rest in its usual order, and counted
        (("torch",), 512, ("torch", "layernorm_residual: torch instead of cuda")),
        (("cuda",), 2000, ("cuda", "layernorm_residual: cuda instead of triton")),  # PyTorch cannot: as without the row
    ],
)
def test_a_card_s_table_puts_either_backend_first(gpu, can_serve, width, taken, monkeypatch):
    cuda = table.Rule("layernorm_residual", "bfloat16", {"width": (None, 512)}, "cuda")
    rows_of(monkeypatch, "Card", cuda, table.Rule("layernorm_residual", "bfloat16", {"width": (2000, None)}))
    served(monkeypatch, *can_serve)
    assert decided(width=width) == taken


def test_what_pytorch_cannot_do_goes_on_to_the_next_row(gpu, monkeypatch):
    """Its dropout is another one. The row that puts it first does not hold then, which is no fallback."""
    served(monkeypatch, "triton", "cuda", "torch")
    rows = [
        table.Rule("layernorm_residual", "bfloat16"),
        table.Rule("layernorm_residual", "bfloat16", {"rows": (None, 40)}, "cuda"),
    ]
    rows_of(monkeypatch, "Card", *rows)
    for rows, dropout, taken in ((40, False, "torch"), (40, True, "cuda"), (41, True, "triton")):
        assert choice.decide(
            "layernorm_residual", CUDA, torch.bfloat16, None, {"rows": rows, "width": 8, "dropout": dropout}
        ) == (taken, None)


def test_the_users_own_table_of_a_card(gpu, monkeypatch):
    rows_of(monkeypatch, "Card", table.Rule("layernorm_residual", "bfloat16"))
    file = table.user_table()
    file.parent.mkdir()
    for content, taken in (
        (
            '{"Card": [{"operator": "layernorm_residual", "dtype": "bfloat16", "where": {"rows": [null, 40]}, "first": "cuda"}]}',
            "cuda",
        ),
        ('{"Card": []}', "triton"),
        ('{"another": []}', "torch"),
    ):
        served(monkeypatch, "triton", "cuda", "torch")
        file.write_text(content)
        table.forget()
        assert decided() == (taken, None)


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
            r"rows: expected two whole numbers or null, got \['few', 2\]",
        ),
        ('{"operator": "linear", "dtype": "bfloat16", "where": {"rows": [1]}}', "unpack"),
        ('{"operator": "linear"}', "dtype"),
        ('{"operator": [], "dtype": {}}', "operator: expected one of"),
        ("7", "subscriptable"),
    ],
)
def test_a_damaged_table_of_a_card_is_named_and_stops_nothing(gpu, row, reason, monkeypatch):
    rows_of(monkeypatch, "Card", table.Rule("layernorm_residual", "bfloat16"))
    table.user_table().parent.mkdir()
    table.user_table().write_text(f'{{"Card": [{row}]}}')
    with pytest.warns(
        RuntimeWarning,
        match=rf"table.json: cannot be read \(.*{reason}.*\); the measurements that come with fastlm hold",
    ):
        assert decided() == ("torch", None)
    assert decided() == ("torch", None)  # and once is enough


def test_each_kind_of_gpu_is_reported(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["Card", "Other", "Card"][index])
    rows = [
        table.Rule("attention", "bfloat16", {"query_len": (None, 32)}, "cuda"),
        table.Rule("layernorm_residual", "float16", {"rows": (None, 181)}),
    ]
    rows_of(monkeypatch, "Card", *rows, table.Rule("gelu_mlp", "bfloat16", {"conv1d": (0, 0)}, "cuda"))
    unmeasured = "Other: not measured yet, Triton comes first (fastlm info --measure measures it)"
    assert fastlm.info().gpus == [
        "Card: the CUDA C++ kernels serve attention in bfloat16 (query_len ≤ 32); gelu_mlp in bfloat16 (not conv1d), "
        "PyTorch serves layernorm_residual in float16 (rows ≤ 181), Triton comes first elsewhere",
        unmeasured,
    ]
    rows_of(monkeypatch, "Card")
    assert fastlm.info().gpus == ["Card: Triton comes first everywhere, as measured", unmeasured]
    assert f"GPU: {unmeasured}\n" in str(fastlm.info())


def test_where_pytorch_cannot_ask_for_gpus_none_are_reported(gpu, monkeypatch):
    def refused(index):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", refused)
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
def test_a_gpu_that_cannot_is_named_and_the_next_backend_serves(gpu, changed, reason):
    """One line: which backend and card, why, and what to do."""
    vars(gpu).update(changed)
    assert decided() == ("torch", "layernorm_residual: torch instead of triton")
    with pytest.raises(fastlm.Unsupported) as raised:
        decided(forced="triton")
    cpu, cuda = (
        ", ".join(choice.refusals(name, "layernorm_residual", CUDA, torch.bfloat16, {"rows": 40, "width": 768}))
        for name in ("cpu", "cuda")
    )
    others = "torch could, but another was forced; reference could, but another was forced"
    assert (
        str(raised.value)
        == f"layernorm_residual on cuda:0 in torch.bfloat16 with backend='triton': cpu {cpu}; triton {reason}; cuda {cuda}; {others}"
    )


def test_tensors_elsewhere(gpu):
    for device in ("cpu", "mps:0"):
        reasons = backend.refuses("linear", torch.device(device), torch.float32)
        assert reasons == [f"serves CUDA and ROCm tensors, not {device} (.to('cuda') moves them)"]


def test_each_gpu_is_asked_for_itself(gpu, monkeypatch):
    """An old card beside a new one, whichever is called first."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    for _ in range(2):
        for index, name in enumerate(("triton", "torch")):
            x = types.SimpleNamespace(is_cpu=False, device=torch.device("cuda", index))
            assert choice.choose("layernorm_residual", x, torch.bfloat16, None, 40, 768, False) is choice.load(name)
    assert len(choice.CHOICES) == 2


def test_a_row_too_wide_for_registers(gpu):
    assert decided(width=16384)[0] == "triton" and decided(width=16385)[0] == "torch"
    with pytest.raises(fastlm.Unsupported, match="triton holds a row in registers: width up to 16384, not 16385"):
        decided(forced="triton", width=16385)


@pytest.mark.parametrize("operator", ["attention", "attention_varlen"])
def test_a_head_too_wide_for_a_tile(gpu, operator):
    sizes = dict.fromkeys(choice.FEATURES[operator], 0)
    assert choice.decide(operator, CUDA, torch.bfloat16, None, sizes | {"head_dim": 256}) == ("triton", None)
    assert choice.decide(operator, CUDA, torch.bfloat16, None, sizes | {"head_dim": 257}) == (
        "torch",
        f"{operator}: torch instead of triton",
    )
    with pytest.raises(fastlm.Unsupported, match="triton holds heads of head_dim up to 256, not 257;"):
        choice.decide(operator, CUDA, torch.bfloat16, "triton", sizes | {"head_dim": 257})


def test_no_triton_and_an_old_one(gpu, monkeypatch):
    for said, version in (
        ("needs Triton, which cannot be imported", None),
        ("needs Triton 3.6 or later, not 3.5.1", "3.5.1"),
    ):
        monkeypatch.setitem(sys.modules, "triton", version and types.SimpleNamespace(__version__=version))
        reason = MISSING.__wrapped__()
        assert reason.startswith(said) and "\n" not in reason
        monkeypatch.setattr(backend, "missing", lambda reason=reason: reason)
        assert decided()[0] == "torch"
        assert choice.unavailable("triton") == [reason] == fastlm.info().backends["triton"]


MISSING = backend.missing  # as it is, not what a test puts in its place


def test_without_a_gpu_and_without_the_interpreter():
    code = "import torch, fastlm; torch.cuda.is_available = lambda: False; fastlm.linear(torch.ones(2, 2), torch.ones(2, 2), backend='triton')"
    environment = {"PYTHONPATH": ":".join(sys.path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert (
        "triton finds no GPU (torch.cuda.is_available() is false)" in done.stderr
        or "triton needs Triton" in done.stderr
    )


def test_a_call_falls_back_and_is_counted(gpu, monkeypatch):
    gpu.capability = (7, 0)
    what = "layernorm_residual: torch instead of triton"
    before = fastlm.info().fallbacks.get(what, 0)
    x = types.SimpleNamespace(is_cpu=False, device=CUDA)
    for _ in range(2):
        assert choice.choose("layernorm_residual", x, torch.float32, None, 40, 768, False) is choice.load("torch")
    assert fastlm.info().fallbacks[what] == before + 2


@on_backends("triton")
def test_the_interpreter_serves_a_cpu_only_when_it_is_asked_to(backend):
    x = floats(4, 8)
    assert choice.decide("linear", x.device, x.dtype, None, {"rows": 4, "in_width": 8, "out_width": 8})[0] != "triton"
    assert (
        choice.decide("linear", x.device, x.dtype, "triton", {"rows": 4, "in_width": 8, "out_width": 8})[0] == "triton"
    )
    reason = r"triton serves CPU tensors under TRITON_INTERPRET=1, not cuda:0 \(without that variable it serves GPUs\);"
    with pytest.raises(fastlm.Unsupported, match=reason):
        choice.decide("linear", CUDA, x.dtype, "triton", {"rows": 4, "in_width": 8, "out_width": 8})


def everything(value):
    torch.backends.fp32_precision = value


def of_cuda(value):
    torch.backends.cudnn.fp32_precision = value  # PyTorch's name for all of CUDA


def of_products(value):
    torch.backends.cuda.matmul.fp32_precision = value


def allow_tf32(value):
    torch.backends.cuda.matmul.allow_tf32 = value


@pytest.fixture
def precisions():
    """What a user may set, each by PyTorch's older or newer API; as it was afterwards."""
    settings = torch.backends, torch.backends.cudnn, torch.backends.cuda.matmul
    before, older = [each.fp32_precision for each in settings], torch.get_float32_matmul_precision()
    yield
    for each in settings:
        each.fp32_precision = "ieee"
    torch.set_float32_matmul_precision(older)  # of which PyTorch keeps a record of its own
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
        ([(of_products, "tf32")], "tf32"),
        ([(of_products, "ieee")], "ieee"),
        ([(of_products, "none")], "ieee"),
        ([(of_cuda, "tf32")], "tf32"),
        ([(everything, "tf32")], "tf32"),  # inherited
        ([(everything, "ieee")], "ieee"),
        ([(everything, "tf32"), (of_products, "ieee")], "ieee"),  # the nearer setting holds
        ([(everything, "tf32"), (of_cuda, "ieee")], "ieee"),
        ([(everything, "ieee"), (of_products, "tf32")], "tf32"),
        ([(everything, "tf32"), (of_products, "ieee"), (of_products, "none")], "tf32"),
        ([(torch.set_float32_matmul_precision, "high"), (of_products, "ieee")], "ieee"),  # the later one
    ],
    ids=lambda part: (
        " ".join(f"{set_by.__name__}={value}" for set_by, value in part) if isinstance(part, list) else part
    ),
)
def test_products_of_float32_follow_the_users_precision(steps, wanted, precisions, monkeypatch):
    x = floats(1)
    of_products("none")
    for set_by, value in steps:
        set_by(value)
    assert backend.precision(x) == wanted and backend.precision(x.bfloat16()) == "ieee"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert backend.precision(x) == "ieee"


# Launches


class Kernel:
    """Counts how often Triton's own way of launching is taken, and hands out what it compiles."""

    def __init__(self):
        self.slow, self.fast, self.told = [], [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.slow.append((grid, arguments, options))
            return Compiled(self)

        return run


class Compiled:
    """As Triton's: started by run(), or, where someone is to be told, by what binary[grid] gives."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.told.append((grid, arguments))

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
    """kernels/launch.py as on a GPU, with nothing launched before."""
    pytest.importorskip("triton")
    from fastlm.kernels import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "compiled", {})
    monkeypatch.setattr(launch, "repeated", {})
    monkeypatch.setattr(launch, "current_stream", lambda: lambda device: "stream")
    return launch


def test_the_second_launch_of_a_kind_goes_past_triton(launch):
    kernel, x = Kernel(), torch.zeros(64)
    go = lambda *arguments, constants=(32,), device=0, warps=4: launch.launch(
        kernel, 7, arguments, constants, warps, 2, device
    )  # noqa: E731
    go(x, 48, 0.5, None)
    for number, (size, factor) in enumerate(
        [(64, 0.25), (64, 0.25), (48, 0.5)], start=1
    ):  # another tensor, and numbers of the same kinds, new and seen before
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
def test_who_asked_triton_for_launches_is_told_of_them(hook, launch):
    import triton

    kernel, x, chain = Kernel(), torch.zeros(64), getattr(triton.knobs.runtime, hook)
    for _ in range(2):
        launch.launch(kernel, 7, (x, 48), (32,), 4, 2, 0)
    chain.add(print)
    try:
        launch.launch(kernel, 7, (x, 48), (32,), 4, 2, 0)
    finally:
        chain.remove(print)
    assert len(kernel.slow) == len(kernel.fast) == 1 and kernel.told == [((7, 1, 1), (x, 48, 32))]
    launch.launch(kernel, 7, (x, 48), (32,), 4, 2, 0)
    assert len(kernel.fast) == 2


def compiled_for(kernel, arguments, constants):
    """All that Triton compiles a kernel anew for: of an integer that it was told not to specialise, only whether it has 32 bits."""
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
    fastlm.linear_cross_entropy(y + s, w, torch.zeros(rows, dtype=torch.int64), w[0], backend="triton").backward()


@on_backends("triton")
@pytest.mark.parametrize("card", ["sm_90", "sm_80", "gfx942"])  # with the fused products of gelu_mlp, and without
@pytest.mark.parametrize(
    "run, joins",
    [
        pytest.param(lambda n: attention_of(n, n), [], id="attention"),
        pytest.param(
            lambda n: attention_of(1, n + 256), [2, 8], id="decode"
        ),  # what joins the stretches is compiled for up to 2, 4, … 128 of them
        pytest.param(packed_of, [], id="packed"),
        pytest.param(block_of, [], id="the rest of a layer"),
    ],
)
def test_no_length_is_compiled_anew(run, joins, card, backend, monkeypatch):
    """Every launch of a step, at lengths that are odd, even and multiples of 16, is of a kind that the first length has seen."""
    launched, module = [], choice.load(backend)
    monkeypatch.setattr(module, "architecture", lambda index: card)
    monkeypatch.setattr(module, "LOGITS_BYTES", 100 * 64 * 4)  # several chunks, of rows not so round
    for kernels in module.modules():
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
    assert seen[0] and sorted(constants[-1] for _, constants, *_ in others) == joins, "\n".join(
        f"{kind[0]}: {kind[1:]}" for kind in others
    )


@pytest.mark.parametrize("hip, kinds", [(False, 1), (True, 2)])
def test_on_amd_what_lies_beyond_2_gib_is_another_kind(hip, kinds, launch, monkeypatch):
    """There Triton compiles offsets of 32 bits where the storage, not the view of it, allows them."""
    monkeypatch.setattr(launch, "HIP", hip)
    kernel = Kernel()
    for length in (16, 2**31 - 1, 2**31, 2**33):
        x = torch.empty(length, dtype=torch.int8, device="meta")
        for view in (x, x[:16]):
            launch.launch(kernel, 7, (view, 16), (32,), 4, 2, 0)
    assert len(kernel.slow) == kinds and len(kernel.fast) == 8 - kinds
    assert [arguments[0].untyped_storage().nbytes() for _, arguments, _ in kernel.slow] == [16, 2**31][:kinds]


def test_what_is_compiled_is_bounded(launch, monkeypatch):
    monkeypatch.setattr(launch, "MAX_ENTRIES", 3)
    for constant in range(20):
        kernel = Kernel()
        for size in (32, 32, 64, 96, 128):
            launch.launch(kernel, 1, (size,), (constant,), 4, 2, 0)
        assert len(kernel.slow) == 1 and len(kernel.fast) == 4
    assert len(launch.compiled) <= 3 and len(launch.repeated) <= 3
