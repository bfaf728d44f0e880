"""Reads users' CSV files row by row. Errors name the file, the line and what is wrong."""

import csv
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence

from fedlq_ray.errors import ConfigError


def read(
    path: str, key: str, *, required: Sequence[str], optional: Sequence[str] = (), instead: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields each row's location, for messages, and its cells by column. Lines without values are not rows.

    Args:
        key: the setting that names the file, for messages.
        required, optional: the columns.
        instead: what to give where the file cannot be read.
    Raises:
        ConfigError: the file cannot be read, or is not a well-formed CSV with these columns.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte-order mark first
            reader = csv.reader(file, strict=True)
            try:
                header = _header(f"{key}: {path}, line 1", next(reader, []), required, optional)
                for cells in reader:
                    if not any(cell.strip() for cell in cells):
                        continue
                    where = f"{key}: {path}, line {reader.line_num}"
                    if len(cells) != len(header):
                        raise ConfigError(
                            f"{where}: {len(cells)} values for {len(header)} columns, {', '.join(header)}"
                        )
                    yield where, dict(zip(header, cells, strict=True))
            except csv.Error as exc:
                raise ConfigError(f"{key}: {path}, line {reader.line_num}: not well-formed CSV ({exc})") from exc
    except OSError as exc:
        raise ConfigError(f"{key}: cannot read {path}: {exc.strerror}; give {instead}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{key}: {path} is not UTF-8 text ({exc.reason}); save it as CSV, UTF-8") from exc


def _header(where: str, cells: Sequence[str], needed: Sequence[str], optional: Sequence[str]) -> list[str]:
    header, known = [cell.strip() for cell in cells], (*needed, *optional)
    required = f"required: {', '.join(needed)}"
    if not any(header):
        raise ConfigError(f"{where}: no header row; {required}")
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise ConfigError(f"{where}: separate the columns with commas, got {header[0]!r}; {required}")
    extra = [name for name in header if name not in known]
    missing = [name for name in needed if name not in header]
    if missing:
        near = {name: difflib.get_close_matches(name, extra, n=1) for name in missing}
        hints = "".join(f"; is {match[0]!r} meant as {name!r}?" for name, match in near.items() if match)
        raise ConfigError(f"{where}: no column {', '.join(missing)}; {required}{hints}")
    if extra:
        raise ConfigError(f"{where}: unknown column {', '.join(map(repr, extra))}; known: {', '.join(known)}")
    if len(set(header)) < len(header):
        raise ConfigError(f"{where}: a column occurs twice, got {', '.join(header)}")
    return header


class Clients:
    """The clients that a file's column `client` may name: by number, or by id if the data has ids."""

    def __init__(self, count: int, names: Sequence[str] | None) -> None:
        self._numbers = {name: client for client, name in enumerate(names or map(str, range(count)))}
        self._known = f"0 to {count - 1}" if names is None else f"the ids in clients.csv, such as {names[0]!r}"

    def number(self, where: str, row: Mapping[str, str]) -> int:
        """The client's number. Raises ConfigError if there is no such client."""
        name = row["client"].strip()
        if name not in self._numbers:
            raise ConfigError(f"{where}, column client: there is no client {name!r}; known: {self._known}")
        return self._numbers[name]


def amount(
    where: str, row: Mapping[str, str], column: str, rule: str, *, above: bool = False, endless: bool = False
) -> float:
    """A cell's number, at least 0.

    Args:
        rule: what it must be, for messages.
        above: whether it must be more than 0.
        endless: whether it may be inf.
    Raises:
        ConfigError: it is not.
    """
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not value >= 0 or above and not value or not endless and math.isinf(value):
        raise ConfigError(f"{where}, column {column}: must be {rule}, got {row[column]!r}")
    return value
