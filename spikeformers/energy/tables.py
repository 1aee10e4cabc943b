"""Tables of numbers as text that other programs read: CSV with every digit, LaTeX with four."""

import csv
import io
from collections.abc import Sequence

Cell = str | int | float | None
"""None: nothing to say, such as the rate of a layer that real numbers feed."""

ESCAPED = {each: f"\\{each}" for each in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def as_csv(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A line a row, in full precision; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def as_latex(head: Sequence[str], rows: Sequence[Sequence[Cell]], *, note: str) -> str:
    """A `tabular` that needs the package booktabs; above it `note` as comments, a line a line."""
    numbers = [any(isinstance(row[column], int | float) for row in rows) for column in range(len(head))]
    lines = [" & ".join(map(_latex, row)) + r" \\" for row in (head, *rows)]
    return "\n".join(
        [
            *(f"% {line}" for line in note.splitlines()),
            rf"\begin{{tabular}}{{{''.join('r' if number else 'l' for number in numbers)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _latex(cell: Cell) -> str:
    if cell is None:
        return "--"
    return f"{cell:.4g}" if isinstance(cell, float) else "".join(ESCAPED.get(each, each) for each in str(cell))
