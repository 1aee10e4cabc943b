"""Choices by name, and what to say about a name that does not exist."""

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str:
    """The names in `known` most like `name` as "closest: a, b, c"; all of them if none is like it."""
    names = list(known)
    return f"closest: {', '.join(difflib.get_close_matches(name, names, n=3) or names)}"


def choose(field: str, choice: object, known: dict[str, object]) -> object:
    """What `choice` names in `known`, or `choice` itself if it is a builder. Raises ValueError naming `field`."""
    if not isinstance(choice, str):
        return choice
    if choice not in known:
        raise ValueError(f"{field}: unknown choice {choice!r}; {closest(choice, known)}")
    return known[choice]
