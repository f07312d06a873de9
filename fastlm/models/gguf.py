"""Reads GGUF, llama.cpp's file format, into a directory in Hugging Face's format. Needs the package `gguf`.

Weights in blocks of few bits are widened to float32, which holds them exactly.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.core.errors import did_you_mean, mismatch
from fastlm.models import checkpoint
from fastlm.models.decoder_config import BY_MODEL_TYPE, DecoderConfig

# GGUF's name of an architecture → model_type, and whether its query and key rows are stored for interleaved positions.
ARCHITECTURES = {"llama": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
# GGUF's name of a tensor, without the number of its layer → the parameter.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# How a text is split before byte-level BPE, by the name of GGUF's pre-tokenizer: a pattern, or how many digits stay
# together with GPT-2's.
DIGITS = {"smollm": True, "gpt-2": False, "default": False}
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"qwen2": PATTERN % r"\p{N}", "llama-bpe": PATTERN % r"\p{N}{1,3}"}
CONTROL = 3  # the type of a token that is no text


def convert_gguf(file: str | Path, directory: str | Path) -> DecoderConfig:
    """Writes config.json, model.safetensors and the tokenizer of a GGUF file; returns the config.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged, or has an architecture, a setting or a tokenizer
            that is not supported. The message is one line that names it.
    """
    path = Path(file)
    reader = open_gguf(path)
    try:
        config, tensors, tokenizer = read_config(reader), read_tensors(reader), read_tokenizer(reader)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    settings = {**config.to_dict(), "architectures": [config.architecture], "dtype": "float32"}
    with checkpoint.staged(Path(directory)) as folder:
        checkpoint.write(tensors, settings, tied={}, folder=folder)
        for name, content in tokenizer.items():
            (folder / name).write_text(content, encoding="utf-8")
    return config


def open_gguf(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("gguf: expected the package of that name, which reads GGUF: pip install gguf") from None
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected one in GGUF format")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # a damaged file raises many types of error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: truncated or not GGUF ({reason})") from None


def field(reader: Any, name: str, default: Any = None) -> Any:
    found = reader.fields.get(name)
    return default if found is None else found.contents()


def read_config(reader: Any) -> DecoderConfig:
    architecture = field(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        got = f"{architecture!r}{did_you_mean(architecture, ARCHITECTURES)}"
        raise mismatch("general.architecture", f"one of {', '.join(ARCHITECTURES)}", got)

    def setting(name: str, default: Any = None) -> Any:
        value = field(reader, f"{architecture}.{name}", default)
        if value is None:
            raise mismatch(f"{architecture}.{name}", "a value", "none")
        return value

    names = {tensor.name for tensor in reader.tensors}
    scaling = setting("rope.scaling.type", "none")
    if scaling not in ("none", "linear") or "rope_freqs.weight" in names:
        got = "frequencies of its own" if scaling == "none" else repr(scaling)
        raise mismatch(f"{architecture}.rope.scaling.type", "none or linear", got)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(setting("rope.freq_base", 10000.0))}
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": float(setting("rope.scaling.factor"))}
    width, heads = int(setting("embedding_length")), int(setting("attention.head_count"))
    vocab_size = next((int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"), None)
    if vocab_size is None:
        raise mismatch("token_embd.weight", "a tensor of that name", "none")
    epsilon = torch.tensor(float(setting("attention.layer_norm_rms_epsilon")), dtype=torch.float32)
    return BY_MODEL_TYPE[ARCHITECTURES[architecture][0]].from_dict(
        {
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": int(setting("feed_forward_length")),
            "num_hidden_layers": int(setting("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(setting("attention.head_count_kv", heads)),
            "head_dim": int(setting("attention.key_length", width // heads)),
            "max_position_embeddings": int(setting("context_length")),
            "rms_norm_eps": float(f"{epsilon.item():.6g}"),  # the decimal number that was rounded to float32
            "attention_bias": architecture != "qwen2" and "blk.0.attn_q.bias" in names,
            "tie_word_embeddings": "output.weight" not in names,
            "rope_parameters": rope,
            "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
            "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
            "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
        }
    )


def read_tensors(reader: Any) -> dict[str, Tensor]:
    """The parameters by Hugging Face's names, in float32."""
    from gguf import dequantize

    architecture = field(reader, "general.architecture")
    interleaved = ARCHITECTURES[architecture][1]
    heads = int(field(reader, f"{architecture}.attention.head_count"))
    num_kv_heads = int(field(reader, f"{architecture}.attention.head_count_kv", heads))
    found = {}
    for tensor in reader.tensors:
        stem, _, kind = tensor.name.rpartition(".")
        layer = ""
        if stem.startswith("blk."):
            _, number, stem = stem.split(".", 2)
            layer = f"model.layers.{number}."
        if stem not in NAMES:
            raise mismatch("tensors", f"names of {', '.join(NAMES)}", repr(tensor.name))
        try:
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        except NotImplementedError:
            raise mismatch(tensor.name, "a type of weights that gguf can widen", tensor.tensor_type.name) from None
        if interleaved and stem in ("attn_q", "attn_k"):
            values = rotated_by_halves(values, heads if stem == "attn_q" else num_kv_heads)
        found[f"{layer}{NAMES[stem]}.{kind}"] = values.contiguous()
    return found


def rotated_by_halves(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates channels 2i and 2i + 1 of a head together, transformers i and i + head_dim / 2."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def read_tokenizer(reader: Any) -> dict[str, str]:
    """The contents of tokenizer.json and tokenizer_config.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    kind, pre = field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise mismatch("tokenizer.ggml.model", "gpt2, which is byte-level BPE", repr(kind))
    if pre not in DIGITS and pre not in PATTERNS:
        raise mismatch("tokenizer.ggml.pre", f"one of {', '.join((*DIGITS, *PATTERNS))}", repr(pre))
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in field(reader, "tokenizer.ggml.merges", [])]
    try:
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    except Exception as error:  # the library raises plain Exception
        reason = str(error).partition("\n")[0]
        raise mismatch("tokenizer.ggml", "tokens and merges of byte-level BPE", repr(reason)) from None
    if pre in PATTERNS:
        split = pre_tokenizers.Split(Regex(PATTERNS[pre]), "isolated")
        parts = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if DIGITS[pre] else []
        parts = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, of in zip(tokens, types or [], strict=False) if of == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    options: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("bos", "eos", "unk", "pad"):
        stored = {"unk": "unknown", "pad": "padding"}.get(name, name)
        number = field(reader, f"tokenizer.ggml.{stored}_token_id")
        if number is not None:
            options[f"{name}_token"] = tokens[number]
    if template := field(reader, "tokenizer.chat_template"):
        options["chat_template"] = template
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(options, indent=2, ensure_ascii=False) + "\n",
    }
