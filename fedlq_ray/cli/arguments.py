"""Arguments of commands: paths, and `[CONFIG.yaml] [key=value ...]`."""

import os
from collections.abc import Sequence
from typing import Any

import click

from fedlq_ray.errors import ConfigError
from fedlq_ray.files import expand


class _Path(click.ParamType):  # type: ignore[type-arg]  # generic in its stubs only
    """A path in which `~` means the home folder: shells do not expand it in `--out=~/x`, or in quotes."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        option = isinstance(param, click.Option)
        return expand(str(value), param.opts[0] if param and option else param.human_readable_name if param else "path")


PATH = _Path()
ARGUMENTS = click.argument("arguments", nargs=-1, metavar="[CONFIG.yaml] [key=value ...]")


def split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Splits arguments into the configuration file, or None, and key=value; an existing file is always the file.

    Raises:
        ConfigError: there are two files, or a folder, or a path with `=` that does not exist.
    """
    from fedlq_ray.config.sections import keys
    from fedlq_ray.config.settings import Config

    files, overrides = [], []
    sections = {path.partition(".")[0] for path, _, _ in keys(Config)}
    for argument in arguments:
        path, (name, equals, _) = expand(argument, "CONFIG.yaml"), argument.partition("=")
        setting = equals and name.strip().partition(".")[0] in sections
        if os.path.isdir(path) and not setting:
            raise ConfigError(f"{argument}: is a folder; {_hint(path)}")
        if os.path.isfile(path) or not equals:
            files.append(path)
        elif "/" in name and not setting:
            raise ConfigError(f"{argument}: no such file, and {name} is not a setting")
        else:
            overrides.append(argument)
    if len(files) > 1:
        raise ConfigError(
            f"{files[0]} and {files[1]}: only one of the arguments may be a file; the others are key=value"
        )
    return (files[0] if files else None), overrides


def _hint(folder: str) -> str:
    """Suggests what to give instead of a folder."""
    file = os.path.join(folder, "config.yaml")
    if os.path.isfile(file):
        return f"{file} runs it again, and fedlq resume {folder} continues it"
    return "give a configuration file, such as FILE.yaml"
