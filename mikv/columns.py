"""Tables that fit the terminal: numbers as text, aligned, and the columns for which there is room.

No cell is cut and no number is folded: from the first column on for which there is no room, columns are left out.
Names are folded over lines. Nothing in a name is read as rich's markup.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Interval = Sequence[float] | None

LOG_WIDTH = 160
"""Characters of a line where there is no terminal, as in a log file."""
_SHORT_HEAD = 7
"""Characters of a head that is folded only where it must be."""
_BORDER = 3
"""Characters that a column needs besides its cells: a blank on both sides and a line."""


@dataclass(frozen=True)
class Column:
    """Numbers, one per row.

    name: of the column, its head, which may be folded. cells: as they are to stand, see `aligned` and `with_intervals`; ''
    where there is none. short: the same without intervals, for where there is no room for them.
    """

    name: str
    cells: Sequence[str]
    short: Sequence[str] | None = None


def console() -> Console:
    """Where tables go: as wide as the terminal, or $COLUMNS. A log file has no width: rather a long line than few columns."""
    from rich.console import Console

    made = Console()
    return made if made.is_terminal or os.environ.get("COLUMNS", "").isdigit() else Console(width=LOG_WIDTH)


def number(value: float) -> str:
    """Three decimals; of what is smaller, two digits; of what is larger, four."""
    if value and abs(value) < 0.00995:  # what is not 0.010 with three
        return two_digits(value)
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def two_digits(value: float) -> str:
    """Two significant digits, as 0.0031, 0.50, 4.8, 123; two decimals of 0."""
    if 0 < abs(value) < 1e-5:
        return f"{value:.1e}"
    return f"{value:.{1 if 1 < abs(value) < 9.95 else _two_digits(value)}f}"


def aligned(texts: Sequence[str]) -> list[str]:
    """Pad texts of numbers so that their decimal points stand below each other."""
    parts = [text.partition(".") for text in texts]
    before = max((len(whole) for whole, _, _ in parts), default=0)
    after = max((len(point + digits) for _, point, digits in parts), default=0)
    return [f"{whole:>{before}}{point + digits:<{after}}" for whole, point, digits in parts]


def with_intervals(texts: Sequence[str], bounds: Sequence[Interval], sign: str = "") -> list[str]:
    """0.930 [0.86, 0.97]: numbers, aligned, and their intervals. sign: "+" for differences."""
    behind = []
    for bound, decimals in zip(bounds, bound_decimals(bounds), strict=True):
        ends = ", ".join(f"{round(end, decimals) + 0.0:{sign}.{decimals}f}" for end in bound or ())  # + 0.0: no -0.00
        behind.append(f" [{ends}]" if ends else "")
    width = max(map(len, behind), default=0)
    return [text + end.ljust(width) for text, end in zip(aligned(texts), behind, strict=True)]


def bound_decimals(bounds: Sequence[Interval]) -> list[int]:
    """Decimals of the ends of each interval: two where that tells the ends of all of them apart (shares), else as many as
    two significant digits of the larger end need, or the first one of the width."""
    known = [bound for bound in bounds if bound is not None]
    if all(max(map(abs, bound)) <= 1 and bound[1] - bound[0] >= 0.01 for bound in known):
        return [2] * len(bounds)
    return [2 if b is None else max(_two_digits(max(b, key=abs)), _first_digit(b[1] - b[0])) for b in bounds]


def _two_digits(value: float) -> int:
    """Decimals with which a number has two significant digits, and at least two decimals below 10."""
    return 0 if abs(value) >= 9.95 else max(2, 1 + _first_digit(abs(value)))


def _first_digit(value: float) -> int:
    """Place behind the point of the first digit of a number; 0 of what has one before it, and of 0."""
    return max(0, -math.floor(math.log10(value))) if value > 0 else 0


def fitted(
    title: str,
    names: Mapping[str, Sequence[str]],
    columns: Sequence[Column],
    width: int,
    sections: Collection[int] = (),
) -> tuple[Table, list[str], list[str]]:
    """A table of at most `width` characters.

    Args:
        names: heads and cells of the columns that are always there; they are folded where they are long.
        columns: the others, most important first, which is also their order in the table.
        sections: rows behind which a line is drawn.

    Returns the table, the names of the columns in it, and of what is left out (also "intervals of NAME").
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    widths = {name: _folded_width([name, *cells], width // (3 + len(names))) for name, cells in names.items()}
    room = width - 1 - sum(widths.values()) - _BORDER * len(names)
    chosen: list[tuple[Column, Sequence[str], int]] = []
    for column in columns:
        heads = ([column.name],) * (len(column.name) <= _SHORT_HEAD) + (column.name.split(),)
        variants = product(filter(None, (column.cells, column.short)), heads)
        widths_of = [(cells, max(map(cell_len, [*head, *cells]))) for cells, head in variants]
        fitting = next(((cells, wide) for cells, wide in widths_of if wide + _BORDER <= room), None)
        if fitting is None:
            break
        chosen.append((column, *fitting))
        room -= fitting[1] + _BORDER
    for name, cells in names.items():  # what is left
        more = max(0, min(room, max(map(cell_len, [name, *cells])) - widths[name]))
        widths[name] += more
        room -= more

    table = Table(title=Text(title), caption_justify="left")
    for name, wide in widths.items():
        table.add_column(Text(name), width=wide, overflow="fold")
    for column, _, wide in chosen:
        lines = [column.name] if cell_len(column.name) <= wide else column.name.split()
        table.add_column(Text("\n".join(line.rjust(wide) for line in lines)), width=wide, no_wrap=True)
    for row in range(len(next(iter(names.values())))):
        cells_of_row = [cells[row] for cells in names.values()] + [cells[row].rjust(wide) for _, cells, wide in chosen]
        table.add_row(*map(Text, cells_of_row), end_section=row in sections)
    shortened = [f"intervals of {column.name}" for column, cells, _ in chosen if cells is not column.cells]
    return table, [column.name for column, _, _ in chosen], shortened + [column.name for column in columns[len(chosen) :]]


def _folded_width(texts: Sequence[str], wanted: int) -> int:
    """Characters for names: what they need, or what is wanted for them, or what makes two lines of the longest."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    needed, console, different = max(map(cell_len, texts)), Console(), set(texts)
    two_lines = next(w for w in range(1, needed + 1) if all(len(Text(text).wrap(console, w)) <= 2 for text in different))
    return min(needed, max(wanted, two_lines))
