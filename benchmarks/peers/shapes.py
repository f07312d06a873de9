"""Directories of models with random weights, in shapes that people run, for a tokenizer that is at hand.

A library's speed does not depend on the weights. Every peer can convert a BERT; not all of them a ModernBERT.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

# What differs from BERT base, or from ModernBERT base. bge-m3 is an XLM-RoBERTa, which computes the same.
SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": {},
    "bge-m3": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "modernbert": {},
    "reranker": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
KINDS = {
    "reranker": ("BertForSequenceClassification", "BertConfig"),
    "modernbert": ("ModernBertModel", "ModernBertConfig"),
}
MAX_LENGTHS = {"bert-base": 128, "bge-m3": 512, "reranker": 512, "modernbert": 2048}


def write(shape: str, like: Path, out: Path, **sizes: Any) -> Path:
    """A directory with the tokenizer and the pooling of the SentenceTransformer in `like`.

    sizes: replace those of the shape.
    """
    torch.manual_seed(0)
    names = ["input_ids", "attention_mask"]  # of both texts of a pair the same type
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(like), model_input_names=names)
    kind, config = KINDS.get(shape, ("BertModel", "BertConfig"))
    described: dict[str, Any] = {"position_embedding_type": "absolute"}  # CTranslate2's converter reads it
    if shape == "modernbert":
        ids = {"pad": tokenizer.pad_token_id, "cls": tokenizer.cls_token_id, "sep": tokenizer.sep_token_id}
        described = {f"{name}_token_id": i for name, i in {**ids, "bos": ids["cls"], "eos": ids["sep"]}.items()}
    described |= {"vocab_size": len(tokenizer), "num_labels": 1, **SHAPES[shape], **sizes}
    getattr(transformers, kind)(getattr(transformers, config)(**described)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.copy(like / "modules.json", out)
    for module in json.loads((like / "modules.json").read_text(encoding="utf-8"))[1:]:
        if (settings := like / module["path"] / "config.json").exists():
            (out / module["path"]).mkdir(exist_ok=True)
            shutil.copy(settings, out / module["path"])
    settings = {"max_seq_length": MAX_LENGTHS[shape], "do_lower_case": False}
    (out / "sentence_bert_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return out


def is_reranker(directory: Path) -> bool:
    names = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    return names[0].endswith("ForSequenceClassification")
