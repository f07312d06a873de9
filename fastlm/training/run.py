"""run.json: what a run was started with, from which `fastlm train --resume` goes on without any other option."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fastlm.core.errors import mismatch
from fastlm.models.config import read_json, stored
from fastlm.training import config, data, metrics
from fastlm.training.checkpoint import staged, versions, write_json
from fastlm.training.checkpoints import FORMAT, check_format, check_unchanged, clear, sums_of
from fastlm.training.settings import Settings

RUN = "run.json"


@dataclasses.dataclass(frozen=True)
class Run:
    settings: Settings
    inputs: dict[str, Any]  # the arguments that are not settings, as given: data, tokenizer, init, …
    device: str
    threads: int
    training: dict[str, str]  # the SHA-256 of the files by their absolute paths, in the order of the text
    validation: dict[str, str]  # of a separate validation text
    skipped: list[str]
    versions: dict[str, str]

    @classmethod
    def of(cls, settings: Settings, inputs: dict[str, Any], corpus: data.Corpus, device: torch.device) -> "Run":
        training, validation = sums_of(corpus.files), sums_of(corpus.validation_files)
        skipped = [str(file) for file in corpus.skipped]
        return cls(settings, inputs, str(device), torch.get_num_threads(), training, validation, skipped, versions())

    @classmethod
    def read(cls, directory: Path) -> "Run":
        path = stored(directory, RUN)
        if not path.is_file():
            raise mismatch("resume", f"the directory of a run, with {RUN}", repr(str(directory)))
        content = read_json(path)
        check_format(content, path)
        try:
            fields = {field.name: content[field.name] for field in dataclasses.fields(cls)}
            return cls(**{**fields, "settings": Settings(**fields["settings"])})
        except (KeyError, TypeError) as failure:
            raise mismatch("resume", f"the settings of a run in {path}", f"a damaged file ({failure})") from None

    def write(self, out: Path) -> None:
        """Writes run.json and config.toml, from which the same run can be started with other settings."""
        with staged(out) as folder:
            write_json(folder / RUN, {"format": FORMAT, **dataclasses.asdict(self)})
            config.write(folder / config.CONFIG, self.given() | dataclasses.asdict(self.settings))

    def given(self) -> dict[str, Any]:
        """The inputs that a config file may have."""
        return {name: value for name, value in self.inputs.items() if name in config.INPUTS}

    def corpus(self, tokenizer: str | Tokenizer) -> data.Corpus:
        """Reads the text again.

        Raises:
            ValueError: a file is missing or has changed.
        """
        check_unchanged("data", self.training)
        check_unchanged("val_file", self.validation)
        return data.load(
            [Path(path) for path in self.training],
            tokenizer=tokenizer,
            val_fraction=self.inputs["val_fraction"] or 0.0,
            val_file=[Path(path) for path in self.validation],
            masked=self.settings.objective == "masked-token",
        )


def forget(directory: Path) -> None:
    """Deletes what --resume reads, where a model that is no run's has replaced the run's."""
    (directory / RUN).unlink(missing_ok=True)
    clear(directory)
    metrics.clear(directory)
