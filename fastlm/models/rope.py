"""Tables of rotary positions, by the settings of a config.json."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastlm.core.errors import check_tensor, did_you_mean, mismatch, shown

Frequencies = tuple[Tensor, float]  # of each pair of channels, in radians per position; and a factor of the tables


class Settings:
    """The rotary settings of a configuration, from transformers 5's rope_parameters or rope_scaling and rope_theta."""

    def __init__(self, config: Any, layer_type: str | None) -> None:
        self.config = config
        given = self.of_config("rope_parameters") or self.of_config("rope_scaling") or {}
        if not isinstance(given, Mapping):
            raise mismatch("rope_parameters", "a dict", shown(given))
        nested = [key for key, value in given.items() if isinstance(value, Mapping)]
        if nested:
            if layer_type not in nested:
                raise mismatch("layer_type", f"one of {', '.join(map(repr, nested))}", shown(layer_type))
            given = given[layer_type]
        self.given = given
        self.rope_type = given.get("rope_type") or given.get("type") or "default"
        if not isinstance(self.rope_type, str) or self.rope_type not in ROPE_TYPES:
            expected = f"one of {', '.join(map(repr, ROPE_TYPES))}"
            raise mismatch("rope_type", expected, shown(self.rope_type) + did_you_mean(self.rope_type, ROPE_TYPES))
        head_dim = self.of_config("head_dim") or self.head_dim()
        self.dim = int(head_dim * self.number("partial_rotary_factor", 1.0))
        if self.dim < 2 or self.dim % 2:
            raise mismatch("partial_rotary_factor", f"an even part of head_dim {head_dim}, 2 or more", self.dim)
        self.theta = self.number("rope_theta", 10000.0)

    def head_dim(self) -> int:
        """hidden_size / num_attention_heads, which must be even."""
        width, heads = self.whole("hidden_size"), self.whole("num_attention_heads")
        if width // heads % 2:
            raise mismatch("hidden_size", f"an even number for each of num_attention_heads = {heads}", width)
        return width // heads

    def of_config(self, name: str) -> Any:
        return self.config.get(name) if isinstance(self.config, Mapping) else getattr(self.config, name, None)

    def of_either(self, name: str) -> Any:
        value = self.given.get(name)
        return self.of_config(name) if value is None else value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.of_either(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise mismatch(name, "a finite number above 0", shown(value))
        return value

    def whole(self, name: str) -> int:
        value = self.of_config(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise mismatch(name, "an integer of 1 or more", shown(value))
        return value

    def trained_length(self) -> float:
        """The context length before it was extended."""
        return self.number("original_max_position_embeddings", self.of_config("max_position_embeddings"))

    def wavelengths(self, theta: float) -> Tensor:
        """Of each pair of channels, divided by 2π: positions per radian."""
        return theta ** (torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim)


def default(settings: Settings, positions: Tensor) -> Frequencies:
    return 1 / settings.wavelengths(settings.theta), 1.0


def linear(settings: Settings, positions: Tensor) -> Frequencies:
    """Positions are divided by the factor (Chen et al., 2023, arXiv:2306.15595)."""
    return default(settings, positions)[0] / settings.number("factor"), 1.0


def dynamic(settings: Settings, positions: Tensor) -> Frequencies:
    """The base grows with the sequence, once it is longer than max_position_embeddings ("dynamic NTK")."""
    factor, trained = settings.number("factor"), settings.whole("max_position_embeddings")
    length = max(int(positions.max()) + 1 if positions.numel() else 0, trained)
    if settings.dim == 2:  # one pair, whose frequency is 1 whatever the base
        return default(settings, positions)
    growth = factor * length / trained - (factor - 1)
    return 1 / settings.wavelengths(settings.theta * growth ** (settings.dim / (settings.dim - 2))), 1.0


def llama3(settings: Settings, positions: Tensor) -> Frequencies:
    """Long wavelengths are scaled by the factor, short ones kept, those in between interpolated (Llama 3.1)."""
    frequencies, _ = default(settings, positions)
    factor, low, high = (settings.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    rotations = settings.trained_length() * frequencies / (2 * math.pi)  # within the trained length
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies, 1.0


def yarn(settings: Settings, positions: Tensor) -> Frequencies:
    """Peng et al., 2023 (arXiv:2309.00071)."""
    trained, dim = settings.trained_length(), settings.dim
    factor = settings.number("factor", settings.of_config("max_position_embeddings") or math.nan)
    if settings.of_either("factor") is None:
        factor /= trained

    def pair_of(rotations: float) -> float:
        """The channel, of dim, whose pair makes so many rotations within the trained length."""
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(settings.theta))

    first, last = pair_of(settings.number("beta_fast", 32.0)), pair_of(settings.number("beta_slow", 1.0))
    if settings.given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    interpolated = ((torch.arange(dim // 2, device="cpu") - first) / (last - first or 0.001)).clamp(0, 1)
    frequencies, _ = default(settings, positions)
    frequencies = frequencies / factor * interpolated + frequencies * (1 - interpolated)

    def attention_scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if settings.given.get("attention_factor") is not None:
        return frequencies, settings.number("attention_factor")
    if settings.given.get("mscale") and settings.given.get("mscale_all_dim"):
        numerator, denominator = (attention_scale(settings.number(n)) for n in ("mscale", "mscale_all_dim"))
        return frequencies, numerator / denominator
    return frequencies, attention_scale(1.0)


ROPE_TYPES: dict[str, Callable[[Settings, Tensor], Frequencies]] = {
    "default": default,
    "linear": linear,
    "dynamic": dynamic,
    "llama3": llama3,
    "yarn": yarn,
}


class Rope:
    """The rotation of one type of layer. Its frequencies are computed once, but those of the type dynamic."""

    def __init__(self, config: Any, layer_type: str | None) -> None:
        self.settings = Settings(config, layer_type)
        self.frequencies_of = ROPE_TYPES[self.settings.rope_type]
        self.fixed = None
        if self.frequencies_of is not dynamic:
            self.fixed = self.frequencies_of(self.settings, torch.empty(0, dtype=torch.int64, device="cpu"))

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: (batch or 1, tokens). See rope_tables."""
        frequencies, scale = self.fixed or self.frequencies_of(self.settings, positions)
        angles = positions[..., None].float() * frequencies.to(positions.device)
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * scale, angles.sin() * scale


def rope_tables(config: Any, positions: Tensor, *, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
    """The cosines and sines of rotary positions, for `fastlm.rotary`, as transformers' models compute them.

    Args:
        config: a configuration of transformers, or the contents of a config.json: head_dim, or hidden_size and
            num_attention_heads; and rope_parameters (or rope_scaling and rope_theta) of type default, linear, dynamic,
            llama3 or yarn.
        positions: (tokens,) or (batch, tokens), integers. The type dynamic reads the largest.
        layer_type: which of the settings, if the configuration has some for each type of layer.

    Returns:
        (cos, sin): (batch or 1, tokens, rotary_dim) in float32 on the device of positions.

    Raises:
        ValueError: a setting is missing or not supported; the message names it.
    """
    check_tensor("positions", positions)
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise mismatch("positions", "integers", positions.dtype)
    if positions.dim() not in (1, 2):
        raise mismatch("positions", "shape (tokens,) or (batch, tokens)", tuple(positions.shape))
    return Rope(config, layer_type).tables(positions if positions.dim() == 2 else positions[None])
