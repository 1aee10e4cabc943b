"""Choices by name, and what to say about a name that does not exist."""

import difflib
from collections.abc import Iterable

LISTED = 20  # names


def closest(name: str, known: Iterable[str]) -> str:
    """The names in `known` most like `name` as "closest: a, b, c"; the first twenty if none is like it."""
    names = list(known)
    shown = difflib.get_close_matches(name, names, n=3) or names[:LISTED]
    more = f" and {len(names) - LISTED} more" if len(shown) == LISTED < len(names) else ""
    return f"closest: {', '.join(shown)}{more}"


def choose(field: str, choice: object, known: dict[str, object]) -> object:
    """What `choice` names in `known`, or `choice` itself if it is a builder. Raises ValueError naming `field`."""
    if not isinstance(choice, str):
        return choice
    if choice not in known:
        raise ValueError(f"{field}: unknown choice {choice!r}; {closest(choice, known)}")
    return known[choice]
