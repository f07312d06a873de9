"""The emulator of the CUDA kernels: correct kernels pass with CUDA's results, and every kind of error is reported."""

import ctypes
import re
import shutil
from pathlib import Path

import pytest
import torch

from fastlm.core import philox
from tests.cuda_emulation.build import HERE, build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def module():
    library = ctypes.CDLL(str(build("planted", [HERE / "planted/planted.cu"], [])))
    library.planted.restype = library.planted_dropout.restype = ctypes.c_char_p
    return library


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def allow(module, tensor, writable):
    module.fastlm_emulation_allow(pointer(tensor), ctypes.c_size_t(tensor.numel() * tensor.element_size()), writable)


@pytest.fixture
def run(module):
    """run(kernel, in, size of out, bad=…, …): (out, the report, which is "" without an error)."""

    def run(kernel, given, out_size, bad=0, threads=128, shared=None):
        out = torch.full((out_size,), float("nan"))
        allow(module, given, False)
        allow(module, out, True)
        shared = threads * 4 if shared is None else shared
        report = module.planted(
            kernel.encode(),
            pointer(given),
            pointer(out),
            given.numel() if kernel != "indices" else out_size,
            bad,
            threads,
            shared,
        )
        module.fastlm_emulation_forget()
        return out, (report or b"").decode()

    return run


def reported(report, *patterns):
    for pattern in patterns:
        assert re.search(pattern, report), f"{pattern!r} is not in the report {report!r}"
    return True


X = torch.arange(128.0)


# Correct kernels


def test_neighbours(run):
    out, report = run("neighbour", X, 128)
    assert report == "" and torch.equal(out, 2 * X.roll(-32))


def test_neighbours_in_a_warp(run):
    out, report = run("neighbour_in_warp", X, 128)
    assert report == "" and torch.equal(out, X.view(64, 2).flip(1).flatten())


def test_halves_of_a_word_are_separate(run):
    out, report = run("halves", X, 128, shared=256)
    assert report == "" and torch.equal(out, X.roll(-1))


def test_named_barriers(run):
    out, report = run("named", X, 128)
    assert report == "" and torch.equal(out, X.view(2, 2, 32).flip(1).flatten())


@pytest.mark.parametrize("kernel", ["bounds", "divergent", "unwritten", "copies", "asserted", "matrix_order"])
def test_without_the_error(run, kernel):
    given = torch.randn(4 * 128)
    out, report = run(kernel, given, 4 * 128, shared={"copies": 4096, "matrix_order": 2048}.get(kernel))
    assert report == "" and out[:128].isfinite().all()
    expected = {
        "copies": given.view(128, 4)[:, 1] + given.view(128, 4)[torch.arange(128) ^ 33, 0],
        "bounds": given[:128],
        "unwritten": given[:128].flip(0),
        "asserted": given[:128],
    }
    if kernel in expected:
        torch.testing.assert_close(out[:128], expected[kernel])


def test_collectives(run):
    x = torch.randn(128)
    out, report = run("collectives", x, 8 * 128)
    assert report == ""
    out, warps = out.view(8, 4, 32), x.view(4, 32)
    lane = torch.arange(32)
    assert torch.equal(out[0], warps[:, 5:6].expand(4, 32))
    assert torch.equal(out[1], warps[:, lane ^ 9])
    assert torch.equal(out[2], warps[:, torch.where(lane + 7 < 32, lane + 7, lane)])
    votes = (warps > 1.5).any(1, keepdim=True) + 2 * (warps > -1.5).all(1, keepdim=True) + 4 * (warps > 0)
    assert torch.equal(out[3], votes.float())
    torch.testing.assert_close(out[4], warps.sum(1, keepdim=True).expand(4, 32))
    torch.testing.assert_close(out[5], x.sum().expand(4, 32))
    assert torch.equal(out[6], x.max().expand(4, 32))
    torch.testing.assert_close(out[7], torch.full((4, 32), 1e-9))
    assert (out[4] == out[4][:, :1]).all() and (out[5] == out[5][0, 0]).all()  # one order of summation


def test_indices(run):
    out, report = run("indices", X, 3 * 2 * 2 * 64 - 5)
    z, y, x, ty, tx = (
        axis.flatten() for axis in torch.meshgrid(*(torch.arange(n) for n in (2, 2, 3, 4, 16)), indexing="ij")
    )
    assert report == "" and torch.equal(out, (tx + 100 * ty + 1000 * x + 10000 * y + 100000 * z)[:-5].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["product", "product_transposed"])
def test_products(run, layout, dtype):
    given = torch.randn(256 + 128).to(dtype)
    a = given[:256].view(16, 16).double()
    b = given[256:].view(16, 8).double() if layout == "product_transposed" else given[256:].view(8, 16).T.double()
    out, report = run(
        f"{layout}<{'bf16' if dtype == torch.bfloat16 else 'fp16'}>", given.float(), 128, threads=32, shared=1024
    )
    assert report == ""
    # 16 products, exact in float32, added one by one to 1…4, which are subtracted again
    torch.testing.assert_close(
        out.view(16, 8).double(), a @ b, rtol=0, atol=18 * 2**-24 * float((a.abs() @ b.abs()).max() + 4)
    )


def test_products_in_tf32(run):
    given = torch.randn(128 + 64)
    out, report = run("product_tf32", given, 128, threads=32)
    rounded = ((given.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    a, b = rounded[:128].view(16, 8).double(), rounded[128:].view(8, 8).T.double()
    assert report == ""
    torch.testing.assert_close(
        out.view(16, 8).double(), a @ b, rtol=0, atol=10 * 2**-24 * float((a.abs() @ b.abs()).max())
    )


def test_dropout_is_that_of_every_backend(module):
    rows, columns, p = 5, 200, 0.3
    seed = torch.tensor(-0x123456789ABCDEF)
    out = torch.empty(rows, columns)
    allow(module, out, True)
    allow(module, seed, False)
    report = module.planted_dropout(pointer(out), rows, columns, ctypes.c_double(p), pointer(seed))
    module.fastlm_emulation_forget()
    assert report is None
    expected = philox.dropout_mask(seed, rows, columns, torch.tensor(7), p)
    assert torch.equal(out, torch.where(expected, torch.tensor(1 / (1 - p)), torch.tensor(0.0)))


# 16-bit numbers


def test_rounding_is_that_of_the_hardware(module):
    every = torch.arange(1 << 16, dtype=torch.int32) << 16
    # The lower bits put x on, beside and half-way between numbers of bfloat16 (upper 16 bits), float16 and tf32.
    low = torch.tensor(
        [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF],
        dtype=torch.int32,
    )
    subnormal = torch.rand(1 << 14) * 2**-13 * torch.randn(1 << 14).sign()  # where float16 has fewer bits
    halfway = (torch.arange(1 << 11) + 0.5) * 2**-24
    x = torch.cat([(every[:, None] | low).flatten().view(torch.float32), subnormal, halfway, -halfway])
    bf16, fp16, tf32 = (torch.empty(x.shape, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.int32))
    module.planted_round(pointer(x), ctypes.c_int64(x.numel()), pointer(bf16), pointer(fp16), pointer(tf32))
    number = ~x.isnan()
    assert torch.equal(bf16[number].view(torch.int16), x[number].bfloat16().view(torch.int16))
    assert torch.equal(fp16[number].view(torch.int16), x[number].half().view(torch.int16))
    assert (bf16[~number].view(torch.int16) == 0x7FFF).all() and (fp16[~number].view(torch.int16) == 0x7FFF).all()
    finite = x.isfinite()
    up = (x[finite].abs().view(torch.int32) + 0x1000) & ~0x1FFF  # the magnitude, ties away from zero
    assert torch.equal(tf32[finite] & 0x7FFFE000, up) and torch.equal(tf32[finite] < 0, x[finite].signbit())
    infinite = x.isinf()
    assert torch.equal(tf32[infinite].view(torch.float32), x[infinite])


def test_widening_is_exact(module):
    bf16, fp16 = torch.empty(1 << 16), torch.empty(1 << 16)
    module.planted_widen(pointer(bf16), pointer(fp16))
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for widened, expected in ((bf16, every.view(torch.bfloat16).float()), (fp16, every.view(torch.float16).float())):
        number = ~expected.isnan()
        assert torch.equal(widened[number].view(torch.int32), expected[number].view(torch.int32))
        assert widened[~number].isnan().all()


# Errors are reported with kernel, block, thread and line


def line_of(kernel, text):
    """The line of the first `text` in a planted kernel."""
    lines = Path(HERE / "planted/planted.cu").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if re.search(rf"__global__ void {kernel}\(", line))
    return next(i + 1 for i, line in enumerate(lines) if i > start and text in line)


@pytest.mark.parametrize(
    "bad, what",
    [
        (1, r"(reads|writes) byte \d+, which thread \(\d+, 0, 0\) (wrote|read)"),
        (2, r"writes byte \d+, which thread \(\d+, 0, 0\) read"),
    ],
)
def test_races(run, bad, what):
    assert reported(
        run("neighbour", X, 128, bad)[1],
        r"^neighbour, block \(0, 0, 0\), thread \(\d+, 0, 0\): race in shared memory",
        what,
    )


@pytest.mark.skipif(shutil.which("addr2line") is None, reason="needs addr2line")
def test_a_report_names_the_line(run):
    assert reported(run("bounds", X, 128, 3)[1], rf"planted\.cu:{line_of('bounds', 'a.bad == 3')}\b")


def test_a_race_within_a_warp(run):
    assert reported(run("neighbour_in_warp", X, 128, 1)[1], "race in shared memory")


def test_a_race_for_one_half_of_a_word(run):
    assert reported(
        run("halves", X, 128, 1, shared=256)[1],
        r"race in shared memory: it writes byte \d+, which thread \(0, 0, 0\) wrote",
    )


def test_a_barrier_of_other_threads_does_not_synchronise(run):
    assert reported(
        run("named", X, 128, 1)[1], r"reads byte \d+ of shared memory, which nothing has written|race in shared memory"
    )


@pytest.mark.parametrize(
    "bad, what",
    [
        (1, r"thread \(127, 0, 0\): writes 4 bytes at 512 of the 512 bytes of shared memory"),
        (2, r"thread \(0, 0, 0\): reads 4 bytes at -4 of the 512 bytes of shared memory"),
        (3, r"thread \(127, 0, 0\): reads 4 bytes at 0x\w+, 4 bytes past the end of an argument of 512 bytes"),
        (4, r"thread \(0, 0, 0\): reads 4 bytes at 0x\w+, 4 bytes before the beginning of an argument of 512 bytes"),
        (5, r"thread \(127, 0, 0\): writes 4 bytes at 0x\w+, 4 bytes past the end of a result of 512 bytes"),
        (6, r"thread \(7, 0, 0\): writes 4 bytes at 0x\w+, in an argument, which it may only read"),
        (7, r"thread \(7, 0, 0\): writes 4 bytes at 0x10, which lies in no argument of the launch"),
        (8, r"thread \(7, 0, 0\): misaligned access of 16 bytes"),
    ],
)
def test_bounds(run, bad, what):
    assert reported(run("bounds", X, 128, bad)[1], "^bounds, block", what)


@pytest.mark.parametrize(
    "bad, what",
    [
        (0, "^$"),
        (1, r"race in global memory: it (reads|writes) byte 0 of a result.*, which block"),
        (2, r"race in global memory: it (reads|writes) byte 12 of a result.*, which (block \(|several blocks)"),
        (3, r"race in global memory: it (reads|writes) byte \d+ of a result, which thread"),
        (4, r"race in global memory: it (reads|writes) byte \d+ of a result, which thread"),
        (5, r"race in global memory: it (reads|writes) byte 396 of a result.*, which block \("),
    ],
)
def test_races_in_global_memory(run, bad, what):
    out, report = run("blocks", X, 128, bad)
    assert reported(report, what) and (bad or torch.equal(out, X[:32].repeat(4)))


def test_reads_of_unwritten_memory(run):
    assert reported(
        run("unwritten", X, 128, 1)[1],
        r"thread \(122, 0, 0\): reads byte 20 of shared memory, which nothing has written",
    )


@pytest.mark.parametrize(
    "bad, what",
    [
        (1, "divergent barrier: .*(has|have) ended"),
        (2, "divergent barrier: it waits at __syncthreads of line .* with 96 threads of 128"),
        (3, "divergent barrier: it waits at __syncthreads of line .*, other warps at that of line"),
        (4, "divergent barrier: .* other threads of its warp"),
        (5, r"barrier 3 is for (64|96) threads here and for (96|64) elsewhere"),
    ],
)
def test_divergent_barriers(run, bad, what):
    assert reported(run("divergent", X, 128, bad)[1], "^divergent, block", what)


@pytest.mark.parametrize(
    "bad, what",
    [
        (1, r"reads byte 4 of shared memory, which cp\.async of thread \(0, 0, 0\) is still copying to"),
        (2, r"which nothing has written|race in shared memory|still copying to"),
        (3, r"reads byte 2048 of shared memory, which cp\.async of thread \(0, 0, 0\) is still copying to"),
        (4, r"which cp\.async of thread \(\d+, 0, 0\) is still copying to"),
        (5, r"race in shared memory: it writes byte \d+, which .* read|still copying to"),
        (6, r"misaligned access of 16 bytes"),
    ],
)
def test_copies_without_their_wait_and_out_of_bounds(run, bad, what):
    assert reported(run("copies", torch.randn(512), 512, bad, shared=4096)[1], what)


@pytest.mark.parametrize(
    "bad, what", [(1, "reads byte .* nothing has written|race"), (2, "race in shared memory: it writes")]
)
def test_order_around_ldmatrix(run, bad, what):
    assert reported(run("matrix_order", torch.randn(512), 512, bad, shared=2048)[1], what)


def test_assertions(run):
    assert reported(
        run("asserted", X, 128, 1)[1],
        r"thread \(40, 0, 0\): assertion failed: a\.bad == 0 \|\| threadIdx\.x != 40, planted\.cu:\d+",
    )


def test_a_wrong_fragment_gives_wrong_numbers(run):
    given = torch.randn(384).bfloat16().float()
    out, report = run("product<bf16>", given, 128, 1, threads=32, shared=1024)
    right = given[:256].view(16, 16) @ given[256:].view(8, 16).T
    assert report == "" and (out.view(16, 8) - right).abs().max() > 0.1


@pytest.mark.parametrize(
    "threads, shared, what",
    [
        (0, 0, "invalid configuration"),
        (1056, 0, "invalid configuration"),
        (48, 0, "whole warps"),
        (32, 102400, "bytes of shared memory"),
    ],
)
def test_invalid_launches(run, threads, shared, what):
    assert reported(run("asserted", X, 128, threads=threads, shared=shared)[1], f"^asserted: .*{what}")


def test_the_next_launch_after_a_report_is_correct(run):
    assert run("neighbour", X, 128, 1)[1]
    out, report = run("neighbour", X, 128)
    assert report == "" and torch.equal(out, 2 * X.roll(-32))
