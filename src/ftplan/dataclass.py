"""Dataclasses whose methods are shared instead of generated: it is a fifth of the start-up.

The standard library writes and compiles up to eight methods for every class each time a program
starts, 0.6 ms a class; a command of this one makes a hundred classes, most of them filled once
or never. Here the fields are the standard library's, so that ``fields``, ``replace`` and
``asdict`` work, and the methods read them. The speed of a search did not change by it.

To a type checker this is ``dataclasses.dataclass``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    import dataclasses
    from operator import attrgetter

    class _Made:
        """What a field that was not given is filled with: made anew each time."""

        __slots__ = ("make",)

        def __init__(self, make):
            self.make = make

    _MISSING = dataclasses.MISSING

    def dataclass(cls=None, *, frozen=False, slots, kw_only=False, eq=True):
        """As ``dataclasses.dataclass`` with ``slots=True``; what it cannot do it does not take."""
        if cls is None:
            return lambda cls: dataclass(cls, frozen=frozen, slots=slots, kw_only=kw_only, eq=eq)
        own = cls.__dict__
        made = dataclasses.dataclass(
            init=False, repr=False, eq=False, slots=slots, kw_only=kw_only
        )(cls)
        _describe(made)
        made.__init__ = _init
        if "__repr__" not in own:
            made.__repr__ = _repr
        if eq and "__eq__" not in own:
            made.__eq__ = _eq
            made.__hash__ = _hash if frozen else None
        if frozen:
            made.__setattr__ = _refuse_to_set
            made.__delattr__ = _refuse_to_delete
            made.__getstate__ = _state
            made.__setstate__ = _restore
        return made

    def _describe(cls):
        """Beside the fields: how each is set, what it is when not given, which count as equal."""
        fields = dataclasses.fields(cls)
        cls.__filled__ = tuple(
            (field.name, getattr(cls, field.name).__set__, _default(field)) for field in fields
        )
        cls.__positional__ = tuple(field.name for field in fields if not field.kw_only)
        compared = [field.name for field in fields if field.compare]
        cls.__compared__ = attrgetter(*compared) if compared else type

    def _default(field):
        factory = field.default_factory
        return field.default if factory is _MISSING else _Made(factory)

    def _init(self, *args, **given):
        if args:
            _name(self, args, given)
        take = given.pop
        for name, fill, default in self.__filled__:
            value = take(name, default)
            if value is _MISSING:
                raise TypeError(f"{type(self).__name__}() is missing {name!r}")
            fill(self, value.make() if type(value) is _Made else value)
        if given:
            raise TypeError(f"{type(self).__name__}() has no field {next(iter(given))!r}")
        if hasattr(self, "__post_init__"):
            self.__post_init__()

    def _name(self, args, given):
        names = self.__positional__
        if len(args) > len(names):
            raise TypeError(f"{type(self).__name__}() takes {len(names)} values without a name")
        placed = dict(zip(names, args, strict=False))
        if twice := placed.keys() & given:
            raise TypeError(f"{type(self).__name__}() got {min(twice)!r} twice")
        given |= placed

    def _repr(self):
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name, _, _ in self.__filled__)
        return f"{type(self).__qualname__}({values})"

    def _eq(self, other):
        if other.__class__ is not self.__class__:
            return NotImplemented
        compared = self.__compared__
        return compared(self) == compared(other)

    def _hash(self):
        return hash(self.__compared__(self))

    def _refuse_to_set(self, name, value):
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

    def _refuse_to_delete(self, name):
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")

    def _state(self):
        return [getattr(self, name) for name, _, _ in self.__filled__]

    def _restore(self, state):
        for (_, fill, _), value in zip(self.__filled__, state, strict=True):
            fill(self, value)
