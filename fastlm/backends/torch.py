"""The backend `torch`: PyTorch's own fast operators.

They are selected where nothing is compiled, and where the table says that they are faster. What PyTorch does not do
exactly as fastlm promises is refused, with the reason.
"""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)
OTHER_DROPOUT = "draws other dropout masks than fastlm"


class Torch:
    name = "torch"
    description = "PyTorch's own operators, on every device"

    def unavailable(self) -> list[str]:
        return []

    def refuses(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        return [] if dtype in DTYPES else [f"computes in {', '.join(map(str, DTYPES))}, not {dtype}"]


backend = Torch()
