"""Running a model of transformers or fastlm.models on batches: hidden states by text, packed if it gives them so."""

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from fastlm.core.errors import check_flag, check_integer, wrong_type
from fastlm.core.modules import evaluation_mode, first_parameter, submodules
from fastlm.integrations.direct import is_unchanged, last_hidden_states
from fastlm.integrations.encoders import EncoderPatch
from fastlm.integrations.encoding.schedule import Item, batches
from fastlm.integrations.encoding.tokens import Tokenizing
from fastlm.integrations.packing import packed_output
from fastlm.integrations.patch import patch_of
from fastlm.models.base import PretrainedModel
from fastlm.models.encoder import Encoder

Results = Generator[tuple[list[int], Tensor], None, None]  # (indices, results) of one batch after another


@functools.cache
def argument_names(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


class Runner:
    """Calls a model with the features that its forward takes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.names = argument_names(type(model).forward)
        if isinstance(model, Encoder) and model.base_model.types is None:
            self.names -= {"token_type_ids"}
        self.options = {"use_cache": False} if "use_cache" in self.names else {}
        self.device = first_parameter(model).device

    def __call__(self, features: dict[str, Tensor]) -> Any:
        return self.model(**self.arguments(features), **self.options)

    def arguments(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.to(self.device) for name, x in features.items() if name in self.names}

    def run(
        self, tokenizing: Tokenizing, budget: int, compute: Callable[[list[Item]], Tensor], done: int = 0
    ) -> Results:
        """The results of all batches but the first `done`."""
        unchanged = is_unchanged(self.model)  # if not, modules are searched
        padded = not unchanged and not unpads(self.model)
        planned = batches(tokenizing.sizes(), tokenizing, budget, padded=padded)
        with contextlib.nullcontext() if unchanged else evaluation_mode(self.model):
            for number, batch in enumerate(planned):
                if number < done:
                    continue
                indices = [item.number for item in batch]
                with torch.inference_mode():  # not while the caller has a batch
                    results = compute(batch).cpu()
                    check_finite(results, indices, self.model)
                yield indices, results

    def hidden_states(self, features: dict[str, Tensor], lengths: Sequence[int]) -> Sequence[Tensor]:
        """The last hidden states of each text, (tokens, width) in float32."""
        if isinstance(self.model, Encoder):
            return self.model.encode_packed(**self.arguments(features))[0].float().split(list(lengths))
        if (rows := last_hidden_states(self.model, self.arguments(features), sum(lengths))) is not None:
            return rows.float().split(list(lengths))
        with packed_output() as taken:
            output = self(features)[0]
        output = output.float()
        if taken:  # (1, real tokens, width)
            return output[0].split(list(lengths))
        return [output[i, :length] for i, length in enumerate(lengths)]


def unpads(model: nn.Module) -> bool:
    if isinstance(model, Encoder):
        return True
    return any(isinstance(patch_of(module), EncoderPatch) for module in submodules(model, of_each_list=0))


def check_model(model: Any) -> None:
    is_supported = isinstance(model, PreTrainedModel) and not model.config.is_encoder_decoder
    if not is_supported and not isinstance(model, PretrainedModel):
        expected = "an encoder or decoder of transformers or fastlm.models, a SentenceTransformer, or a directory"
        raise wrong_type("model", expected, model)


def check_finite(results: Tensor, indices: Sequence[int], model: nn.Module) -> None:
    """Raise an error that names the weight, or the text, if a result is not finite."""
    if math.isfinite(results.sum()):
        return
    finite = results.isfinite()
    if finite.all():  # their sum overflows
        return
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            kind = "NaN" if parameter.isnan().any() else "infinity"
            raise ValueError(f"model: expected finite weights, got {kind} in {name}")
    row = int((~finite.flatten(1).all(1) if finite.dim() > 1 else ~finite).nonzero()[0])
    raise ValueError(f"texts[{indices[row]}]: expected finite results, got {describe(results[row])} from the model")


def describe(result: Tensor) -> str:
    return "NaN" if result.isnan().any() else "infinity"


def gather(results: Results, total: int, unit: str, progress: bool | None) -> Tensor | None:
    """All results in the order of the texts, under a progress bar; None if there is no text."""
    out = None
    hidden = not (sys.stderr.isatty() if progress is None else check_flag("progress", progress))
    bar = None if hidden else tqdm(total=total, unit=unit, delay=int(progress is None))
    with contextlib.closing(results), contextlib.nullcontext() if bar is None else bar:
        for indices, part in results:
            if total == 1:
                out = part.clone()  # an inference tensor could not be used in training
            else:
                out = torch.empty(total, *part.shape[1:]) if out is None else out
                out.index_copy_(0, torch.tensor(indices), part)
            if bar is not None:
                bar.update(len(indices))
    return out


def check_budget(max_tokens_per_batch: Any) -> int:
    return check_integer("max_tokens_per_batch", max_tokens_per_batch, "an integer of 1 or more", range(1, 2**63))


def is_sentence_transformer(model: Any, kind: str) -> bool:
    """Whether it is of a class of sentence-transformers, which exists only if that is imported."""
    classes = getattr(sys.modules.get("sentence_transformers"), kind, None)
    return classes is not None and isinstance(model, classes)
