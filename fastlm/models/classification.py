"""The losses of a classifier of sequences."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlm.core.errors import check_storage, check_tensor, mismatch
from fastlm.core.tracing import needs_custom_op
from fastlm.models import inputs
from fastlm.models.layers import Linear, loss_and_logits
from fastlm.models.outputs import HeadOutput


def check_labels(labels: Tensor | None) -> None:
    if labels is not None:
        check_tensor("labels", labels)
        if labels.is_cpu and not needs_custom_op(labels):
            check_storage("labels", labels)


def classify(x: Tensor, projection: Linear, labels: Tensor | None, config: Any, training: bool) -> HeadOutput:
    """x: (batch, width). config.problem_type, or else the labels, select the loss:

    - integers (batch,): one of num_labels classes; cross-entropy, in training mode without materialised logits.
    - floating point (batch,), with num_labels = 1: regression; mean squared error.
    - floating point (batch, num_labels): independent labels; mean binary cross-entropy.
    """
    if labels is None or problem_type(config, labels) == "single_label_classification":
        if labels is not None:
            inputs.check_ids(
                "labels",
                labels,
                below=config.num_labels,
                device=x.device,
                shape=(x.shape[0],),
                ignore_index=inputs.IGNORE_INDEX,
            )
        return HeadOutput(*loss_and_logits(x, projection.weight, projection.bias, labels, training))
    logits = projection(x)
    logits_fp32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = labels.to(logits.device)
    if problem_type(config, labels) == "regression":
        if targets.numel() != logits.numel():
            expected = tuple(logits.shape[: 1 if config.num_labels == 1 else 2])
            raise mismatch("labels", f"shape {expected}", tuple(labels.shape))
        return HeadOutput(F.mse_loss(logits_fp32, targets.view_as(logits_fp32).to(logits_fp32.dtype)), logits)
    if targets.shape != logits.shape:
        raise mismatch("labels", f"shape {tuple(logits.shape)}", tuple(labels.shape))
    return HeadOutput(F.binary_cross_entropy_with_logits(logits_fp32, targets.to(logits_fp32.dtype)), logits)


def problem_type(config: Any, labels: Tensor) -> str:
    if config.problem_type is not None:
        return str(config.problem_type)
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
