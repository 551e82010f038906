"""Options of a method: the fields of its dataclass, each with a type, a default and a range or a list of choices.

A field is a bool, int, float or str; ``Literal`` lists choices, ``Annotated[float, msgspec.Meta(gt=0, le=1)]`` gives a
range. A trailing underscore of a field's name (``lambda_``) is not part of the option's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, cast, get_args, get_origin, get_type_hints

import msgspec

from edgefed.errors import ConfigError, did_you_mean

Value: TypeAlias = float | int | str | bool


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a method."""

    name: str
    field: str
    """The dataclass field that holds it."""
    kind: type
    """bool, int, float or str."""
    default: Value
    choices: tuple[Value, ...] = ()
    """Allowed values; () for any within the range."""
    limits: msgspec.Meta | None = None

    @property
    def allowed(self) -> str:
        """The allowed values as text: "depth or uniform", "above 0 and at most 1", or "" where any value is allowed."""
        if self.choices:
            return " or ".join(map(str, self.choices))
        if self.limits is None:
            return ""
        bounds = (("above", "gt"), ("at least", "ge"), ("below", "lt"), ("at most", "le"))
        limits = {words: getattr(self.limits, bound) for words, bound in bounds}
        return " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if limit is not None)

    def allows(self, value: Any) -> bool:
        """Whether ``value``, which has the right type, is one of the choices and within the range."""
        if self.choices:
            return value in self.choices
        if self.limits is None:
            return True
        low, above, high, below = self.limits.ge, self.limits.gt, self.limits.le, self.limits.lt
        return (
            (low is None or value >= low)
            and (above is None or value > above)
            and (high is None or value <= high)
            and (below is None or value < below)
        )  # NaN is outside of every range

    def convert(self, value: object) -> Value | None:
        """``value`` as ``kind``, read from text if need be; None where it is of another type."""
        if self.kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, self.kind) and (self.kind is bool or not isinstance(value, bool)):
            return value  # type: ignore[return-value]  # kind is one of Value's types
        whole_as_float = self.kind is float and isinstance(value, int) and not isinstance(value, bool)
        if whole_as_float or (self.kind in (int, float) and isinstance(value, str)):
            try:
                return self.kind(value)  # type: ignore[no-any-return]
            except ValueError:
                pass
        return None


def options_of(kind: type) -> Mapping[str, Option]:
    """The options of a method's class by name, in the order of its fields.

    Raises TypeError for a field whose type is not supported, or a class that is not a dataclass.
    """
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"a method must be a dataclass, not {kind}")
    hints = get_type_hints(kind, include_extras=True)
    fields = [field for field in dataclasses.fields(kind) if field.init and field.default is not dataclasses.MISSING]
    found = [_option(kind, field, hints[field.name]) for field in fields]
    return {option.name: option for option in found}


def option_values(method: Any) -> dict[str, Value]:
    """The options of ``method`` by name."""
    return {option.name: getattr(method, option.field) for option in options_of(type(method)).values()}


def read_options(name: str, kind: type, values: Mapping[str, object]) -> dict[str, Value]:
    """Keyword arguments for ``kind`` from option values, which may be text.

    Raises ConfigError for an unknown option or a value of the wrong type.
    """
    known, found = options_of(kind), {}
    for key, value in values.items():
        if key not in known:
            listed = ", ".join(f"{option.name}={option.default}" for option in known.values()) or "none"
            raise ConfigError(f"{name} has no option {key!r}; its options are {listed}.{did_you_mean(key, known)}")
        option = known[key]
        if (converted := option.convert(value)) is None:
            raise ConfigError(f"{name}: option {key} must be {option.kind.__name__}, found {value!r}")
        found[option.field] = converted
    return found


def check_options(method: Any) -> None:
    """Raise ConfigError for the first option of ``method`` that is not one of its choices or outside its range."""
    for option in options_of(type(method)).values():
        value = getattr(method, option.field)
        if not option.allows(value):
            raise ConfigError(f"{method.name}: option {option.name} must be {option.allowed}, found {value!r}")


def _option(owner: type, field: dataclasses.Field[Any], hint: Any) -> Option:
    limits = None
    if get_origin(hint) is Annotated:
        limits = next((extra for extra in get_args(hint)[1:] if isinstance(extra, msgspec.Meta)), None)
        hint = get_args(hint)[0]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind = type(choices[0]) if choices else hint
    if kind not in (bool, int, float, str):
        raise TypeError(f"{owner.__name__}.{field.name}: options must be bool, int, float, str or Literal, not {hint}")
    return Option(field.name.rstrip("_"), field.name, kind, cast(Value, field.default), choices, limits)
