"""The base class of all models: initialisation, weight tying, loading, saving, recomputation."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from fastlm import backends
from fastlm.core.errors import FLOATING, check_choice, check_path
from fastlm.models import checkpoint
from fastlm.models.cache import KVCache
from fastlm.models.config import Config
from fastlm.models.layers import RECOMPUTE, Conv1D, FeedForward, RMSNorm
from fastlm.models.outputs import ModelOutput
from fastlm.ops.gelu_mlp.spec import RECOMPUTE_LEVELS

M = TypeVar("M", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    config_class: ClassVar[type[Config]]
    base_model_prefix: ClassVar[str]  # the attribute under which a model with a head holds the model without
    tied: ClassVar[dict[str, str]] = {}  # with config.tie_word_embeddings: parameter name → name it shares storage with

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
        """Loads the model in a Hugging Face directory; returns it in evaluation mode.

        Args:
            directory: contains config.json and the weights: model.safetensors, or its shards and their index, or
                pytorch_model.bin, or its shards (in this order of preference).
            config: used instead of config.json.
            dtype: of the parameters; None: as stored (the widest one, if the file has several).
            initialise: prefixes of parameter names that may be missing in the file and are then initialised at
                random. ("classifier",) adds a new classifier to a pretrained BERT.
            arguments: passed to the class, for example add_pooling_layer=False to BertModel.

        Raises:
            FileNotFoundError, ValueError: a file is missing or damaged, a setting is not supported, or a parameter is
                missing or has another shape. The message is one line that names it. Parameters in the file that the
                model does not have cause a warning.
        """
        check_path("directory", directory)
        if dtype is not None:
            check_choice("dtype", dtype, FLOATING)
        model_class: Any = cls.class_for(Path(directory), config)
        config = cls.config_class.from_pretrained(directory) if config is None else config
        tensors = config.renamed(checkpoint.read_tensors(Path(directory)))
        if config.num_hidden_layers > len(tensors) and not initialise:  # building them could take all memory
            expected = f"no more layers than the {len(tensors)} tensors of the weights"
            raise ValueError(f"{directory}: num_hidden_layers: expected {expected}, got {config.num_hidden_layers}")
        try:
            with torch.device("meta"):  # no memory is allocated and no random numbers are drawn
                model = model_class(config, **arguments)
        except RuntimeError as error:  # a size that does not fit into 64 bits
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{directory}: expected sizes in config.json that can be allocated ({reason})") from None
        tied = model.ties() if config.tie_word_embeddings else {}
        found = checkpoint.select(
            model,
            tensors,
            prefix=model.prefix(),
            tied=tied,
            may_be_missing=initialise,
            directory=Path(directory),
        )
        model.to(dtype or checkpoint.widest_dtype(found.values()))
        model.to_empty(device=torch.get_default_device())
        model.tie_weights()  # to_empty() has given tied parameters separate storage
        checkpoint.load_parameters(model, found, tied=tied, initialise=model.initialise)
        loaded: M = model.eval()
        return loaded

    @classmethod
    def class_for(cls, directory: Path, config: Any) -> "type[PretrainedModel]":
        """The class that from_pretrained makes."""
        return cls

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors in Hugging Face's format.

        Both files are replaced at once, also if the process is killed: a directory never has the config.json of one
        checkpoint and the weights of another. On failure none has changed, and the OSError names the file.
        """
        with checkpoint.staged(Path(directory)) as folder:
            self.write_files(folder)

    def write_files(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes config.json and model.safetensors into a staging directory, see checkpoint.staged.

        state: a copy of state_dict() to write instead of the present one.
        """
        settings = {
            **self.config.to_dict(),
            "architectures": [self.architecture],
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        checkpoint.write(self.state_dict() if state is None else state, settings, tied=self.ties(), folder=folder)

    @property
    def architecture(self) -> str:
        """The name of the class in transformers."""
        return type(self).__name__

    def prefix(self) -> str:
        """The attribute under which a model with a head holds the model without; stored keys may begin with it."""
        return self.base_model_prefix

    def ties(self) -> Mapping[str, str]:
        """With config.tie_word_embeddings: the name of a parameter → the name of the one it shares storage with."""
        return self.tied

    def new_cache(self, capacity: int) -> KVCache:
        """An empty KV cache for `capacity` tokens of each sequence."""
        return KVCache(self.config.num_hidden_layers, capacity)

    def tie_weights(self) -> None:
        """Makes every tied parameter the same tensor as the one it is tied to."""
        if self.config.tie_word_embeddings:
            for name, source in self.ties().items():
                owner, _, attribute = name.rpartition(".")
                setattr(self.get_submodule(owner), attribute, self.get_parameter(source))

    @torch.no_grad()
    def initialise(self, root: nn.Module) -> None:
        """Initialises the parameters in root as Hugging Face does.

        Matrices: N(0, initializer_range²); biases: 0; norms: a scale of 1, bias 0. Matrices on the meta device are
        left alone: for their random numbers PyTorch would import its compiler, which takes seconds.
        """
        for module in root.modules():
            if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) and not module.weight.is_meta:
                module.weight.normal_(0.0, self.config.initializer_range)
            if isinstance(module, (nn.Linear, Conv1D)) and module.bias is not None:
                module.bias.zero_()
            elif isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, RMSNorm):
                module.weight.fill_(0.0 if module.unit_offset else 1.0)

    @property
    def recompute(self) -> int:
        """What the backward pass of every MLP recomputes instead of saving: 0 nothing, 1 the GELU, 2 also the up
        projection.

        The default is 1: it saves memory at no cost, as the backward of the GELU computes its value anyway. Assign to
        change it for all layers (`model.recompute = 2`). Losses and gradients are the same at every level, bit for
        bit if one backend computes both directions.
        """
        return self._recompute

    @recompute.setter
    def recompute(self, level: int) -> None:
        check_choice("recompute", level, RECOMPUTE_LEVELS)
        for module in self.modules():
            if isinstance(module, PretrainedModel):
                module._recompute = level
            elif isinstance(module, FeedForward):
                module.recompute = level

    def gradient_checkpointing_enable(self) -> None:
        """In training, save only the input of each layer and recompute the layer in the backward pass.

        A step takes about a third longer and needs a fraction of the memory. Dropout masks are the same in both
        passes, so that losses and gradients are bit-identical.
        """
        self.set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self.set_gradient_checkpointing(False)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        for module in self.modules():
            if isinstance(module, PretrainedModel):
                module.gradient_checkpointing = enabled

    @staticmethod
    def output_projection(weight: Tensor, embedding: nn.Embedding, hidden: ModelOutput) -> Tensor:
        """The weight for the output projection of `hidden`: if tied to the embedding, the tensor from its forward."""
        return hidden.shared_table if hidden.shared_table is not None and weight is embedding.weight else weight

    def run_layer(self, layer: nn.Module, *arguments: Any) -> Any:
        """layer(*arguments), recomputed in the backward pass if gradient checkpointing is enabled."""
        if not (self.gradient_checkpointing and self.training):
            return layer(*arguments)
        backend = None if torch.compiler.is_compiling() else backends.requested(None)
        if backend is None:
            return recompute_in_backward(layer, *arguments, use_reentrant=False)
        # The backward pass may run outside the `with use_backend(…)` block of the forward pass.
        return recompute_in_backward(
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
        """Number of trainable values; tied parameters count once."""
        return sum(p.numel() for p in self.parameters())
