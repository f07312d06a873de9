"""Encoders: ModernBERT, BERT and the families of encoder_families.py and rotary_encoder_families.py.

With a padding mask they run unpadded: real tokens are gathered before the embedding, (1, real tokens, width), and what
is returned for each token is scattered at the end. Under torch.compile and export, where no size may depend on the
values of a mask, they run with padding.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlm.core.errors import check_flag, did_you_mean, mismatch
from fastlm.core.tracing import needs_custom_op
from fastlm.models import inputs
from fastlm.models.base import PretrainedModel, draw_normal
from fastlm.models.classification import check_labels, classify
from fastlm.models.compiled import may_skip_modules
from fastlm.models.config import CONFIG, read_json, stored
from fastlm.models.encode_layers import description_of, encode_layers
from fastlm.models.encoder_config import HEAD_ACTIVATIONS, POOLINGS, EncoderConfig
from fastlm.models.encoder_layer import FUNCTIONS, EncoderLayer, Padding, describe, new_norm, part, place
from fastlm.models.layers import (
    Embedding,
    Linear,
    embed,
    embed_tokens,
    loss_and_logits,
)
from fastlm.models.outputs import HeadOutput, ModelOutput
from fastlm.models.packing import Gather, Packed, Scatter, check_alone, check_cu_seqlens, packed, positions_of
from fastlm.models.rope import Rope

NUM_DISTANCES, FURTHEST = 32, 128  # of relative positions


@dataclasses.dataclass
class Hidden:
    """Hidden states of a batch, and where its tokens are."""

    x: Tensor  # (1, real tokens, width) of a packed batch, or (batch, tokens, width)
    padding: Padding
    shared_table: Tensor  # see layers.SharedTable

    def padded(self, x: Tensor) -> Tensor:
        """x, which has the rows of self.x, as (batch, tokens, width) with 0 at padding."""
        padding = self.padding
        if isinstance(padding, Packed):
            size = padding.batch, padding.tokens
            return Scatter.apply(x.flatten(0, -2), padding.index, size[0] * size[1]).view(*size, x.shape[-1])
        x = x.view(*self.x.shape[:2], x.shape[-1])
        return x if padding is None else x.masked_fill(~padding[..., None], 0)

    def packed(self) -> tuple[Tensor, Tensor]:
        """See Encoder.encode_packed."""
        rows, padding = self.x.flatten(0, 1), self.padding
        if isinstance(padding, Packed):
            return rows, padding.cu_seqlens
        if padding is not None:
            found = packed(padding, int(padding.sum()))
            return Gather.apply(rows, found.index), found.cu_seqlens
        batch, tokens, _ = self.x.shape
        return rows, torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=rows.device)

    def first(self) -> Tensor:
        """Of each sequence, the hidden state of its first real token: (batch, width)."""
        x, padding = self.x, self.padding
        if isinstance(padding, Packed):
            return Gather.apply(x[0], padding.cu_seqlens[:-1].long())
        if padding is None:
            return x[:, 0]
        return x[torch.arange(x.shape[0], device=x.device), padding.int().argmax(1)]

    def mean(self, x: Tensor) -> Tensor:
        """Of each sequence, the mean of x, which has the rows of self.x, over the real tokens: (batch, width)."""
        padding = self.padding
        if isinstance(padding, Packed):
            lengths = padding.cu_seqlens.diff().tolist()
            return torch.stack([rows.mean(0) for rows in x[0].split(lengths)])
        if padding is None:
            return x.mean(1)
        return x.masked_fill(~padding[..., None], 0).sum(1) / padding.sum(1, keepdim=True)

    def labels(self, labels: Tensor) -> Tensor:
        """The labels (batch, tokens) of the rows of self.x; those of padding are left out or ignored."""
        padding = self.padding
        if isinstance(padding, Packed):
            return labels.flatten()[padding.index]
        return (labels if padding is None else labels.masked_fill(~padding, inputs.IGNORE_INDEX)).flatten()


class Encoder(PretrainedModel):
    """An encoder: bidirectional attention. Its subclasses differ in their heads: EncoderModel, EncoderForMaskedLM,
    EncoderForSequenceClassification, EncoderForTokenClassification.

    Encoder.from_pretrained(directory) returns the model with the head that `architectures` in config.json names, or
    without a head if config.json has none; another head is an error that lists those of the family. The subclasses load
    themselves whatever the file says: EncoderForSequenceClassification.from_pretrained(directory,
    initialise=("classifier",)) adds a new classifier.

    The config's class describes the family, see EncoderConfig; from_pretrained takes it from config.json. Modules and
    parameters have the names that they have in transformers.

    With an attention_mask, padding is not computed. A sequence may have its padding on any side. What a head reads as
    the first token of a sequence is the first real one.
    """

    config_class = EncoderConfig
    head_name: ClassVar[str | None]
    suffix: ClassVar[str]  # of the class's name in transformers

    def __init__(self, config: EncoderConfig) -> None:
        if type(self) is Encoder:
            names = ", ".join(c.__name__ for c in CLASSES)
            raise TypeError(f"Encoder: expected one of its subclasses {names}, or Encoder.from_pretrained")
        super().__init__(config)

    @classmethod
    def class_for(cls, directory: Path, config: Any) -> type[PretrainedModel]:
        if cls is not Encoder:
            return cls
        path = stored(directory, CONFIG)
        config = EncoderConfig.from_pretrained(directory) if config is None else config
        architectures = read_json(path).get("architectures")
        if not isinstance(architectures, list | None) or not all(isinstance(x, str) for x in architectures or ()):
            raise ValueError(f"{path}: architectures: expected a list of names, got {architectures!r}")
        if not architectures:
            return EncoderModel
        known = classes_of(type(config))
        for name in architectures:
            if name in known:
                return known[name]
        got = f"{', '.join(architectures)}{did_you_mean(architectures[0], known)}"
        raise ValueError(f"{path}: architectures: expected one of {', '.join(known)}, got {got}")

    @property
    def architecture(self) -> str:
        return f"{self.config.family}{self.suffix}"

    def prefix(self) -> str:
        return str(self.config.layout.prefix)

    @torch.no_grad()
    def initialise(self, root: nn.Module) -> None:
        super().initialise(root)
        names = {module: name for name, module in self.named_modules()}
        for module in root.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and (found := self.config.initial(names[module])):
                draw_normal(module.weight, *found)

    @property
    def base_model(self) -> "EncoderModel":
        """The model without its head."""
        raise NotImplementedError

    def encode_packed(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The hidden states of the real tokens alone, for a pooling that needs no padding.

        The arguments are those of EncoderModel.

        Returns:
            (rows, cu_seqlens): rows (real tokens, width), one sequence after another; cu_seqlens (batch + 1,) in int32:
            sequence b has the rows cu_seqlens[b] to cu_seqlens[b + 1] − 1. Its first token is rows[cu_seqlens[:-1]],
            its last rows[cu_seqlens[1:] − 1].
        """
        return self.base_model.run(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds).packed()


class EncoderModel(Encoder):
    """An encoder without a head: token ids → hidden states after the last layer, and the pooled output."""

    head_name = None
    suffix = "Model"

    def __init__(self, config: EncoderConfig, add_pooling_layer: bool | None = None) -> None:
        """add_pooling_layer: whether to have the family's pooler; None: as in transformers."""
        super().__init__(config)
        layout = config.layout
        width, words = config.hidden_size, config.setting(layout.embedding_width)
        place(self, layout.words, Embedding(config.vocab_size, words, padding_idx=config.pad_token_id))
        if layout.learned_positions is not None:
            unused = config.pad_token_id if layout.positions_after_padding else None
            place(self, layout.learned_positions, Embedding(config.max_position_embeddings, words, padding_idx=unused))
        self.types = layout.types if getattr(config, "type_vocab_size", 0) else None
        if self.types is not None:
            place(self, self.types, Embedding(config.type_vocab_size, words))
        if layout.embedding_norm is not None:
            place(self, layout.embedding_norm, new_norm(config, words))
        self.embedding_pdrop = config.setting(layout.embedding_dropout)
        self.embedding_projection = layout.embedding_projection if words != width else None
        if self.embedding_projection is not None:
            place(self, self.embedding_projection, Linear(words, width))
        if layout.relative_bias is not None:
            place(self, layout.relative_bias, Embedding(NUM_DISTANCES, config.num_attention_heads))
        count = range(config.num_hidden_layers)
        place(self, layout.layers, nn.ModuleList([EncoderLayer(config, layer) for layer in count]))
        if layout.final_norm is not None:
            place(self, layout.final_norm, new_norm(config, width))
        wanted = layout.has_pooler if add_pooling_layer is None else check_flag("add_pooling_layer", add_pooling_layer)
        self.pooler_path = layout.pooler if wanted else None
        if self.pooler_path is not None:
            place(self, self.pooler_path, Linear(width, width))
        elif layout.pooler is not None:
            self.register_module(layout.pooler.partition(".")[0], None)
        self.kinds = [config.layer_type(layer) for layer in count]
        self.ropes = {kind: Rope(config, kind) for kind in dict.fromkeys(self.kinds)} if layout.rotary else {}
        self.has_windows = any(config.window(layer) is not None for layer in count)
        self.initialise(self)

    @property
    def base_model(self) -> "EncoderModel":
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> ModelOutput:
        """The arguments have Hugging Face's names and meaning.

        Args:
            input_ids: (batch, tokens), or inputs_embeds: (batch, tokens, width of the embeddings).
            attention_mask: (batch, tokens), 0 at padding. Every row has a real token.
            token_type_ids: (batch, tokens), of families with token types; None: all 0.
            position_ids: (batch, tokens); None: as the family counts them.
            cu_seqlens: (sequences + 1,), int32 or int64: 0, then where each of the packed sequences ends in
                batch · tokens; each row begins with a new one. Attention does not cross the boundaries, and positions
                count from them. Excludes attention_mask.

        Returns:
            An output with last_hidden_state (batch, tokens, hidden_size), 0 at padding; and pooler_output, if the
            model has a pooler.
        """
        hidden = self.run(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, cu_seqlens)
        pooled = None if self.pooler_path is None else self.pool(hidden)
        return ModelOutput(hidden.padded(hidden.x), pooled)

    def pool(self, hidden: Hidden) -> Tensor:
        return torch.tanh(part(self, self.pooler_path)(hidden.first()))

    def run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> Hidden:
        config, layout = self.config, self.config.layout
        words = part(self, layout.words)
        device, context = words.weight.device, config.context
        batch, tokens = inputs.check_tokens(input_ids, inputs_embeds, words.weight, 0, context)
        if token_type_ids is not None:
            if self.types is None:
                raise mismatch("token_type_ids", f"None, as {config.model_type} has no token types", "a tensor")
            below = config.type_vocab_size
            inputs.check_ids("token_type_ids", token_type_ids, below=below, device=device, shape=(batch, tokens))
        if cu_seqlens is not None:
            check_alone(attention_mask=attention_mask)
            if layout.relative_bias is not None:
                raise mismatch("cu_seqlens", f"None, as {config.model_type} has relative positions", "a tensor")
            cu_seqlens = check_cu_seqlens(cu_seqlens, batch, tokens, device)
            if position_ids is None:
                first = config.pad_token_id + 1 if layout.positions_after_padding else 0
                position_ids = positions_of(cu_seqlens, batch, tokens) + first
        if position_ids is not None:
            below = config.max_position_embeddings
            inputs.check_ids("position_ids", position_ids, below=below, device=device, shape=(batch, tokens))
        elif layout.positions_after_padding:
            position_ids = positions_after_padding(config.pad_token_id, input_ids, tokens, device)
        mask = inputs.key_padding_mask(attention_mask, batch, tokens, device)
        padding = self.pack(mask, input_ids if inputs_embeds is None else inputs_embeds)
        if cu_seqlens is not None:
            padding = Packed(cu_seqlens, torch.arange(batch * tokens, device=device), batch, tokens)

        tables = {kind: self.tables(rope, position_ids, tokens, padding) for kind, rope in self.ropes.items()}
        if isinstance(padding, Packed):
            index = padding.index
            if layout.learned_positions is not None:
                position_ids = index % tokens if position_ids is None else real(position_ids, padding)
                position_ids = position_ids.view(1, -1)
            if input_ids is not None:
                input_ids = real(input_ids, padding)[None]
            if token_type_ids is not None:
                token_type_ids = real(token_type_ids, padding)[None]
            if inputs_embeds is not None:
                inputs_embeds = Gather.apply(inputs_embeds.flatten(0, 1), index)[None]
        x, table = embed_tokens(words, input_ids, inputs_embeds)
        x = self.embed(x, token_type_ids, position_ids, is_scaled=inputs_embeds is None)
        bias = None
        if layout.relative_bias is not None:
            bias = part(self, layout.relative_bias)(distances(tokens, device)).permute(2, 0, 1)[None]
        x, residual = self.run_layers(x, tables, padding, bias)
        if layout.final_norm is not None:
            x, _ = part(self, layout.final_norm)(x, residual)
        return Hidden(x, padding, table)

    def run_layers(
        self, x: Tensor, tables: dict[str, tuple[Tensor, Tensor]], padding: Padding, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(x, residual) after the last layer."""
        layers, residual = part(self, self.config.layout.layers), None
        if not tables and bias is None and not isinstance(padding, Tensor) and self.may_skip_layers(layers, x):
            described = description_of(layers, describe).layers(layers)
            y = None if described is None else encode_layers(described, x, padding)
            if y is not None:
                return y, None
        for layer, kind in zip(layers, self.kinds, strict=True):
            x, residual = self.run_layer(layer, x, residual, tables.get(kind), padding, bias)
        return x, residual

    def may_skip_layers(self, layers: nn.ModuleList, x: Tensor) -> bool:
        calls_layers = type(self).run_layer is RUN_LAYER and "run_layer" not in vars(self)
        return calls_layers and len(layers) == len(self.kinds) and may_skip_modules(x)

    def pack(self, mask: Tensor | None, given: Tensor | None) -> Padding:
        """How a batch is packed, or the mask if it runs with padding; None without padding."""
        if mask is None or mask.numel() == 0 or needs_custom_op(mask, given):
            return mask
        lengths = mask.sum(1)
        begins = mask[:, 0] + (mask[:, 1:] > mask[:, :-1]).sum(1)  # of each row, the number of parts without padding
        real, shortest, parts = torch.stack([lengths.sum(), lengths.min(), begins.max()]).tolist()
        if shortest == 0:
            got = f"none in row {int(lengths.argmin())}"
            raise mismatch("attention_mask", "at least one real token in every row", got)
        if real == mask.numel():
            return None
        # Packing would change the distances across padding between real tokens, which a window needs.
        return mask if self.has_windows and parts > 1 else packed(mask, real)

    def tables(self, rope: Rope, position_ids: Tensor | None, tokens: int, padding: Padding) -> tuple[Tensor, Tensor]:
        if position_ids is None:
            position_ids = torch.arange(tokens, device=self.device)[None]
        cos, sin = rope.tables(position_ids)
        if isinstance(padding, Packed):
            index = padding.index % tokens if position_ids.shape[0] == 1 else padding.index
            cos, sin = (table.flatten(0, 1)[index][None] for table in (cos, sin))
        return (cos.double(), sin.double()) if self.dtype == torch.float64 else (cos, sin)

    def embed(self, x: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None, is_scaled: bool) -> Tensor:
        layout = self.config.layout
        if layout.scaled_words and is_scaled:
            x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)  # rounded, as in transformers
        if self.types is not None:
            x = x + embed(part(self, self.types), token_type_ids, slice(0, 1))
        if layout.learned_positions is not None:
            x = x + embed(part(self, layout.learned_positions), position_ids, slice(0, x.shape[1]))
        if layout.embedding_norm is not None:
            x = part(self, layout.embedding_norm)(x)[0]
        x = F.dropout(x, self.embedding_pdrop, self.training)
        return x if self.embedding_projection is None else part(self, self.embedding_projection)(x)


RUN_LAYER = EncoderModel.run_layer  # it calls the layer and nothing else; a caller may replace it


def real(x: Tensor, padding: Packed) -> Tensor:
    """The values of the real tokens of x: (batch or 1, tokens)."""
    return x.expand(padding.batch, padding.tokens).flatten()[padding.index]


def positions_after_padding(pad_token_id: int, input_ids: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """RoBERTa's positions: pad_token_id at padding tokens, and from pad_token_id + 1 on at the others."""
    if input_ids is None:
        return torch.arange(pad_token_id + 1, pad_token_id + 1 + tokens, device=device)[None]
    is_real = (input_ids != pad_token_id).long()
    return is_real.cumsum(1) * is_real + pad_token_id


def distances(tokens: int, device: torch.device) -> Tensor:
    """Of each query and key, T5's number of their distance (Raffel et al., 2019, arXiv:1910.10683): (tokens, tokens).

    Keys behind the query have the second half of the numbers. In a half, short distances have one each, and the others
    share the rest by their logarithm, up to FURTHEST.
    """
    positions = torch.arange(tokens, device=device)
    distance = positions[None] - positions[:, None]
    half = NUM_DISTANCES // 2
    exact, size = half // 2, distance.abs()
    share = torch.log(size.clamp(min=1).float() / exact) / math.log(FURTHEST / exact)
    far = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(size < exact, size, far) + half * (distance > 0)


class EncoderWithHead(Encoder):
    """Holds the model without a head under the name that it has in transformers, and the modules of the head."""

    base_class: ClassVar[type[EncoderModel]] = EncoderModel

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        if self.head_name not in config.heads:
            got = f"{config.family}, which has {', '.join(classes_of(type(config)))}"
            raise mismatch("config", f"one of a family with {self.suffix}", got)
        self.description = head = config.heads[str(self.head_name)]
        self.add_module(config.layout.prefix, self.base_class(config, add_pooling_layer=head.pooled))
        setting, width = config.setting, config.hidden_size
        if head.dense is not None:
            dense_width = setting(head.dense_width)
            place(self, head.dense, Linear(width, dense_width, bias=setting(head.dense_bias)))
            width = dense_width
        if head.norm is not None:
            place(self, head.norm, new_norm(config, width))
        # A tied weight is replaced by the embedding's, so none is allocated.
        device = "meta" if config.tie_word_embeddings and self.ties() else None
        output = Linear(width, self.num_outputs, bias=False, device=device)
        if setting(head.output_bias):
            output.bias = nn.Parameter(torch.empty(self.num_outputs))
        place(self, head.output, output)
        if head.bias is not None:
            owner, _, name = head.bias.rpartition(".")
            self.get_submodule(owner).register_parameter(name, nn.Parameter(torch.empty(self.num_outputs)))
        for path in (head.dense, head.norm, head.output):
            if path is not None:
                self.initialise(part(self, path))
        self.activation = HEAD_ACTIVATIONS[setting(head.activation)]
        self.input_pdrop, self.pdrop = setting(head.input_dropout), setting(head.dropout)
        self.tie_weights()

    @torch.no_grad()
    def initialise(self, root: nn.Module) -> None:
        super().initialise(root)
        if self.description.bias is not None:
            self.get_parameter(self.description.bias).zero_()

    @property
    def num_outputs(self) -> int:
        return int(self.config.num_labels)

    @property
    def base_model(self) -> EncoderModel:
        found: EncoderModel = self._modules[self.config.layout.prefix]  # type: ignore[assignment]
        return found

    def transformed(self, x: Tensor, hidden: Hidden | None = None) -> Tensor:
        """The input of the output projection. hidden: pools after the activation."""
        head = self.description
        x = F.dropout(x, self.input_pdrop, self.training)
        if head.dense is not None:
            x = FUNCTIONS[self.activation](part(self, head.dense)(x))
        if hidden is not None:
            x = hidden.mean(x)
        if head.norm is not None:
            x = part(self, head.norm)(x)[0]
        return F.dropout(x, self.pdrop, self.training)


class TokenHead(EncoderWithHead):
    """A head on every token."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> HeadOutput:
        """The arguments of EncoderModel, and labels: (batch, tokens), or -100 where there is none. Labels at padding
        are ignored.

        Returns:
            An output with logits (batch, tokens, outputs), 0 at padding; with labels also the loss. In training mode
            with labels it is computed without materialising the logits, which are then None, and the head runs on the
            labelled tokens only.
        """
        hidden = self.base_model.run(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, cu_seqlens)
        x = hidden.x
        if labels is not None:
            padding = hidden.padding
            shape = (padding.batch, padding.tokens) if isinstance(padding, Packed) else tuple(x.shape[:2])
            inputs.check_ids(
                "labels",
                labels,
                below=self.num_outputs,
                device=x.device,
                shape=shape,
                ignore_index=inputs.IGNORE_INDEX,
            )
            labels = hidden.labels(labels)
            # Selecting rows needs their number, which on a GPU synchronises and under torch.compile breaks the graph.
            if self.training and x.device.type == "cpu" and not needs_custom_op(x, labels):
                labelled = (labels != inputs.IGNORE_INDEX).nonzero()[:, 0]
                x, labels = Gather.apply(x.flatten(0, 1), labelled), labels[labelled]
        output = part(self, self.description.output)
        is_tied = output.weight is part(self.base_model, self.config.layout.words).weight
        weight = hidden.shared_table if is_tied else output.weight
        loss, logits = loss_and_logits(self.transformed(x), weight, output.bias, labels, self.training)
        return HeadOutput(loss, None if logits is None else hidden.padded(logits))


class EncoderForMaskedLM(TokenHead):
    """An encoder with the masked-token head. labels: the original token at masked positions, else -100."""

    head_name = "MaskedLM"
    suffix = "ForMaskedLM"

    @property
    def num_outputs(self) -> int:
        return int(self.config.vocab_size)

    def ties(self) -> Mapping[str, str]:
        head, layout = self.description, self.config.layout
        tied = {f"{head.output}.weight": f"{layout.prefix}.{layout.words}.weight"}
        return tied if head.bias is None else {**tied, f"{head.output}.bias": head.bias}


class EncoderForTokenClassification(TokenHead):
    """An encoder with a classifier of tokens. labels: one of num_labels classes, or -100."""

    head_name = "TokenClassification"
    suffix = "ForTokenClassification"


class EncoderForSequenceClassification(EncoderWithHead):
    """An encoder with a classifier of sequences. It pools the real tokens alone."""

    head_name = "SequenceClassification"
    suffix = "ForSequenceClassification"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> HeadOutput:
        """The arguments of EncoderModel, and labels. config.problem_type, or else the labels, select the loss:

        - integers (batch,): one of num_labels classes; cross-entropy, in training mode without materialised logits.
        - floating point (batch,), with num_labels = 1: regression; mean squared error.
        - floating point (batch, num_labels): independent labels; mean binary cross-entropy.

        Returns:
            An output with logits (batch, num_labels); with labels also the loss.
        """
        check_labels(labels)
        base, head = self.base_model, self.description
        hidden = base.run(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        pooling = POOLINGS.get(name := self.config.setting(head.pooling), name)
        if head.pooled:
            x = self.transformed(base.pool(hidden))
        elif pooling == "late":
            x = self.transformed(hidden.x, hidden)
        else:
            x = self.transformed(hidden.first() if pooling == "first" else hidden.mean(hidden.x))
        return classify(x, part(self, head.output), labels, self.config, self.training)


CLASSES: tuple[type[Encoder], ...] = (
    EncoderModel,
    EncoderForMaskedLM,
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
)


def classes_of(config: type[EncoderConfig]) -> dict[str, type[Encoder]]:
    """The classes for a family, by their names in transformers."""
    found = {f"{config.family}{c.suffix}": c for c in CLASSES if c.head_name is None or c.head_name in config.heads}
    if "BertForMaskedLM" in found:
        found["BertForPreTraining"] = EncoderForMaskedLM  # the original BERT checkpoints: one more head, not loaded
    return found
