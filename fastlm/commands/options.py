"""Options of the command line from the fields of a dataclass of settings."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlm.core.errors import mismatch, shown
from fastlm.training.settings import Settings


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command, which takes them as **keywords, an option for every field of Settings."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [parameter(field) for field in dataclasses.fields(Settings)]
    command.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
    return command


def parameter(field: dataclasses.Field) -> inspect.Parameter:
    help_of = field.metadata
    option = typer.Option(help=help_of["help"], metavar=help_of["metavar"], rich_help_panel=help_of["panel"])
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[field.type, option]
    )


def given(ctx: typer.Context) -> set[str]:
    """The names of the parameters that the command line gives a value."""
    return {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}


def refuse_others(ctx: typer.Context, option: str, allowed: Collection[str]) -> None:
    """The command line must have none of the options that do nothing beside this one."""
    for parameter in ctx.command.params:
        if parameter.name in given(ctx) - {*allowed}:
            value = ctx.params[parameter.name]
            got = shown(str(value) if isinstance(value, Path) else value)
            raise mismatch(parameter.opts[0].lstrip("-"), f"no value with {option}", got)


def chosen(ctx: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that the command line gives."""
    names = given(ctx)
    return {name: value for name, value in values.items() if name in names}
