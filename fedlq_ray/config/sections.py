"""The base class of sections of settings: strict, frozen, and with error messages of our own.

Settings come from YAML, `key=value` or Python. Equivalent values are equal in all three: lists and tuples, NumPy's
scalars and numbers, paths and text.
"""

from fedlq_ray import startup  # noqa: F401  (first: a user's file could hide later imports)

# isort: split
import difflib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, ValidationError, model_validator

from fedlq_ray.errors import ConfigError


def _text(value: Any) -> Any:
    """Converts numbers and paths to text, such as a name written as a number."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _is_numpy(value: Any, kind: Literal["generic", "ndarray"]) -> bool:
    """Whether a value is a NumPy scalar or array; NumPy is not imported for it, because then no value is one."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, getattr(numpy, kind))


def _plain(value: Any) -> Any:
    """A setting's value for validation: Python's numbers, and tuples for sequences."""
    if _is_numpy(value, "generic"):
        return value.item()
    if _is_numpy(value, "ndarray"):
        return _plain(value.tolist())
    if isinstance(value, list | tuple | range):
        return tuple(map(_plain, value))
    return value


def _kept(value: Any, where: str = "") -> Any:
    """Arguments of a user's own part, as config.yaml can hold them, so that a resumed run has the same arguments.

    Raises:
        ValueError: config.yaml cannot hold one of them; the message names where.
    """
    if _is_numpy(value, "generic"):
        return _kept(value.item(), where)
    if _is_numpy(value, "ndarray"):
        return _kept(value.tolist(), where)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return type(value)(_kept(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _kept(item, f"{where}.{name}" if where else name) for name, item in value.items()}
    what = "a dict with keys that are not text" if isinstance(value, Mapping) else f"a {type(value).__name__}"
    raise ValueError(
        f"{where + ' ' if where else ''}is {what}, and config.yaml holds only numbers, text, true, false, null, lists "
        "and dicts; give the part itself in Python: simulate(config, model=functools.partial(make, act=nn.GELU))"
    )


Text = Annotated[str, BeforeValidator(_text)]
Args = Annotated[dict[str, Any], BeforeValidator(_kept)]


Affects = Literal["result", "clock", "nothing"]


def key(
    default: Any,
    meaning: str,
    *,
    unit: str | None = None,
    affects: Affects = "result",
    own: bool = False,
    **bounds: Any,
) -> Any:
    """A setting.

    Args:
        affects: what another value changes: the result; only the clock (of schemes that ignore time); or nothing.
        own: whether only one strategy has it.
    """
    extra: Any = {"unit": unit, "affects": affects, "own": own}
    return Field(default, description=meaning, json_schema_extra=extra, **bounds)


class Section(BaseModel):
    """Strict and frozen: no unknown keys, no silent conversions, no NaN or infinity.

    Raises:
        ConfigError: all faults of the given values, one per line.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    if not TYPE_CHECKING:  # type checkers see a signature of the fields

        def __init__(self, **settings: Any) -> None:
            try:
                super().__init__(**settings)
            except ValidationError as exc:
                raise ConfigError("\n".join(faults(type(self), exc))) from None

        # Nested sections are validated without this __init__, so that one error has all faults.
        __init__.__pydantic_base_init__ = True

        @classmethod
        def model_validate(cls, settings: Any, **options: Any) -> "Section":
            try:
                return super().model_validate(settings, **options)
            except ValidationError as exc:
                raise ConfigError("\n".join(faults(cls, exc))) from None

        def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> "Section":
            """A copy with other settings, which are checked."""
            kept = {name: getattr(self, name) for name in type(self).model_fields}
            return type(self)(**kept | dict(update or {}))

        def __setattr__(self, name: str, value: Any) -> NoReturn:
            raise ConfigError(f"{name}: settings cannot be changed; use model_copy(update={{{name!r}: ...}})")

    @model_validator(mode="before")
    @classmethod
    def _alike(cls, settings: Any) -> Any:
        if not isinstance(settings, Mapping):
            return settings
        return {name: value if name == "args" else _plain(value) for name, value in settings.items()}


def keys(section: Section | type[Section], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every setting: its dotted path, its pydantic field, and its default without environment variables.

    Args:
        section: settings, or their class; the class of a section with variants has the default variant.
    """
    kind = section if isinstance(section, type) else type(section)
    for name, field in kind.model_fields.items():
        value = field.default if isinstance(section, type) else getattr(section, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from keys(field.annotation, f"{prefix}{name}.")
        elif isinstance(value, Section):
            yield from keys(value, f"{prefix}{name}.")
        else:
            extra: Any = field.json_schema_extra or {}
            yield f"{prefix}{name}", field, extra.get("default", field.default)


def affects(section: Section | type[Section], what: Affects) -> list[str]:
    """The dotted paths of the settings that affect `what`."""
    return [path for path, field, _ in keys(section) if field.json_schema_extra.get("affects", "result") == what]


def is_text(field: Any) -> bool:
    """Whether a setting is text: `Text`, or `Text | None`."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    return str in (get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds)


def is_optional(field: Any) -> bool:
    """Whether a setting may be null."""
    return type(None) in get_args(field.annotation)


def faults(section: type[Section], exc: ValidationError) -> list[str]:
    """All faults of a section's settings, one line each: the key, what is wrong, what was given."""
    return [_fault(section, error) for error in exc.errors(include_url=False)]


class _Variant(NamedTuple):
    """The variant that a section's settings chose, such as a strategy."""

    name: str
    others: list[type[Section]]


def _place(section: type[Section], steps: Sequence[Any]) -> tuple[type[Section], str, _Variant | None]:
    """The section of a fault, the dotted path of its setting, and the section's variant."""
    path: list[str] = []
    chosen: _Variant | None = None
    variants: dict[str, type[Section]] = {}
    for step in steps:
        if variants:  # the step is the variant's tag, which is not part of the path
            chosen = _Variant(str(step), list(variants.values()))
            section, variants = variants.get(str(step), section), {}
            continue
        path.append(str(step))
        field = section.model_fields.get(str(step))
        if field is None:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            section = field.annotation
        elif any(isinstance(item, Discriminator) for item in field.metadata):
            variants = {tag.tag: kind for kind, tag in map(get_args, get_args(field.annotation))}
    return section, ".".join(path), chosen


def _fault(section: type[Section], error: Any) -> str:
    kind, path, chosen = _place(section, error["loc"])
    shown = repr(error["input"])
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    given = f" (given: {shown})" if not isinstance(error["input"], Mapping) else ""
    if error["type"] == "extra_forbidden":
        head, _, name = path.rpartition(".")
        known = [key for key, *_ in keys(section)]
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.5) or [k for k in known if k.endswith("." + path)]
        if head:
            near = [f"{head}.{field}" for field in difflib.get_close_matches(name, kind.model_fields, n=1)]
        wrong = "unknown key"
        if chosen and any(name in variant.model_fields for variant in chosen.others):
            wrong = f"{chosen.name} does not read it; fedlq config {head}.name={chosen.name} shows what it reads"
        return f"{path}: {wrong}{f'; did you mean {near[0]}?' if near else ''}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path + ': ' if path else ''}{message}"
    return f"{path or 'settings'}: {message[0].lower()}{message[1:]}{given}"
