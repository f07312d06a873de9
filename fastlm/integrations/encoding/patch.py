"""`SentenceTransformer.encode` of an accelerated model: the same embeddings, scheduled as `fastlm.encode` does."""

import dataclasses
import functools
import inspect
import logging
from typing import Any

import numpy
import torch
from torch import Tensor

from fastlm.core.modules import submodules
from fastlm.integrations.encoding.embed import embedder
from fastlm.integrations.encoding.forward import gather, is_sentence_transformer
from fastlm.integrations.encoding.schedule import MAX_TOKENS_PER_BATCH
from fastlm.integrations.patch import call_reason

NAME = "encode"
signature_of = functools.cache(inspect.signature)
# Arguments that only choose what is encoded, how the result is returned, or its prompt.
TAKEN = {
    "prompt_name",
    "prompt",
    "batch_size",
    "show_progress_bar",
    "convert_to_numpy",
    "convert_to_tensor",
    "normalize_embeddings",
    "truncate_dim",
}


class EncodePatch:
    """Stands as `encode` in the `__dict__` of a SentenceTransformer, where it hides the method.

    It is copied and pickled with the module.

    A call that asks for anything but the embeddings of texts, in this process and by these modules, is the method's.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        functools.update_wrapper(self, type(model).encode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.bind(args, kwargs)
        found = None if call is None else self.encode(**call)
        return type(self.model).encode(self.model, *args, **kwargs) if found is None else found

    def bind(self, args: tuple, kwargs: dict) -> dict[str, Any] | None:
        """Arguments of `encode`, or None if a call needs the method."""
        model = self.model
        signature = signature_of(type(model).encode)
        try:
            bound = signature.bind(model, *args, **kwargs)
        except TypeError:
            return None
        _, texts, *others = bound.arguments  # the name of the texts depends on the version
        rest = {name: bound.arguments[name] for name in others}
        rest |= rest.pop("kwargs", {})
        rest.pop("task", None)  # of encode_query and encode_document, which only a Router reads
        defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
        if any(name not in TAKEN and (name not in defaults or rest[name] != defaults[name]) for name in rest):
            return None
        if model._compiled_call_impl is not None or getattr(model, "_distributed_inference", None) is not None:
            return None
        if any(call_reason(module) for module in (model, *list(model)[:2])):
            return None
        given = {name: rest.get(name, defaults[name]) for name in TAKEN}
        return {"texts": bound.arguments[texts], **given}

    def encode(
        self,
        texts: Any,
        prompt_name: str | None,
        prompt: str | None,
        batch_size: int,
        show_progress_bar: bool | None,
        convert_to_numpy: bool,
        convert_to_tensor: bool,
        normalize_embeddings: bool,
        truncate_dim: int | None,
    ) -> Any:
        """The result of the method; None if an argument needs the method itself."""
        model, is_single = self.model, isinstance(texts, str)
        texts = [texts] if is_single else texts.tolist() if isinstance(texts, numpy.ndarray) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            return None
        if not isinstance(batch_size, int) or batch_size < 1:
            return None
        try:
            described = embedder(
                model, prompt=prompt, prompt_name=prompt_name, normalize=True if normalize_embeddings else None
            )
        except ValueError:  # modules that fastlm.encode does not know, or a prompt that the model has not
            return None
        if truncate_dim is not None:
            settings = dataclasses.replace(described.settings, width=truncate_dim)
            described = dataclasses.replace(described, settings=settings)
        if show_progress_bar is None:
            level = logging.getLogger(type(model).__module__).getEffectiveLevel()
            show_progress_bar = level in (logging.INFO, logging.DEBUG)
        if any(module.training for module in submodules(model)):
            model.eval()  # as the method does
        budget = min(batch_size * described.max_length, MAX_TOKENS_PER_BATCH)
        run = described.run(described.tokenizing(texts), budget)
        out = gather(run, len(texts), "text", bool(show_progress_bar))
        assert out is not None
        return self.converted(out[0] if is_single else out, convert_to_numpy, convert_to_tensor)

    def converted(self, out: Tensor, convert_to_numpy: bool, convert_to_tensor: bool) -> Any:
        parameter = next(self.model.parameters())
        out = out.to(parameter.dtype)
        if convert_to_tensor or not convert_to_numpy:
            out = out.to(parameter.device)
            return out if convert_to_tensor or out.dim() == 1 else list(out)
        return (out.float() if out.dtype == torch.bfloat16 else out).numpy()  # numpy has no bfloat16


def put_encode(module: Any) -> None:
    """Patch a SentenceTransformer whose class has sentence-transformers' own encode."""
    if not is_sentence_transformer(module, "SentenceTransformer") or NAME in module.__dict__:
        return
    owner = next(kind for kind in type(module).__mro__ if NAME in vars(kind))
    if owner.__module__.startswith("sentence_transformers."):
        module.__dict__[NAME] = EncodePatch(module)


def remove_encode(module: Any) -> None:
    if isinstance(module.__dict__.get(NAME), EncodePatch):
        del module.__dict__[NAME]
