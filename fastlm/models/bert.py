"""BERT (Devlin et al., 2018, arXiv:1810.04805) by its names in transformers: Encoder with a BertConfig."""

from fastlm.models.encoder import EncoderForMaskedLM, EncoderForSequenceClassification, EncoderModel
from fastlm.models.encoder_families import BertConfig


class BertModel(EncoderModel):
    """BERT without a head: token ids → hidden states after the last layer, and the pooled output."""

    config_class = BertConfig
    base_model_prefix = "bert"


class BertForMaskedLM(EncoderForMaskedLM):
    """BERT with the masked-token head. labels: the original token at masked positions, else -100."""

    config_class = BertConfig
    base_model_prefix = "bert"
    base_class = BertModel


class BertForSequenceClassification(EncoderForSequenceClassification):
    """BERT with a linear classifier on the pooled output."""

    config_class = BertConfig
    base_model_prefix = "bert"
    base_class = BertModel
