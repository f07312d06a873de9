import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlm import models
from fastlm.models import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
)
from fastlm.models.checkpoint import staged
from tests.models.hugging_face import ours_like, tiny_bert, tiny_gpt2

HEADS = {
    "GPT2Model": tiny_gpt2,
    "GPT2LMHeadModel": tiny_gpt2,
    "BertModel": tiny_bert,
    "BertForMaskedLM": tiny_bert,
    "BertForSequenceClassification": tiny_bert,
}


@pytest.fixture(autouse=True)
def quiet():
    """Unexpected warnings fail: they would name a key that the model should know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        yield


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# Round trips through Hugging Face's format


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_theirs_to_ours_to_theirs(tmp_path, head, dtype):
    theirs = HEADS[head](head).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = getattr(models, head).from_pretrained(tmp_path / "theirs")
    assert_same_weights(ours, theirs)
    assert not ours.training
    ours.save_pretrained(tmp_path / "ours")
    stored = [load_file(tmp_path / owner / "model.safetensors") for owner in ("theirs", "ours")]
    assert stored[0].keys() == stored[1].keys()  # a tied parameter is stored once, as in Hugging Face's files
    assert_same_weights(type(theirs).from_pretrained(tmp_path / "ours"), theirs)
    assert_same_weights(type(ours).from_pretrained(tmp_path / "ours"), ours)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
def test_untied_models(tmp_path, make):
    theirs = make(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = getattr(models, type(theirs).__name__).from_pretrained(tmp_path / "theirs")
    assert_same_weights(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_weights(type(theirs).from_pretrained(tmp_path / "ours"), theirs)


def test_shards(tmp_path):
    theirs = tiny_gpt2()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_weights(GPT2LMHeadModel.from_pretrained(tmp_path), theirs)
    next(iter(tmp_path.glob("model-00002*"))).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model-00002-of-.*no such file, although the index in its directory lists it"
    ):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def test_index_with_a_path_outside_the_directory(tmp_path):
    write(tmp_path, tiny_gpt2())
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(
        ValueError,
        match=r"model.safetensors.index.json: expected a weight_map from parameters to files in the same directory",
    ):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def write(directory, model, change=lambda state: state, name="model.safetensors"):
    """Writes a model directory; change() edits the stored tensors."""
    directory.mkdir(exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    state = change(dict(model.state_dict()))
    if name.endswith(".bin"):
        torch.save(state, directory / name)
    else:
        save_file({key: value.clone() for key, value in state.items()}, directory / name)
    return directory


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 2020"])
def test_pytorch_files(tmp_path, legacy):
    theirs = tiny_bert()
    write(tmp_path, theirs, name="pytorch_model.bin")
    if legacy:
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_weights(BertForMaskedLM.from_pretrained(tmp_path), theirs)


def test_pytorch_files_in_shards(tmp_path):
    theirs = tiny_gpt2()
    write(tmp_path, theirs, name="pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").unlink()
    state = theirs.state_dict()
    names = {key: f"pytorch_model-{i % 2}.bin" for i, key in enumerate(state)}
    for file in set(names.values()):
        torch.save({key: state[key] for key in state if names[key] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert_same_weights(GPT2LMHeadModel.from_pretrained(tmp_path), theirs)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_loading_a_pytorch_file_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, tiny_gpt2(), lambda state: {"a": Trap()}, name="pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: expected tensors by name and nothing else") as error:
        GPT2LMHeadModel.from_pretrained(tmp_path)
    assert str(error.value).endswith("as code in a checkpoint is never run, got the Python object posix.mkdir")
    assert not (tmp_path / "trapped").exists()


# Variants in old files


def test_with_and_without_the_prefix(tmp_path):
    gpt2, bert = tiny_gpt2("GPT2Model"), tiny_bert("BertModel")
    for base, with_head, own_base in ((gpt2, tiny_gpt2(), GPT2Model), (bert, tiny_bert(), BertModel)):
        bare = write(tmp_path / "bare", base)
        assert_same_weights(own_base.from_pretrained(bare), base)
        prefix = with_head.base_model_prefix
        both = write(
            tmp_path / "both",
            base,
            lambda state, prefix=prefix: {f"{prefix}.{key}": value for key, value in state.items()},
        )
        assert_same_weights(own_base.from_pretrained(both), base)
    headless = write(
        tmp_path / "headless",
        tiny_gpt2(),
        lambda state: {k.removeprefix("transformer."): v for k, v in state.items() if "lm_head" not in k},
    )
    model = GPT2LMHeadModel.from_pretrained(headless)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_tensorflow_names_of_layernorm(tmp_path):
    theirs = tiny_bert()
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def old(state):
        return {
            next((key.replace(a, b) for a, b in renamed.items() if a in key), key): value
            for key, value in state.items()
        }

    assert any("gamma" in key for key in old(theirs.state_dict()))
    assert_same_weights(BertForMaskedLM.from_pretrained(write(tmp_path, theirs, old)), theirs)


def test_stored_constants_are_ignored(tmp_path):
    gpt2, bert = tiny_gpt2(), tiny_bert()
    causal = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 48, 48).tril().bool() for i in range(3)}
    masked = {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    assert_same_weights(
        GPT2LMHeadModel.from_pretrained(write(tmp_path / "a", gpt2, lambda state: state | causal | masked)), gpt2
    )
    positions = {"bert.embeddings.position_ids": torch.arange(48)[None]}
    assert_same_weights(
        BertForMaskedLM.from_pretrained(write(tmp_path / "b", bert, lambda state: state | positions)), bert
    )


def test_tied_parameters_under_either_name(tmp_path):
    theirs = tiny_gpt2()
    only_source = write(tmp_path / "a", theirs, lambda state: {k: v for k, v in state.items() if k != "lm_head.weight"})
    only_tied = write(
        tmp_path / "b", theirs, lambda state: {k: v for k, v in state.items() if k != "transformer.wte.weight"}
    )
    for directory in (only_source, only_tied):
        model = GPT2LMHeadModel.from_pretrained(directory)
        assert_same_weights(model, theirs)
        assert model.lm_head.weight is model.transformer.wte.weight


def test_different_tensors_are_not_tied_despite_the_config(tmp_path):
    """As in transformers."""
    directory = write(tmp_path, tiny_gpt2(), lambda state: state | {"lm_head.weight": state["lm_head.weight"] + 1})
    with pytest.warns(
        UserWarning, match=r"lm_head.weight and transformer.wte.weight differ in the file; they are not tied"
    ):
        model = GPT2LMHeadModel.from_pretrained(directory)
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight + 1)
    theirs = type(tiny_gpt2()).from_pretrained(directory)
    assert_same_weights(model, theirs)
    model.save_pretrained(tmp_path / "again")
    with pytest.warns(UserWarning, match="not tied"):
        assert_same_weights(GPT2LMHeadModel.from_pretrained(tmp_path / "again"), theirs)


# Unknown, missing and invalid parameters


def test_unknown_key_causes_a_warning(tmp_path):
    theirs = tiny_bert("BertForPreTraining")
    theirs.save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"not loaded, as BertForMaskedLM has no such parameter: .*cls.seq_relationship.weight"
    ) as caught:
        model = BertForMaskedLM.from_pretrained(tmp_path)
    assert len(caught) == 1 and caught[0].filename == __file__
    ids = torch.randint(0, 131, (2, 9))
    torch.testing.assert_close(model(ids).logits, theirs(ids).prediction_logits, rtol=1e-4, atol=1e-5)


def test_missing_key_is_an_error(tmp_path):
    directory = write(
        tmp_path, tiny_gpt2(), lambda state: {k: v for k, v in state.items() if "h.1.attn.c_proj" not in k}
    )
    with pytest.raises(
        ValueError,
        match=r"are missing in the file .*: transformer.h.1.attn.c_proj.weight, transformer.h.1.attn.c_proj.bias$",
    ) as error:
        GPT2LMHeadModel.from_pretrained(directory)
    assert str(error.value).startswith(f"{directory}: ")


def test_a_new_classifier_on_a_pretrained_encoder(tmp_path):
    theirs = tiny_bert("BertModel")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"missing in the file \(initialise=\(prefix, …\) .* random\): classifier.weight, classifier.bias",
    ):
        BertForSequenceClassification.from_pretrained(tmp_path)
    config = BertConfig.from_pretrained(tmp_path)
    config.num_labels = 7
    model = BertForSequenceClassification.from_pretrained(tmp_path, config=config, initialise=("classifier",))
    assert_same_weights(model.bert, theirs)
    assert model.classifier.weight.shape == (7, 36) and not model.classifier.bias.any()
    assert 0.01 < model.classifier.weight.std() < 0.03


def test_arguments_of_the_class_and_dtype(tmp_path):
    theirs = tiny_bert().bert
    theirs.save_pretrained(tmp_path)
    model = BertModel.from_pretrained(tmp_path, add_pooling_layer=False, dtype=torch.bfloat16)
    assert model.pooler is None
    assert_same_weights(model, theirs.to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"^dtype: expected one of torch.float32, .*, got torch.float8_e4m3fn"):
        BertModel.from_pretrained(tmp_path, dtype=torch.float8_e4m3fn)


def test_mixed_dtypes_are_promoted_to_the_widest(tmp_path):
    theirs = tiny_gpt2()
    directory = write(tmp_path, theirs, lambda state: {k: v if "ln_" in k else v.half() for k, v in state.items()})
    model = GPT2LMHeadModel.from_pretrained(directory)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.transformer.wpe.weight, theirs.transformer.wpe.weight.half().float())


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t[:, :-1],
            r"transformer.h.0.attn.c_attn.weight: expected shape \(36, 108\), as in config.json, got \(36, 107\)",
        ),
        (
            lambda t: t.t().contiguous(),
            r"transformer.h.0.attn.c_attn.weight: expected shape \(36, 108\), as in config.json, got \(108, 36\)",
        ),
        (
            lambda t: t.to(torch.int8),
            r"c_attn.weight: expected a dense tensor of dtype float32, float64, bfloat16, float16, got torch.int8",
        ),
        (
            lambda t: t.to(torch.float8_e4m3fn),
            r"c_attn.weight: expected a dense tensor of dtype float32, .*, got torch.float8_e4m3fn",
        ),
    ],
)
def test_invalid_tensor_is_an_error(tmp_path, change, message):
    key = "transformer.h.0.attn.c_attn.weight"
    with pytest.raises(ValueError, match=message):
        GPT2LMHeadModel.from_pretrained(write(tmp_path, tiny_gpt2(), lambda state: state | {key: change(state[key])}))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("left", [0, 5, 100, 20_000])
def test_truncated_file_is_a_one_line_error(tmp_path, name, left):
    path = write(tmp_path, tiny_gpt2(), name=name) / name
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError) as error:
        GPT2LMHeadModel.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"{path}: truncated or not a checkpoint (") and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_8_bits_are_refused(tmp_path, dtype):
    directory = write(tmp_path, tiny_gpt2(), lambda state: {k: v.to(dtype) for k, v in state.items()})
    for wanted in (None, torch.float32):
        with pytest.raises(ValueError, match=rf"weight: expected a dense .*, got {dtype}"):
            GPT2LMHeadModel.from_pretrained(directory, dtype=wanted)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_layer": 10**9}, "num_hidden_layers: expected no more layers than the 41 tensors of the weights"),
        ({"n_positions": 10**9}, r"wpe.weight: expected shape \(1000000000, 36\), as in config.json"),
        ({"n_embd": 3 * 10**8}, r"weight: expected shape \(131, 300000000\)"),
        ({"n_embd": 2**31 - 2, "n_inner": 2**31 - 1, "n_head": 2}, "expected sizes in config.json that can be"),
        ({"n_embd": 10**12}, "n_embd: expected an integer <= 2147483647, got 1000000000000"),
    ],
    ids=str,
)
def test_sizes_that_the_weights_do_not_have_allocate_nothing(tmp_path, changes, message):
    config = json.loads((write(tmp_path, tiny_gpt2()) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message) as error:
        GPT2LMHeadModel.from_pretrained(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_missing_weights_and_missing_directory(tmp_path):
    write(tmp_path, tiny_gpt2())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r": expected a directory with one of model.safetensors, model.safetensors.index.json, pytorch_model.bin",
    ):
        GPT2LMHeadModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere/config.json: no such file"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "nowhere")


def test_pickle_without_a_state_dict(tmp_path):
    write(tmp_path, tiny_gpt2(), lambda state: {"epoch": 3, "model": state}, name="pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: expected a state dict \(tensors by name\)"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


# Atomic writes


SAVE = """
import resource, signal, sys
from fastlm.models import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(vocab_size=2000, n_positions=16, n_embd=64, n_layer=2, n_head=2))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # like a full disk: writes fail
try:
    model.save_pretrained(sys.argv[1])
except OSError as error:
    print(error)
"""


def test_full_disk_leaves_existing_files_unchanged(tmp_path):
    ours_like(tiny_gpt2()).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"config.json", "model.safetensors"}
    done = subprocess.run([sys.executable, "-c", SAVE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (
        done.stdout.startswith(f"{tmp_path / 'model.safetensors'}: could not be written (")
        and done.stdout.count("\n") == 1
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_interrupted_save_leaves_existing_files_unchanged(tmp_path, monkeypatch):
    ours = ours_like(tiny_gpt2())
    ours.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)  # called between the weights and config.json
    torch.nn.init.zeros_(ours.transformer.wte.weight)
    with pytest.raises(KeyboardInterrupt):
        ours.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_directory_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ours_like(tiny_gpt2()).save_pretrained(tmp_path / "file" / "model")


def test_files_are_replaced_together(tmp_path):
    with staged(tmp_path / "new") as folder:
        (folder / "a.txt").write_text("old")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]
    (tmp_path / "new" / "b.txt").mkdir()
    with (
        pytest.raises(OSError, match=r"new/b.txt: could not be written \(it is a directory\); no file was changed"),
        staged(tmp_path / "new") as folder,
    ):
        (folder / "a.txt").write_text("new")
        (folder / "b.txt").write_text("new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.txt", "b.txt"]
    assert (tmp_path / "new" / "a.txt").read_text() == "old"


KILLED = """
import itertools, json, os, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from fastlm.models import GPT2Config, GPT2LMHeadModel, load_model

torch.set_num_threads(1)
directory = Path(sys.argv[1])
models = []  # the weights of each are 1, 2, … and say so in the config
for number in (1, 2, 3):
    config = GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=number, n_head=2, other={"number": number})
    model = GPT2LMHeadModel(config)
    for p in model.parameters():
        torch.nn.init.constant_(p, number)
    models.append(model)

def child(run):
    pid = os.fork()
    if pid == 0:
        run()
        os._exit(0)
    return pid

def save_and_die(model, n):  # before the n-th call of the system that touches a file
    calls = itertools.count(1)
    def count(event, arguments):
        if event.partition(".")[0] in ("os", "shutil", "fcntl", "open") and next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    model.save_pretrained(directory)

def save_forever():
    for model in itertools.cycle(models):
        model.save_pretrained(directory)

def check(allowed):
    found = load_model(directory)
    number = found.config.other["number"]
    assert number in allowed, (number, allowed)
    assert all((p == number).all() for p in found.parameters()) and found.config.n_layer == number
    if (directory / "config.json").exists():  # as other programs read it
        number = json.loads((directory / "config.json").read_text())["number"]
        assert (load_file(directory / "model.safetensors")["transformer.wte.weight"] == number).all()
    return number

def check_no_leftovers():
    models[0].save_pretrained(directory)
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"], os.listdir(directory)

models[0].save_pretrained(directory)
seen = set()
for n in itertools.count(1):
    model = models[1 + n % 2]
    before = check({1, 2, 3})
    status = os.waitpid(child(lambda: save_and_die(model, n)), 0)[1]
    seen.add(check({before, model.config.n_layer}) == before)
    if status == 0:
        break
assert n > 10 and seen == {True, False}
check_no_leftovers()
for i in range(15):
    pid = child(save_forever)
    time.sleep(0.0014 * i)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    check({1, 2, 3})
check_no_leftovers()
print(n)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_one_checkpoint_and_the_next_save_no_leftovers(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, timeout=300)


def test_a_save_in_progress_is_not_swept(tmp_path):
    with staged(tmp_path) as first:
        (first / "a.txt").write_text("first")
        with staged(tmp_path) as second:
            (second / "a.txt").write_text("second")
        assert (tmp_path / "a.txt").read_text() == "second" and (first / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]


def test_loading_draws_no_random_numbers_and_keeps_no_file_mapped(tmp_path):
    """Loading leaves the generator state unchanged, and the file can be overwritten while the model is in use."""
    ours = ours_like(tiny_gpt2())
    ours.save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    with open(tmp_path / "model.safetensors", "rb+") as file:
        file.write(b"\0" * 1000)
        file.truncate(1000)
    assert_same_weights(model, ours)


def test_loading_allocates_no_second_copy(tmp_path):
    """Peak memory is about that of the model: files are memory-mapped, parameters are not initialised first."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50257, n_embd=512, n_layer=6, n_head=8))
    model.save_pretrained(tmp_path)
    size = sum(p.nbytes for p in model.parameters())
    code = (
        "import resource, sys; from fastlm.models import GPT2LMHeadModel\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); model = GPT2LMHeadModel.from_pretrained(sys.argv[1]); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    # 2 rather than 1: mapped pages of the file count as resident, although the kernel may drop them at any time.
    assert int(done.stdout) < 2.3 * size
