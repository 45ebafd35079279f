"""Tables and progress bars. Names in tables wrap, figures never break, and output to a file or pipe is not cut."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

_NAME = 12  # minimum width of a name column before figures move to a separate table
_SIDES = 3  # per column: a space on either side and a border


class Grid(Table):
    """A table whose first columns name a row; the others hold its figures."""

    def __init__(self, names: Sequence[str], figures: Iterable[str], *, title: str):
        """Creates an empty table with these column headers."""
        heads = [Column(escape(head), overflow="fold") for head in names]
        heads += [Column(escape(head), justify="right") for head in figures]
        super().__init__(*heads, title=escape(title))
        self.names = len(names)

    def add(self, names: Sequence[str], figures: Iterable[str], *, style: str | None = None) -> None:
        """Adds a row in a style; names are literal text, and figures may contain Rich markup."""
        self.add_row(*map(escape, names), *figures, style=style)

    def plain(self) -> dict[str, Any]:
        """Returns the table in the form that model cards use: `title`, `header` and `rows`, all text."""
        header, *rows = zip(*([_text(cell).plain for cell in _cells(column)] for column in self.columns), strict=True)
        return {"title": _text(self.title).plain, "header": list(header), "rows": [list(row) for row in rows]}


def show(grid: Grid) -> None:
    """Prints a table on standard output, at full width unless that is a terminal.

    On a terminal that is too narrow, names wrap. If that is not enough, the figures are split over several tables, each
    with the names.
    """
    console = Console()
    names, figures = grid.columns[: grid.names], grid.columns[grid.names :]
    widths = [_name_width(column) for column in names]
    least = 1 + sum(min(width, _NAME) + _SIDES for width in widths)
    figures = [dataclasses.replace(column, width=_figure_width(column)) for column in figures]
    whole = 1 + sum(width + _SIDES for width in widths) + sum(map(_across, figures))
    if not console.is_terminal:
        console.width = max(console.width, whole)
    parts: list[list[Column]] = [[]]
    for column in figures:
        if parts[-1] and least + sum(map(_across, [*parts[-1], column])) > console.width:
            parts.append([])
        parts[-1].append(column)
    for number, part in enumerate(parts):
        shown = copy.copy(grid)
        shown.columns = [dataclasses.replace(column, _index=index) for index, column in enumerate([*names, *part])]
        shown.title = grid.title if number == 0 else None
        shown.caption = grid.caption if number == len(parts) - 1 else None
        # A single column may be wider than the terminal, because a figure must not be cut.
        console.width = max(console.width, least + sum(map(_across, part)))
        console.print(shown)


def _figure_width(column: Column) -> int:
    """Returns the width of the widest figure; the header wraps between words."""
    head, *cells = _cells(column)
    return max([*(len(word) for word in _text(head).plain.split()), *(_text(cell).cell_len for cell in cells), 1])


def _across(column: Column) -> int:
    return (column.width or 0) + _SIDES


def _name_width(column: Column) -> int:
    return max(Text(line).cell_len for cell in _cells(column) for line in _text(cell).plain.split("\n"))


def _cells(column: Column) -> list[Any]:
    return [column.header, *column.cells]


def _text(cell: Any) -> Text:
    return Text.from_markup(str(cell))


def progress_bar(
    *,
    amount: ProgressColumn | None = None,
    rest: ProgressColumn | None = None,
    console: Console | None = None,
    disable: bool = False,
) -> Progress:
    """Builds a progress bar with four columns: the task, the bar, the amount done and the time left.

    Args:
      amount: the column for the amount done; None shows a count.
      rest: the last column; None shows the time left.
      console: where the bar is shown; None means standard error.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        amount or MofNCompleteColumn(),
        rest or TimeRemainingColumn(),
    )
    return Progress(*columns, console=console or Console(stderr=True), disable=disable)


def track(bar: Progress, description: str, total: float) -> Callable[[float], None]:
    """Adds a task to a progress bar; returns a function that sets the amount done."""
    task = bar.add_task(description, total=total)
    return lambda done: bar.update(task, completed=done)
