"""Makes objects from plain config values; whatever does not fit becomes one clear line."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from mtl.errors import UserError

TYPE_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}


def build(kind: type[Any], place: str, values: object, **supplied: object) -> Any:  # noqa: ANN401
    """Makes a dataclass from a mapping.

    Args:
        kind: The dataclass.
        place: Where the values stand in the config, for messages.
        values: Field names to values; ``None`` is an empty mapping.
        supplied: Fields that the config does not hold.

    Raises:
        UserError: A field is unknown, missing, or of another type than its annotation says.
    """
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise UserError(f"{place}={values}: must be a mapping of options. Write {place}.<option>=<value>.")
    fields = inspect.signature(kind).parameters
    known = [key for key in fields if key not in supplied]
    for key in values:
        if key not in known:
            raise no_such_option(place, key, known)
    missing = [key for key in known if fields[key].default is inspect.Parameter.empty and key not in values]
    if missing:
        raise UserError(f"{place}.{missing[0]} must be given. Add {place}.{missing[0]}=<value>.")
    made = kind(**values, **supplied)
    hints = get_type_hints(kind)
    for key, value in values.items():
        if not is_of_type(value, hints[key]):
            words = " or ".join(TYPE_WORDS.get(hint, str(hint)) for hint in alternatives(hints[key]))
            raise UserError(f"{place}.{key}={value}: must be {words}. Correct the value.")
    return made


def no_such_option(place: str, key: object, known: Collection[str]) -> UserError:
    """The mistake of a key that nothing knows, with the nearest one that there is."""
    options = f"There are: {', '.join(known)}." if known else "There are none; remove it."
    return UserError(f"{place}.{key}: there is no such option.{did_you_mean(str(key), known)} {options}")


def did_you_mean(word: str, known: Collection[str]) -> str:
    """A sentence that names the nearest known word; empty if none is near."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def alternatives(hint: Any) -> Sequence[Any]:  # noqa: ANN401
    """The members of a union, or the one type."""
    return get_args(hint) if get_origin(hint) is types.UnionType else (hint,)


def is_of_type(value: object, hint: Any) -> bool:  # noqa: ANN401
    """Whether plain data are of an annotated type; of containers only the outside is looked at."""
    for kind in alternatives(hint):
        if isinstance(value, bool):
            if kind is bool:
                return True
        elif isinstance(value, get_origin(kind) or kind) or (kind is float and isinstance(value, int)):
            return True
    return False


def cut(value: Any, names: Sequence[str], kept: Collection[str]) -> Any:  # noqa: ANN401
    """An option without what is about tasks that are not at hand.

    About tasks are mappings from task names, lists of them, and lists with an item for each task, at any depth.
    """
    if isinstance(value, Mapping):
        if value and value.keys() <= set(names):
            return {name: item for name, item in value.items() if name in kept}
        return {key: cut(item, names, kept) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    if value and all(isinstance(item, str) and item in names for item in value):
        return [name for name in value if name in kept]
    if len(value) == len(names) and not any(isinstance(item, str | Mapping) for item in value):
        value = [item for name, item in zip(names, value, strict=True) if name in kept]
    return [cut(item, names, kept) for item in value]


class Maker:
    """Makes objects of one group from its options and from what the run supplies.

    The run's values go to the constructor arguments of those names, and to no others, so that a class takes what it
    needs; and to those of an object that is an option itself. Options with a value for each task, by name or in order,
    are cut to the tasks at hand: a stage may have only some.

    Args:
        group: Place in the config, for messages.
        partial: The constructor with the options of the config.
        supplied: Names of the arguments that are the run's to give.
        names: The run's tasks.

    Raises:
        UserError: An option is unknown to the constructor, or is the run's to give.
    """

    def __init__(
        self, group: str, partial: functools.partial[Any], supplied: Collection[str], names: Sequence[str]
    ) -> None:
        self._group = group
        self._make = partial.func
        self._options = {
            key: Maker(f"{group}.{key}", value, supplied, names) if isinstance(value, functools.partial) else value
            for key, value in partial.keywords.items()
        }
        self._all_names = list(names)
        self.name: str = getattr(partial.func, "__name__", str(partial.func))
        self._accepted = inspect.signature(partial.func).parameters
        known = [key for key in self._accepted if key not in supplied]
        for key in self._options:
            if key in supplied:
                raise UserError(f"{group}.{key}: is set by the run and can't be set here. Remove it.")
            if key not in known:
                raise no_such_option(group, key, known)

    def __call__(self, **supplied: Any) -> Any:  # noqa: ANN401
        """Makes the object.

        Raises:
            UserError: The constructor refuses a value.
        """
        options = {
            key: value(**supplied) if isinstance(value, Maker) else value for key, value in self._options.items()
        }
        if "names" in supplied:
            options = {key: cut(value, self._all_names, supplied["names"]) for key, value in options.items()}
        supplied = {key: value for key, value in supplied.items() if key in self._accepted}
        try:
            return self._make(**supplied, **options)
        except UserError:
            raise
        except ValueError as error:
            named = re.match(r"(\w+):", str(error))  # our own constructors begin with the parameter's name
            place = f"{self._group}." if named and named[1] in self._accepted else f"{self._group}: {self.name}: "
            raise UserError(f"{place}{error}") from error
        except TypeError as error:
            given = ", ".join(f"{key}={value!r}" for key, value in options.items())
            raise UserError(
                f"{self._group}: {self.name}({given}): {error}. Check that each option has the type it should have."
            ) from error
