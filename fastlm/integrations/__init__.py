"""fastlm inside models that people already have. transformers is imported only when one of these is called."""

from typing import TYPE_CHECKING, TypeVar

from torch import nn

if TYPE_CHECKING:
    from fastlm.integrations.report import Report

M = TypeVar("M", bound=nn.Module)


def accelerate(
    model: M,
    *,
    attention: bool = True,
    layernorm: bool = True,
    mlp: bool = True,
    loss: bool = True,
    strict: bool = True,
) -> M:
    """Make a Hugging Face model compute with fastlm's operators, in place: GPT-2, BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA and DistilBERT, with any head.

    Parameters stay where they are: state dict, optimisers, `save_pretrained`, `Trainer`, weight tying and resizing work as before, and hooks, adapters and
    sharding may come before or after. A part that cannot be replaced exactly (a projection with an adapter, a module with a hook that would be skipped, an
    activation that is not a GELU) computes as it did; `fastlm.report(model)` lists it with the reason, and asks at every call anew. Under a mask that hides
    padding an encoder runs on the real tokens alone; its hidden states at padding are 0 then.

    Args:
        model: a transformers model, or any module that contains one: a PeftModel, a SentenceTransformer, a module of your own.
        attention: projections and attention, forward and backward.
        layernorm: dropout, residual addition and LayerNorm in one pass.
        mlp: the feed-forward block.
        loss: language-model and masked-language-model heads. In training mode with labels, logits are None: the loss is computed without them.
        strict: raise if nothing could be replaced.

    Returns:
        model itself. `fastlm.restore(model)` undoes it.

    Raises:
        ValueError: nothing in the model could be replaced, and strict; or the model has gone through torch.compile (accelerate first, then compile).
        ImportError: transformers is not installed.
    """
    from fastlm.integrations import transformers

    return transformers.accelerate(model, attention=attention, layernorm=layernorm, mlp=mlp, loss=loss, strict=strict)


def report(model: nn.Module) -> "Report":
    """What `accelerate` replaced in a model, who computes it, and what it left alone and why, as of now. str() of it is a table."""
    from fastlm.integrations import transformers

    return transformers.report(model)


def restore(model: M) -> M:
    """Undo `accelerate`: every module is exactly what it was. Returns the model.

    Raises:
        RuntimeError: something has wrapped a module since (it is named); undo that first.
    """
    from fastlm.integrations import transformers

    return transformers.restore(model)
