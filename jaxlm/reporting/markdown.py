"""Text and tables as Markdown that shows them as they are."""

from typing import Any


def table(figures: dict[str, str]) -> str:
    """Names and values, without a head."""
    rows = [f"| {name} | {_cell(value)} |" for name, value in figures.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def grid(rows: list[dict[str, Any]]) -> str:
    """A table with the keys of the first row as its head; numbers stand to the right."""
    head = list(rows[0])
    alignment = ["---:" if isinstance(rows[0][key], int | float) else "---" for key in head]
    cells = [[_cell(_shown(row[key])) for key in head] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(map(_cell, head)), alignment, *cells])


def columns(rows: list[dict[str, Any]]) -> str:
    """The same as plain text: columns side by side, the last as long as it is."""
    *head, last = rows[0]
    lines = [[*head, last], *([_shown(row[key]) for key in [*head, last]] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]])
                     for line in lines)


def fenced(text: str) -> str:
    """A code block whose fence the text cannot close."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text.rstrip()}\n{fence}"


def encodable(text: str) -> str:
    """JSON and YAML can name half a character (\\ud800), which no file and no terminal takes."""
    return text.encode(errors="replace").decode()


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "&#124;")
