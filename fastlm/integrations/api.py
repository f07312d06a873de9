"""`fastlm.accelerate`, `report` and `restore`. transformers is imported only when one of them is called."""

from typing import TYPE_CHECKING, TypeVar

from torch import nn

from fastlm.core.errors import check_flag, wrong_type

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
    unpad: bool = True,
    strict: bool = True,
) -> M:
    """Replace the computation of a Hugging Face model by fastlm's operators, in place.

    Supported are Llama, Mistral, Qwen 2 and 3, SmolLM 2 and 3, Gemma 2 and 3, GPT-2, BERT, RoBERTa, XLM-RoBERTa,
    CamemBERT, ELECTRA, DistilBERT, MPNet, ModernBERT, EuroBERT, GTE, Nomic BERT and Jina embeddings v3, with any head.

    Parameters and modules stay the same: state dict, optimizers, `save_pretrained`, `Trainer`, weight tying and
    resizing work as before, and hooks, adapters and sharding may be added before or after. A part that cannot be
    replaced without changing the result (a projection with an adapter, a module with a hook, an activation that no
    operator has) is computed by its own module. This is checked at every call; `fastlm.report(model)` lists these parts
    with the reasons.

    With a padding mask, encoders run unpadded: real tokens are gathered before the first layer and scattered after the
    last, and hidden states at padding are 0. `encode` of a SentenceTransformer cuts batches by tokens, as
    `fastlm.encode` does.

    Args:
        model: a transformers model, or any module that contains one (a PeftModel, a SentenceTransformer, your own).
        attention: replace the projections, the rotation by positions and the attention.
        layernorm: replace dropout, residual addition and LayerNorm or RMSNorm by one operator.
        mlp: replace the feed-forward block.
        loss: replace the loss of language-model and masked-language-model heads. In training mode with labels, logits
            are None, because the loss is computed without them.
        unpad: run encoders unpadded. False: padding is computed as transformers does, for those who read hidden states
            there.
        strict: raise if nothing could be replaced.

    Returns:
        The model. `fastlm.restore(model)` undoes it.

    Raises:
        TypeError: the model is no module, or another argument no bool.
        ValueError: nothing in the model could be replaced and strict is True, or the model is the result of
            torch.compile. Call accelerate first, then torch.compile.
        ImportError: transformers is not installed.
    """
    from fastlm.integrations import transformers
    from fastlm.integrations.encoding.patch import put_encode

    check_module(model)
    options = {
        "attention": attention,
        "layernorm": layernorm,
        "mlp": mlp,
        "loss": loss,
        "unpad": unpad,
        "strict": strict,
    }
    transformers.accelerate(model, **{name: check_flag(name, value) for name, value in options.items()})
    for module in model.modules():
        put_encode(module)
    return model


def report(model: nn.Module) -> "Report":
    """The parts of a model that `accelerate` replaced, with their backends, and those it did not, with the reasons.

    Describes the current state of the model. str() of the result is a table.
    """
    from fastlm.integrations import transformers

    check_module(model)
    return transformers.report(model)


def restore(model: M) -> M:
    """Undo `accelerate`: every module is as it was before. Returns the model.

    Raises:
        RuntimeError: other code has wrapped a module's forward since. The message names the module.
    """
    from fastlm.integrations import transformers
    from fastlm.integrations.encoding.patch import remove_encode

    check_module(model)
    transformers.restore(model)
    for module in model.modules():
        remove_encode(module)
    return model


def check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise wrong_type("model", "a module", model)
