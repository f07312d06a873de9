"""Fine-tuning with low-rank adapters (LoRA, Hu et al., 2021, arXiv:2106.09685) of PEFT on an accelerated model.

The weights of the model do not change; the trainable parameters are those of the adapters. What is written is the
model with the adapters merged into its weights, which every reader of Hugging Face's format loads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from fastlm.core.copies import copied_with, without_data
from fastlm.core.errors import mismatch
from fastlm.integrations.api import accelerate
from fastlm.models import load_model
from fastlm.models.encoder import EncoderForMaskedLM
from fastlm.models.language_model import LanguageModel

ADAPTER = "adapter."  # prefix of the adapters' tensors in a checkpoint of a run


class LoraModel(nn.Module):
    """A model of transformers with adapters on all projections of its layers, and what a trainer needs of a model.

    Args:
        directory: of the model, in Hugging Face's format.
        rank: of the adapters.
        alpha: their product with the input is multiplied by alpha / rank.
        dropout: on the input of the adapters.
        seed: of their initial weights.

    Raises:
        ValueError: the model is not one that predicts the next or a masked token.
    """

    def __init__(self, directory: Path, *, rank: int, alpha: int, dropout: float, seed: int):
        super().__init__()
        own = load_model(directory, dtype=torch.float32)
        if not isinstance(own, LanguageModel | EncoderForMaskedLM):
            expected = "a model that predicts the next or a masked token"
            raise mismatch("init", expected, f"a {type(own).__name__} in {directory}")
        self.causal = isinstance(own, LanguageModel)
        kind = transformers.AutoModelForCausalLM if self.causal else transformers.AutoModelForMaskedLM
        base = kind.from_pretrained(str(directory), dtype=torch.float32)
        weights = dict(base.named_parameters(remove_duplicate=False))
        if differing := sorted(set(own.state_dict()) ^ {name for name in weights if name in base.state_dict()}):
            expected = "a model whose parameters have the same names in fastlm and transformers"
            raise mismatch("lora", expected, f"{type(own).__name__} with {differing[0]}")
        with torch.no_grad():
            for name, p in own.named_parameters():
                p.data = weights[name].data  # one copy in memory
        self.transposed = base.config.model_type == "gpt2"  # its projections are Conv1D
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules="all-linear",
            fan_in_fan_out=self.transposed,
            task_type="CAUSAL_LM" if self.causal else None,
            base_model_name_or_path=str(directory),
        )
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.adapted = accelerate(peft.get_peft_model(base, config))
        self.own = [own]  # not a submodule: its weights are those of self.adapted
        self.config = own.config

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.adapted(*arguments, **options)

    def loss(self, model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        """(model, inputs, targets) → mean loss of the targets, as the objectives of training.

        Causal models separate packed documents by the positions of their tokens.
        """
        options = {"shift_labels": targets, "use_cache": False} if self.causal else {}
        if inputs.dim() == 3:  # tokens and positions; transformers reads packing from these where there is no cache
            inputs, options["position_ids"] = inputs.unbind(1)
        found: Tensor = self(input_ids=inputs, labels=targets, **options).loss
        return found

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def gradient_checkpointing_enable(self) -> None:
        """As PretrainedModel.gradient_checkpointing_enable."""
        adapted: Any = self.adapted
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the newer name first
        enable = next(getattr(adapted, name) for name in names if hasattr(adapted, name))
        enable({"use_reentrant": False})

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.own[0].parameters()) + sum(p.numel() for p in self.adapters().values())

    def adapters(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.adapted.named_parameters() if p.requires_grad}

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Of the adapters: all that training changes."""
        return {name: p.detach() for name, p in self.adapters().items()}

    def training_state(self) -> dict[str, Tensor]:
        """What a checkpoint of a run has besides the merged model."""
        return {ADAPTER + name: value for name, value in self.state_dict().items()}

    @torch.no_grad()
    def load_training_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name, p in self.adapters().items():
            p.copy_(tensors[ADAPTER + name])

    @torch.no_grad()
    def merged(self, adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of the model with adapters in its weights."""
        state: dict[str, Tensor] = dict(self.own[0].state_dict())
        for name, layer in self.adapted.named_modules():
            if not isinstance(layer, peft.tuners.lora.LoraLayer) or not layer.lora_A:
                continue
            target = name.removeprefix("base_model.model.") + ".weight"
            weight = state[target]
            a, b = (adapters[f"{name}.lora_{x}.default.weight"].to(weight.device, torch.float32) for x in "AB")
            delta = layer.scaling["default"] * (b @ a)
            state[target] = weight + (delta.t() if self.transposed else delta)
        return state

    def merged_model(self, adapters: Mapping[str, Tensor], device: torch.device) -> LanguageModel | EncoderForMaskedLM:
        """The model of fastlm with adapters in its weights, on a device."""
        state = self.merged(adapters)
        model: LanguageModel | EncoderForMaskedLM = copied_with(self.own[0], lambda name, p: state[name].to(device))
        return model.to(device)

    def forget_base(self) -> None:
        """Frees the weights without the adapters, as far as `adapted` does not have them. They cannot be merged then.

        For the processes that have parts of them and do not write the model.
        """
        self.own[0] = without_data(self.own[0])

    def write_files(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes the model with the adapters merged, as PretrainedModel.write_files. state: a copy of state_dict()."""
        self.own[0].write_files(folder, self.merged(self.state_dict() if state is None else state))

    def save_adapter(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes the adapters alone in PEFT's format. state: as for write_files."""
        self.adapted.save_pretrained(str(folder), state_dict=self.state_dict() if state is None else state)

    def generate(
        self, input_ids: Tensor, *, max_new_tokens: int, temperature: float, eos_token_id: Any, seed: int
    ) -> Tensor:
        """As LanguageModel.generate."""
        training = self.training
        devices = [input_ids.device] if input_ids.is_cuda else []
        try:
            self.eval()
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                torch.manual_seed(seed)
                found: Tensor = self.adapted.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=True,
                    temperature=temperature,
                    eos_token_id=list(eos_token_id) or None,
                    pad_token_id=0,
                )
        finally:
            self.train(training)
        return found
