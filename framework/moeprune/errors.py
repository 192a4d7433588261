"""Errors a user can mend. The command line prints them as one sentence and exits with 2; from Python they are ValueErrors."""

from __future__ import annotations

import difflib


class UserError(ValueError):
    """Bad input: the message names the thing, the value and the way out."""


def suggest(what: str, name: str, known: list[str]) -> str:
    """The sentence for a name that does not exist: near ones first, then what exists."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"there is no {what} {name!r}; {hint}known: {', '.join(known) or 'none'}"
