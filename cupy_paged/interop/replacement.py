"""Functions put into a module in place of those of the same names, and taken out again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

_standing: dict[ModuleType, Replacement] = {}
_ABSENT = object()


class Replacement:
    """Functions that stand in a module until `uninstall`, or until the end of a `with`.

    >>> module = ModuleType("engine")
    >>> module.double = lambda x: NotImplemented
    >>> with Replacement(module, {"double": [lambda x: 2 * x], "half": [lambda x: x / 2]}):
    ...     module.double(3), module.half(3)
    (6, 1.5)
    >>> module.double(3), hasattr(module, "half")
    (NotImplemented, False)

    module   whose attributes are set; it can hold one Replacement at a time
    forms    for each name the functions that may take it. Where the module has a function of that
             name, it is the first one with its parameters, in order, by name and with its defaults;
             more that have defaults may follow

    Raises RuntimeError if a Replacement stands in the module, and TypeError for a function that
    none can stand in for; the module then is as it was.
    """

    def __init__(self, module: ModuleType, forms: Mapping[str, Sequence[Callable[..., Any]]]):
        if module in _standing:
            raise RuntimeError(f"{module.__name__}: is replaced already, needs uninstall() first")
        self.module = module
        self._ours = {name: _chosen(module, name, some) for name, some in forms.items()}
        self._before = {name: vars(module).get(name, _ABSENT) for name in forms}
        _standing[module] = self
        for name, function in self._ours.items():
            setattr(module, name, function)

    def uninstall(self) -> None:
        """Puts back what was there, and removes what was not; does nothing a second time.

        A name that somebody else has set since keeps what they have put there. Replacements in
        different modules know nothing of each other, and go in any order.
        """
        if _standing.get(self.module) is not self:
            return
        for name, before in self._before.items():
            if vars(self.module).get(name) is not self._ours[name]:
                continue
            if before is _ABSENT:
                delattr(self.module, name)
            else:
                setattr(self.module, name, before)
        del _standing[self.module]

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *error: object) -> None:
        self.uninstall()


def _chosen(
    module: ModuleType, name: str, forms: Sequence[Callable[..., Any]]
) -> Callable[..., Any]:
    original = getattr(module, name, None)
    if original is None:
        return forms[0]
    theirs = _parameters(original)
    for function in forms:
        if _covers(_parameters(function), theirs):
            return function
    needed = " or ".join(_spelled(_parameters(function)) for function in forms)
    raise TypeError(f"{module.__name__}.{name}: takes {_spelled(theirs)}, needs {needed}")


def _parameters(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # no function, or one that does not tell: it fits none of ours
        return [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]


def _covers(ours: list[inspect.Parameter], theirs: list[inspect.Parameter]) -> bool:
    """Whether what calls the one may call the other."""
    shared, more = ours[: len(theirs)], ours[len(theirs) :]
    return (
        len(shared) == len(theirs)
        and all(
            a.name == b.name and a.kind == b.kind and b.default in (b.empty, a.default)
            for a, b in zip(shared, theirs, strict=True)
        )
        and all(a.default is not a.empty for a in more)
    )


def _spelled(parameters: list[inspect.Parameter]) -> str:
    plain = [p.replace(annotation=p.empty) for p in parameters]
    return str(inspect.Signature(plain))
