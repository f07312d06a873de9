"""What every model can do besides computing: begin with Hugging Face's random weights, tie, load, save, trade time for memory."""

import contextlib
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlm import backends
from fastlm.models import checkpoint as files
from fastlm.models.config import Config
from fastlm.models.layers import RECOMPUTE, Conv1D, FeedForward
from fastlm.models.outputs import ModelOutput
from fastlm.ops.boundary import check_choice
from fastlm.ops.gelu_mlp import LEVELS

M = TypeVar("M", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    config_class: ClassVar[type[Config]]
    base_model_prefix: ClassVar[str]  # under which a model with a head keeps the one without
    tied: ClassVar[dict[str, str]] = {}  # parameter → the parameter that it is, where config.tie_word_embeddings

    def __init__(self, config: Config) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(f"config: expected a {self.config_class.__name__}, got {type(config).__name__}")
        self.config: Any = config
        self.gradient_checkpointing, self._recompute = False, RECOMPUTE

    @classmethod
    def from_pretrained(
        cls: type[M],
        directory: str | Path,
        *,
        config: Config | None = None,
        dtype: torch.dtype | None = None,
        initialise: tuple[str, ...] = (),
        **arguments: Any,
    ) -> M:
        """The model in a Hugging Face directory, in eval mode.

        Args:
            directory: holds config.json and model.safetensors, or its shards and their index, or pytorch_model.bin (or shards), in this order of preference.
            config: settings to use in place of config.json.
            dtype: of the parameters; None: as stored (the widest, where the file mixes them).
            initialise: beginnings of parameter names that the file may lack; those are drawn anew. ("classifier",) puts a new classifier on a pretrained BERT.
            arguments: for the class, as add_pooling_layer=False for BertModel.

        Raises:
            FileNotFoundError, ValueError: a file that is missing or damaged, a setting that is not supported, a parameter that the file lacks or has in
                another shape: one line that names it. A parameter that the model does not know is a warning.
        """
        settings = cls.config_class.from_pretrained(directory) if config is None else config
        stored = files.read(Path(directory))
        with torch.device("meta"):  # sizes without memory
            model = cls(settings, **arguments)
        model.to(dtype or files.widest(stored.values()))
        model.to_empty(device=torch.get_default_device())
        model.tie_weights()  # to_empty took the parameters apart
        files.fill(model, stored, initialise, Path(directory))
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors as Hugging Face does. Each appears whole under its name or not at all; an OSError names the file."""
        files.save(self, Path(directory))

    def tie_weights(self) -> None:
        """Makes every tied parameter the one it is tied to: one tensor under two names."""
        if self.config.tie_word_embeddings:
            for name, source in self.tied.items():
                owner, _, attribute = name.rpartition(".")
                setattr(self.get_submodule(owner), attribute, self.get_parameter(source))

    @torch.no_grad()
    def initialise(self, root: nn.Module) -> None:
        """Sets the parameters in root to Hugging Face's random start: N(0, initializer_range²) for matrices, 0 for biases, 1 and 0 for LayerNorm."""
        for module in root.modules():
            if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
                module.weight.normal_(0.0, self.config.initializer_range)
            if isinstance(module, (nn.Linear, Conv1D)) and module.bias is not None:
                module.bias.zero_()
            elif isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()

    @property
    def recompute(self) -> int:
        """What training computes again in backward rather than keep of every feed-forward part: 0 nothing, 1 the GELU, 2 the first product too.

        1 from the start: the GELU's value falls off when backward makes its slope, so that half the memory costs no time. Set it for all layers at once
        (`model.recompute = 2`): each level has the same losses and gradients, to the bit where one backend serves both directions.
        """
        return self._recompute

    @recompute.setter
    def recompute(self, level: int) -> None:
        check_choice("recompute", level, LEVELS)
        for module in self.modules():
            if isinstance(module, PretrainedModel):
                module._recompute = level
            elif isinstance(module, FeedForward):
                module.recompute = level

    def gradient_checkpointing_enable(self) -> None:
        """Training keeps only the inputs of each layer and computes the layer again in backward: about a third more time, a fraction of the memory.

        Dropout draws the same seeds the second time, so losses and gradients have the same bits.
        """
        self.set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self.set_gradient_checkpointing(False)

    def set_gradient_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, PretrainedModel):
                module.gradient_checkpointing = on

    @staticmethod
    def projection(weight: Tensor, embedding: nn.Embedding, hidden: ModelOutput) -> Tensor:
        """The weight of an output projection; one that is the embedding's, as the forward pass that gave `hidden` has handed it on."""
        return hidden.table if hidden.table is not None and weight is embedding.weight else weight

    def run(self, layer: nn.Module, *arguments: Any) -> Any:
        """layer(*arguments), recomputed in backward where that is enabled."""
        if not (self.gradient_checkpointing and self.training):
            return layer(*arguments)
        backend = None if torch.compiler.is_compiling() else backends.requested(None)
        if backend is None:
            return checkpoint(layer, *arguments, use_reentrant=False)
        # The second run is in backward, perhaps outside of the `with use_backend(…)` that the first was in.
        return checkpoint(
            layer,
            *arguments,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), backends.use_backend(backend)),
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def num_parameters(self) -> int:
        """Numbers that training sets; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())
