"""The operators' cases at sizes that take no time."""

import dataclasses

import torch

from fastlm.ops.adamw import bench as adamw
from fastlm.ops.attention import bench as attention
from fastlm.ops.benchmark import Case, Problem
from fastlm.ops.contrastive_loss import bench as contrastive_loss
from fastlm.ops.gelu_mlp import bench as gelu_mlp
from fastlm.ops.glu_mlp import bench as glu_mlp
from fastlm.ops.layernorm_residual import bench as layernorm_residual
from fastlm.ops.linear import bench as linear
from fastlm.ops.linear_cross_entropy import bench as linear_cross_entropy
from fastlm.ops.linear_log_prob import bench as linear_log_prob
from fastlm.ops.rms_norm_residual import bench as rms_norm_residual
from fastlm.ops.rotary import bench as rotary

SIZES = {
    attention.dense: {"tokens": 48, "heads": 4, "head_dim": 16},
    attention.decode: {"tokens": 300, "heads": 2, "head_dim": 16, "batch": 2},
    attention.windowed: {"tokens": 48, "heads": 4, "head_dim": 16, "window": 10},
    attention.packed: {"tokens": 48, "heads": 4, "head_dim": 16, "repeats": 1},
    contrastive_loss.problem: {"batch": 48, "width": 64},
    gelu_mlp.problem: {"rows": 48, "width": 64},
    glu_mlp.problem: {"rows": 48, "width": 64, "hidden": 150},
    layernorm_residual.problem: {"rows": 48, "width": 64},
    linear.problem: {"rows": 48, "width": 64, "out": 192},
    linear.decode_step: {"width": 64},
    linear_cross_entropy.problem: {"rows": 48, "width": 64, "vocab": 90},
    linear_log_prob.problem: {"rows": 48, "width": 64, "vocab": 90},
    rms_norm_residual.problem: {"rows": 48, "width": 64},
    rms_norm_residual.heads: {"rows": 12, "heads": 3, "width": 16},
    rotary.problem: {"rows": 12, "heads": 4, "num_kv_heads": 2, "head_dim": 16},
    adamw.problem: {"shapes": ((30, 20), 7)},
}


def small(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", **sizes) -> Problem:
    return case.problem(dtype, device, **SIZES[case.make] | sizes)


def shrunk(case: Case, **changes) -> Case:
    """The case with small sizes, and the changes."""
    return dataclasses.replace(case, sizes={**case.sizes, **SIZES[case.make]}, **changes)
