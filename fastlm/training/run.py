"""run.json: what a run was started with, from which `fastlm train --resume` goes on without any other option."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fastlm.core.errors import mismatch
from fastlm.models.config import read_json, stored
from fastlm.training import config, data, metrics
from fastlm.training.checkpoint import staged, versions, write_json
from fastlm.training.checkpoints import FORMAT, check_format, check_unchanged, clear
from fastlm.training.settings import TOKENIZERS, Settings

RUN = "run.json"


@dataclasses.dataclass(frozen=True)
class Run:
    settings: Settings
    inputs: dict[str, Any]  # the arguments that are not settings, as given: data, tokenizer, init, …
    device: str
    threads: int  # of each process
    processes: int
    training: dict[str, str]  # the SHA-256 of the files by their absolute paths, in the order of the text
    validation: dict[str, str]  # of a separate validation text
    skipped: list[str]
    tokenizer: str | None  # the SHA-256 of one that came from a file
    versions: dict[str, str]

    @classmethod
    def of(
        cls, settings: Settings, inputs: dict[str, Any], corpus: data.Corpus, device: torch.device, processes: int = 1
    ) -> "Run":
        training, validation = (
            {str(file.absolute()): corpus.sums[str(file.absolute())] for file in files}
            for files in (corpus.files, corpus.validation_files)
        )
        skipped = [str(file) for file in corpus.skipped]
        tokenizer = None if inputs["tokenizer"] in TOKENIZERS else data.digest_of(corpus.tokenizer)
        threads = torch.get_num_threads()
        files = training, validation, skipped
        return cls(settings, inputs, str(device), threads, processes, *files, tokenizer, versions())

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

    @classmethod
    def is_of(cls, directory: Path, settings: Settings, paths: Sequence[Any]) -> bool:
        """Whether the run in a directory, if there is one, was started with these settings and data."""
        if not stored(directory, RUN).is_file():
            return False
        found = cls.read(directory)
        return (found.settings, found.inputs["data"]) == (settings, [str(path) for path in paths])

    def write(self, out: Path) -> None:
        """Writes run.json and config.toml, from which the same run can be started with other settings."""
        with staged(out) as folder:
            write_json(folder / RUN, {"format": FORMAT, **dataclasses.asdict(self)})
            config.write(folder / config.CONFIG, self.given() | dataclasses.asdict(self.settings))

    def given(self) -> dict[str, Any]:
        """The inputs that a config file may have."""
        return {name: value for name, value in self.inputs.items() if name in config.INPUTS}

    def corpus(
        self, tokenizer: str | Tokenizer, *, end_of_text: int | None = None, cache: Path | None = None, **options: Any
    ) -> data.Corpus:
        """The text again, from the cache if it is there.

        Args:
            cache: that of the run, which is used unless it was started with another.
            options: others of data.load.

        Raises:
            ValueError: a file is missing or has changed.
        """
        if isinstance(tokenizer, Tokenizer) and data.digest_of(tokenizer) != self.tokenizer:
            raise mismatch("tokenizer", "the one that the run was started with", "a changed one")
        check_unchanged("data", self.training)
        check_unchanged("val_file", self.validation)
        return data.load(
            [Path(path) for path in self.training],
            tokenizer=tokenizer,
            val_fraction=self.inputs["val_fraction"] or 0.0,
            val_file=[Path(path) for path in self.validation],
            masked=self.settings.objective == "masked-token",
            field=self.inputs["field"],
            documents=self.settings.documents,
            end_of_text=end_of_text,
            cache=Path(self.inputs["cache"]) if self.inputs["cache"] else cache,
            sums=self.training | self.validation,
            **options,
        )


def forget(directory: Path) -> None:
    """Deletes what --resume reads, where a model that is no run's has replaced the run's."""
    (directory / RUN).unlink(missing_ok=True)
    clear(directory)
    metrics.clear(directory)
