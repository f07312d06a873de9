"""Damaged checkpoints and tokenizers: loading one works, or raises a one-line error that names the file.

It neither crashes nor hangs nor takes all memory. Every case is generated from its number alone. FASTLM_TEST_FUZZ sets
how many run: a number, or "all" for what runs at night, under the sanitizers too.
"""

import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import warnings
import zipfile

import pytest
import torch

from fastlm.generation import load_tokenizer
from fastlm.models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, load_model
from fastlm.models.language_model import LanguageModel
from fastlm.training.tokenizers import byte_tokenizer, char_tokenizer

CASES = {"": 400, "all": 100_000}
COUNT = CASES.get(wanted := os.environ.get("FASTLM_TEST_FUZZ", "")) or int(wanted)
SHARES = max(1, COUNT // 5000)  # of the cases of one kind: tests that can run at the same time
SECONDS = 20  # for one case
MEMORY = 2**31  # bytes that the cases may take
TEXT = "Héllo wörld, it's 12 o'clock.\n  [MASK] the cats 東"
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")  # its shadow memory is larger than any limit

VALUES = [
    *(None, True, False, "", "x", "gelu", "0", [], {}, [0], [None], {"a": 1}, [[]] * 3),
    *(-1, 0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**30, -(2**63)),
    *(0.5, -0.5, 1.5, 1e-320, 1e-40, 1e38, 1e39, 1e308, float("inf"), float("nan")),
    *("\ud800", "é" * 50, "F32", "I64", "BOOL", "F8_E4M3", "BPE", "WordLevel", "[UNK]", "(a*)*b", "\0"),
]


def flip_bits(rng, data):
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(min(len(data), rng.choice((16, 256, 2**40))))
        data[place] ^= 1 << rng.randrange(8)
    return data


def truncate(rng, data):
    return data[: rng.randrange(min(len(data), rng.choice((16, 256, 2**40))))]


def overwrite(rng, data):
    value = rng.choice((0, 1, 0x7F, 0xFF, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1))
    packed = struct.pack(rng.choice("<>") + "Q", value)[: rng.choice((1, 2, 4, 8))]
    place = rng.randrange(min(len(data), rng.choice((16, 256, 2**40))))
    data[place : place + len(packed)] = packed
    return data


def insert_or_delete(rng, data):
    place, size = rng.randrange(len(data)), rng.choice((1, 2, 8, 100))
    data[place : place + rng.choice((0, size))] = bytes(rng.randrange(256) for _ in range(rng.choice((0, size))))
    return data


def swap_blocks(rng, data):
    size = min(rng.choice((1, 8, 64)), len(data) // 2)
    first, second = sorted(rng.randrange(len(data) - size + 1) for _ in range(2))
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )
    return data


def in_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        if data:
            data = rng.choice((flip_bits, flip_bits, truncate, overwrite, insert_or_delete, swap_blocks))(rng, data)
    return bytes(data)


def containers(value):
    """All objects and lists inside a JSON value."""
    if isinstance(value, (dict, list)):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from containers(part)


def change_value(rng, root):
    full = [c for c in containers(root) if c]
    chosen = rng.choice(full)
    key = rng.choice(list(chosen) if isinstance(chosen, dict) else range(len(chosen)))
    kind = rng.randrange(6)
    if kind == 0:
        del chosen[key]
    elif kind == 1 and isinstance(chosen, dict):
        chosen[rng.choice((key + "x", "", "vocab_size", key.upper()))] = chosen.pop(key)
    elif kind == 2:
        other = rng.choice(full)
        place = rng.choice(list(other) if isinstance(other, dict) else range(len(other)))
        chosen[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(chosen[key])
    elif kind == 3 and isinstance(chosen[key], (int, float)):
        chosen[key] = chosen[key] * rng.choice((-1, 2, 10**9)) + rng.choice((-1, 0, 1))
    else:
        chosen[key] = copy.deepcopy(rng.choice(VALUES))


def in_json(rng, data):
    root = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if any(containers(root)):
            change_value(rng, root)
    if rng.randrange(200) == 0:
        return b"[" * 100_000
    return json.dumps(root).encode("utf-8", "surrogatepass")


def in_header(rng, data):
    """Of a safetensors file: a valid length, a changed description of the tensors."""
    (size,) = struct.unpack("<Q", data[:8])
    header = in_json(rng, data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def in_pickle(rng, data):
    """Of PyTorch's zip format: a valid archive with a changed pickle."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.namelist():
            content = old.read(entry)
            new.writestr(entry, in_bytes(rng, content) if entry.endswith(".pkl") else content)
    return changed.getvalue()


def in_lines(rng, data):
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 2, 5))):
        place = rng.randrange(len(lines))
        lines[place] = rng.choice((b"", b"a", b"a b c", b"\xff", lines[rng.randrange(len(lines))], b"x" * 10_000))
    return b"\n".join(lines)


GPT2 = {"vocab_size": 260, "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2, "eos_token_id": None}
BERT = {"vocab_size": 260, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 16, "max_position_embeddings": 12}


def save_models(folder):
    torch.manual_seed(0)
    gpt2, bert = GPT2LMHeadModel(GPT2Config(**GPT2)), BertForMaskedLM(BertConfig(**BERT))
    for name, model in (("gpt2", gpt2), ("bert", bert)):
        model.save_pretrained(folder / name)
        for kind in ("zip", "legacy"):
            other = shutil.copytree(folder / name, folder / f"{name}-{kind}")
            (other / "model.safetensors").unlink()
            state = {key: value.detach() for key, value in model.state_dict().items()}
            torch.save(state, other / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")
    sharded = shutil.copytree(folder / "gpt2", folder / "gpt2-sharded")
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(gpt2.state_dict(), "model-00001-of-00001.safetensors")}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))


def save_tokenizers(folder):
    made = {"byte": byte_tokenizer(masked=True), "char": char_tokenizer(sorted(set(TEXT)), masked=False)}
    for name, tokenizer in made.items():
        (folder / name).mkdir()
        tokenizer.save(str(folder / name / "tokenizer.json"))
        (folder / name / "tokenizer_config.json").write_text('{"mask_token": "[MASK]", "model_max_length": 12}')
    (folder / "bpe").mkdir()
    vocabulary = {token: i for i, token in enumerate([*"Helo wrd,its12'c.k\nthe", "he", "ll", "hell", "<|endoftext|>"])}
    (folder / "bpe" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "bpe" / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\n")
    (folder / "pieces").mkdir()
    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat ##s h ##e ##l ##lo . ,".split()
    (folder / "pieces" / "vocab.txt").write_text("\n".join(pieces) + "\n")
    (folder / "pieces" / "tokenizer_config.json").write_text('{"do_lower_case": true, "mask_token": "[MASK]"}')


# What to change, and how: (directory, file, ways).
WEIGHTS = [
    *(("gpt2", "model.safetensors", (in_bytes, in_header)), ("bert", "model.safetensors", (in_bytes, in_header))),
    *(("gpt2", "config.json", (in_json, in_json, in_bytes)), ("bert", "config.json", (in_json, in_json, in_bytes))),
    *(("gpt2-zip", "pytorch_model.bin", (in_bytes, in_pickle)), ("bert-zip", "pytorch_model.bin", (in_pickle,))),
    *(("gpt2-legacy", "pytorch_model.bin", (in_bytes,)), ("bert-legacy", "pytorch_model.bin", (in_bytes,))),
    ("gpt2-sharded", "model.safetensors.index.json", (in_json, in_bytes)),
]
TOKENIZERS = [
    *((name, "tokenizer.json", (in_json, in_bytes)) for name in ("byte", "char")),
    *((name, "tokenizer_config.json", (in_json, in_bytes)) for name in ("byte", "pieces")),
    *(("bpe", "vocab.json", (in_json, in_bytes)), ("bpe", "merges.txt", (in_lines, in_bytes))),
    ("pieces", "vocab.txt", (in_lines, in_bytes)),
]


def use_model(directory):
    model = load_model(directory)
    ids = torch.tensor([[1, 2, 0]]) % model.config.vocab_size
    ids = ids[:, : model.config.max_position_embeddings]
    with torch.inference_mode():
        logits = model(ids).logits
    assert logits.shape == (*ids.shape, model.config.vocab_size)
    if all(p.isfinite().all() and p.abs().max() < 100 for p in model.parameters()):
        assert logits.isfinite().all()
        if isinstance(model, LanguageModel):
            assert model.generate(ids, 2).shape[1] > ids.shape[1]


def use_tokenizer(directory):
    tokenizer = load_tokenizer(directory)
    for text in (TEXT, "the cats", ""):
        try:
            ids = tokenizer.encode(text)
        except ValueError as error:
            assert str(error).startswith("text: expected characters of the tokenizer's vocabulary")
        else:
            assert all(isinstance(i, int) and i >= 0 for i in ids) and isinstance(tokenizer.decode(ids), str)
    assert tokenizer.vocab_size >= 0 and isinstance(tokenizer.token(1), str)


class TooSlow(BaseException):
    """Not an Exception, so that no library catches it."""


@contextlib.contextmanager
def limited():
    """Limits the memory and, by calls of signal.alarm, the time."""

    def stop(number, frame):
        raise TooSlow

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    if not SANITIZED:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def change(number, source, targets, directory):
    """Writes the case of a number into a directory; returns its description."""
    rng = random.Random(number)
    name, file, ways = rng.choice(targets)
    way = rng.choice(ways)
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(source / name, directory)
    (directory / file).write_bytes(way(rng, (source / name / file).read_bytes()))
    return f"case {number}: {name}/{file}, {way.__name__}"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize(
    "save, targets, use",
    [(save_models, WEIGHTS, use_model), (save_tokenizers, TOKENIZERS, use_tokenizer)],
    ids=["checkpoints", "tokenizers"],
)
def test_damaged_files(tmp_path, save, targets, use, share):
    source, directory = tmp_path / "source", tmp_path / "changed"
    source.mkdir()
    save(source)
    for name in {name for name, _, _ in targets}:
        use(source / name)
    numbers, failures, refused = range(share, COUNT // 2, SHARES), [], 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with limited(), warnings.catch_warnings(), open(tmp_path / "case", "w") as latest:
            warnings.simplefilter("ignore")
            for number in numbers:
                latest.seek(0)
                print(number, file=latest, flush=True)  # where a crash can be looked up
                what = change(number, source, targets, directory)
                signal.alarm(SECONDS)
                try:
                    use(directory)
                except (ValueError, OSError) as error:
                    refused += 1
                    text = str(error)
                    if "\n" in text or not text.startswith(str(directory)) or len(text) > 1000:
                        failures.append(f"{what}: {type(error).__name__}: {text}")
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    failures.append(f"{what}: {type(error).__name__}: {error}")
                finally:
                    signal.alarm(0)
    finally:
        torch.set_num_threads(threads)
    assert not failures, "\n".join([f"{len(failures)} failures", *failures[:20]])
    assert len(numbers) * 0.15 < refused < len(numbers)  # the changes are neither harmless nor all refused alike
