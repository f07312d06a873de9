"""Files of records and folders of `datasets`."""

import json
import re

import pytest

from fastlm.training import data
from fastlm.training.data.records import records

pyarrow = pytest.importorskip("pyarrow", reason="pip install 'fastlm[parquet]'")
from pyarrow import ipc, parquet  # noqa: E402

TEXTS = ["one", "zwei\nZeilen", "", "drei € 😀"] * 3


def table(texts=TEXTS, kind=None):
    return pyarrow.table({"text": pyarrow.array(texts, kind or pyarrow.string()), "number": range(len(texts))})


def write_arrow(path, content, rows=4):
    with pyarrow.OSFile(str(path), "wb") as file, ipc.new_stream(file, content.schema) as writer:
        writer.write_table(content, rows)
    return path


def write_dataset(folder, texts=TEXTS, state=None):
    """What datasets.Dataset.save_to_disk writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    for name, own in zip(names, (texts[:7], texts[7:]), strict=True):
        write_arrow(folder / name, table(own, kind=pyarrow.large_string()))
    (folder / "dataset_info.json").write_text("{}")
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files} if state is None else state))
    return folder


def write(folder, kind):
    file = folder / f"a.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps({"text": text, "number": 1}) + "\n" for text in TEXTS))
    elif kind == "parquet":
        parquet.write_table(table(), file, row_group_size=5)
    else:
        write_arrow(file, table())
    return file


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_records_are_documents(tmp_path, kind):
    file = write(tmp_path, kind)
    found = list(records(file, "text"))
    assert [record.text for record in found] == TEXTS
    assert [record.place for record in found] == [f"{file}:{i}" for i in range(1, 13)]
    read = [record.read for record in found]
    assert read == sorted(read) and read[-1] <= file.stat().st_size
    corpus = data.load([file], val_fraction=0.4)
    whole = bytes([*corpus.train[:].tolist(), *corpus.validation[:].tolist()]).decode()
    assert sorted(whole) == sorted("".join(text + "\n" for text in TEXTS))
    assert len(corpus.train.ends) + len(corpus.validation.ends) == 12


def test_an_arrow_file_that_is_not_a_stream(tmp_path):
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, ipc.new_file(file, table().schema) as writer:
        writer.write_table(table())
    assert [record.text for record in records(tmp_path / "a.arrow", "text")] == TEXTS


def test_folders_of_datasets(tmp_path):
    one, two = write_dataset(tmp_path / "all" / "one"), write_dataset(tmp_path / "all" / "two")
    (tmp_path / "all" / "text.txt").write_text("x")
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    assert data.find_files("data", [one]).found == [one / name for name in names]
    every = [tmp_path / "all" / "text.txt", *(folder / name for folder in (one, two) for name in names)]
    assert sorted(data.find_files("data", [tmp_path / "all"]).found) == sorted(every)
    assert data.find_files("data", [str(tmp_path / "all" / "*")]).found == [
        *(one / name for name in names),
        tmp_path / "all" / "text.txt",
        *(two / name for name in names),
    ]
    one_file = write_arrow(tmp_path / "all.arrow", table())
    corpora = [data.load([source], val_fraction=0.5) for source in (one, one_file)]
    assert corpora[0].train[:].tolist() == corpora[1].train[:].tolist()


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\n{"text": 3}', ":2: expected a string in the field 'text', got 3"),
        (
            '{"text": "a"}\n{"txt": "b"}',
            r":2: expected the field 'text' \(--field names another\), got txt; .*",
        ),
        ('{"text": "a"}\n\n', ":2: expected a JSON object, got invalid JSON .*"),
        ('["text"]', ":1: expected a JSON object, got list"),
        (b'{"text": "\xff"}', ":1: expected text in UTF-8, got the byte 0xff"),
        ('{"text": "\\ud800"}', ":1: expected Unicode text, got half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_damaged_lines(tmp_path, content, message, tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}{message}$"):
        data.load([file], tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_tables(tmp_path, kind):
    file = write(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"^{file}: expected the field 'body' .*, got text, number$"):
        data.load([file], field="body")
    with pytest.raises(ValueError, match=rf"^{file}:1: expected a string in the column 'number', got 0$"):
        data.load([file], field="number")
    content = file.read_bytes()
    for damaged in (content[:-30], b"text"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"^{file}: damaged or not an? (Parquet|Arrow) file"):
            data.load([file])


@pytest.mark.parametrize(
    "state, message",
    [
        ({"_data_files": [{"filename": "b.arrow"}]}, "data: expected the file .*/b.arrow, which .* names, got none"),
        ({}, "data: expected a list of files in .*state.json, got another content"),
        ({"_data_files": [], "_indices_files": [{}]}, r"data: expected a data set without indices \(flatten_indices.*"),
        ([], "data: expected a JSON object in .*state.json, got another value"),
    ],
)
def test_damaged_datasets(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        data.load([write_dataset(tmp_path / "a", state=state)])


def test_one_split_of_a_dataset(tmp_path):
    write_dataset(tmp_path / "a" / "train")
    (tmp_path / "a" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    message = r"data: expected one split of a data set \(.*/a/train, .*/a/test\), got all of them in '.*/a'"
    with pytest.raises(ValueError, match=message):
        data.load([tmp_path / "a"])
    assert len(data.load([tmp_path / "a" / "train"], val_fraction=0.5).train) > 0


def test_without_pyarrow(tmp_path, monkeypatch):
    file = write(tmp_path, "parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"expected an installation with pyarrow \(pip install 'fastlm\[parquet\]'\)"):
        data.load([file])
