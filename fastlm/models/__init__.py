"""GPT-2, BERT, and decoders and encoders of today's families on fastlm's operators.

They read and write Hugging Face checkpoints and use the same parameter and argument names; transformers is not needed.
"""

from fastlm.models.auto import load_model
from fastlm.models.bert import BertForMaskedLM, BertForSequenceClassification, BertModel
from fastlm.models.config import GPT2Config
from fastlm.models.decoder import CausalLM, DecoderModel
from fastlm.models.decoder_config import (
    DecoderConfig,
    Gemma2Config,
    Gemma3Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from fastlm.models.encoder import (
    Encoder,
    EncoderForMaskedLM,
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
    EncoderModel,
)
from fastlm.models.encoder_config import EncoderConfig
from fastlm.models.encoder_families import (
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
)
from fastlm.models.gpt2 import GPT2LMHeadModel, GPT2Model
from fastlm.models.rope import rope_tables
from fastlm.models.rotary_encoder_families import (
    EuroBertConfig,
    Gemma3EncoderConfig,
    GteConfig,
    JinaEmbeddingsV3Config,
    ModernBertConfig,
    NomicBertConfig,
)

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertModel",
    "CausalLM",
    "DecoderConfig",
    "DecoderModel",
    "DistilBertConfig",
    "ElectraConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderForMaskedLM",
    "EncoderForSequenceClassification",
    "EncoderForTokenClassification",
    "EncoderModel",
    "EuroBertConfig",
    "GPT2Config",
    "GPT2LMHeadModel",
    "GPT2Model",
    "Gemma2Config",
    "Gemma3Config",
    "Gemma3EncoderConfig",
    "GteConfig",
    "JinaEmbeddingsV3Config",
    "LlamaConfig",
    "MPNetConfig",
    "MistralConfig",
    "ModernBertConfig",
    "NomicBertConfig",
    "Qwen2Config",
    "Qwen3Config",
    "RobertaConfig",
    "SmolLM3Config",
    "XLMRobertaConfig",
    "load_model",
    "rope_tables",
]
