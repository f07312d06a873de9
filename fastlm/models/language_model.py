"""The base class of models that predict the next token."""

from torch import Tensor
from torch.nn import functional as F

from fastlm.models import inputs
from fastlm.models.base import PretrainedModel
from fastlm.models.decoding import generate
from fastlm.models.layers import Linear, loss_and_logits
from fastlm.models.outputs import HeadOutput, ModelOutput
from fastlm.models.packing import positions_of


class LanguageModel(PretrainedModel):
    """A model that predicts the next token.

    forward() takes input_ids, past_key_values (a KVCache), attention_mask, position_ids and logits_to_keep, and
    returns an output with logits. The config has max_position_embeddings, num_hidden_layers, eos_token_id and
    pad_token_id.
    """

    generate = generate

    @property
    def logit_softcap(self) -> float | None:
        """The cap of the logits: softcap of fastlm.linear_cross_entropy."""
        return None

    @property
    def base_model(self) -> PretrainedModel:
        """The model without its head."""
        return getattr(self, self.base_model_prefix)

    def add_head(self) -> None:
        """lm_head, the output projection. A tied weight is replaced by the embedding's, so none is allocated."""
        config = self.config
        device = "meta" if config.tie_word_embeddings else None
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, device=device)
        self.initialise(self.lm_head)
        self.tie_weights()

    def output_weight(self, hidden: ModelOutput) -> Tensor:
        """The weight of the output projection to use with `hidden`, an output of base_model.

        If it is tied to the embedding, both gradients are accumulated in one buffer (layers.SharedTable).
        """
        raise NotImplementedError

    def project(
        self,
        hidden: ModelOutput,
        weight: Tensor,
        labels: Tensor | None,
        logits_to_keep: int,
        cu_seqlens: Tensor | None = None,
    ) -> HeadOutput:
        """Logits of the next tokens, or their loss: the logits at position i are compared with label i + 1.

        With packed sequences the last token of each predicts nothing.
        """
        x = hidden.last_hidden_state
        if labels is not None:
            inputs.check_ids(
                "labels",
                labels,
                below=self.config.vocab_size,
                device=x.device,
                shape=tuple(x.shape[:2]),
                ignore_index=inputs.IGNORE_INDEX,
            )
            if cu_seqlens is not None:
                labels = labels.masked_fill(positions_of(cu_seqlens, *labels.shape) == 0, inputs.IGNORE_INDEX)
            labels = F.pad(labels[:, 1:], (0, 1), value=inputs.IGNORE_INDEX)
        elif logits_to_keep:
            x = x[:, -logits_to_keep:]
        loss, logits = loss_and_logits(x, weight, None, labels, self.training, self.logit_softcap)
        if labels is not None and logits is not None and logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return HeadOutput(loss, logits, hidden.past_key_values)
