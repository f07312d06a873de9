"""What the compiled code of a Triton kernel for NVIDIA GPUs shows: races, repeated products, spills."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PRODUCT = re.compile(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b")
SHAPE = r"(?:tensor|!ttg\.memdesc)<(\d+)x(\d+)x(?:bf16|f16)\b"


def unfenced_products(ptx):
    """The number of matrix products by the asynchronous proxy that may read copies which it does not see yet.

    wgmma and tcgen05.mma read shared memory through that proxy. Between the wait for an asynchronous copy, which is
    written through the other, and such a product there has to be a fence.
    """
    found, pending = 0, False
    for line in ptx.splitlines():
        if "cp.async.wait" in line and "bulk" not in line:
            pending = True
        elif "fence.proxy.async" in line:
            pending = False
        elif pending and re.search(r"\b(wgmma\.mma_async|tcgen05\.mma)\.", line):
            found, pending = found + 1, False
    return found


def repeated_products(binary, warps):
    """Multiplications that all warps issue ÷ those of the products, in 16 bits; 1 without products.

    tcgen05.mma is issued once for all warps.
    """
    ttgir, ptx = binary.asm["ttgir"], binary.asm["ptx"]
    if "tcgen05.mma." in ptx:
        return 1.0
    needed = 0
    for line in ttgir.splitlines():
        if re.search(r"= (?:tt\.dot|ttng\.warp_group_dot) ", line):
            shapes = re.search(rf": {SHAPE}.*? \* {SHAPE}", line)
            if shapes:
                m, k, _, n = map(int, shapes.groups())
                needed += m * n * k
    issued = sum(
        int(m) * int(n) * int(k) * (warps if kind == "mma.sync" else warps // 4)
        for kind, m, n, k in re.findall(r"\b(mma\.sync|wgmma\.mma_async)\.\S*?m(\d+)n(\d+)k(\d+)\S*?\.b?f16", ptx)
    )
    return issued / needed if needed else 1.0


def tool(name, binary, *options):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        command = [str(TOOLS / name), *options, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(binary):
    """(bytes on the stack, registers)."""
    text = tool("cuobjdump", binary, "--dump-resource-usage")
    return int(re.search(r"STACK:(\d+)", text).group(1)), int(re.search(r"REG:(\d+)", text).group(1))


def spills_in_product_loops(binary):
    """The loads and stores of spilled registers inside of the innermost loops with matrix products."""
    code = []
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", tool("cuobjdump", binary, "-sass")):
        code.append((int(address, 16), text))
    loops = []
    for address, text in code:
        branch = re.search(r"\bBRA\b.*?(?:`\(|0x)([0-9a-f]+)", text)
        if branch and int(branch.group(1), 16) < address:
            inside = [t for at, t in code if int(branch.group(1), 16) <= at <= address]
            if any(PRODUCT.search(t) for t in inside):
                loops.append((int(branch.group(1), 16), address, inside))
    innermost = [
        inside
        for begin, end, inside in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e, _ in loops)
    ]
    return sum(bool(re.search(r"\b(?:LDL|STL)\b", text)) for inside in innermost for text in inside)
