"""GPT-2 and BERT on fastlm's operators.

They read and write Hugging Face checkpoints and use the same parameter and argument names; transformers is not needed.
"""

from fastlm.models.auto import load_model
from fastlm.models.bert import BertForMaskedLM, BertForSequenceClassification, BertModel
from fastlm.models.config import BertConfig, GPT2Config
from fastlm.models.gpt2 import GPT2LMHeadModel, GPT2Model
from fastlm.models.rope import rope_tables

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertModel",
    "GPT2Config",
    "GPT2LMHeadModel",
    "GPT2Model",
    "load_model",
    "rope_tables",
]
