"""Shows several texts while they grow: all at once on a terminal, one after the other elsewhere."""

from __future__ import annotations

import shutil
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import TextIO

REDRAW_SECONDS = 0.05


class Display:
    """Streams the texts in order; those behind the first unfinished one wait for their turn."""

    def __init__(self, titles: Sequence[str], out: TextIO) -> None:
        self._out = out
        self._titles = titles
        self._texts = [""] * len(titles)
        self._finished = [False] * len(titles)
        self._current = 0
        self._shown = -1

    def add(self, index: int, text: str, finished: bool) -> None:
        self._texts[index] += _printable(text)
        self._finished[index] = finished
        self._draw()

    def close(self) -> None:
        """Whatever is not shown yet is, finished or not."""
        self._finished = [True] * len(self._titles)
        self._draw()

    def _draw(self) -> None:
        while self._current < len(self._titles):
            if self._shown < 0:
                self._out.write(self._title())
                self._shown = 0
            text = self._texts[self._current]
            self._out.write(text[self._shown :])
            self._shown = len(text)
            if not self._finished[self._current]:
                break
            self._out.write("\n\n")
            self._current, self._shown = self._current + 1, -1
        self._out.flush()

    def _title(self) -> str:
        return self._titles[self._current]


class LiveDisplay(Display):
    """For a terminal: redraws the start and end of each text in place, then leaves all in full."""

    def __init__(self, titles: Sequence[str], out: TextIO) -> None:
        super().__init__(titles, out)
        self._height = 0
        self._drawn = 0.0

    def close(self) -> None:
        self._erase()
        super().close()

    def _draw(self) -> None:
        if all(self._finished):
            self._erase()
            super()._draw()
        elif time.perf_counter() - self._drawn > REDRAW_SECONDS:
            self._drawn = time.perf_counter()
            columns, rows = shutil.get_terminal_size()
            share = max(2, (rows - 1) // len(self._titles)) - 1
            lines: list[str] = []
            for title, text in zip(self._titles, self._texts, strict=True):
                whole = _wrap(title + text, columns)
                tail = max(1, len(whole) - share + 1)
                lines += [whole[0], *whole[tail:], ""]
            lines = lines[: rows - 1]
            self._erase()
            self._out.write("\n".join(lines) + "\n")
            self._out.flush()
            self._height = len(lines)

    def _erase(self) -> None:
        if self._height:
            self._out.write(f"\x1b[{self._height}F\x1b[J")
            self._height = 0


def display(titles: Sequence[str], out: TextIO) -> Display:
    live = out.isatty() and len(titles) > 1
    return LiveDisplay(titles, out) if live else Display(titles, out)


def counter(out: TextIO) -> Callable[[str], None]:
    """Shows how far a work is, in one line that each report replaces; nothing off a terminal."""

    def report(text: str) -> None:
        if out.isatty():
            out.write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")
            out.flush()

    return report


def _printable(text: str) -> str:
    # A model may well write an escape sequence, and the terminal would obey it.
    return "".join(c for c in text if c in "\n\t" or not unicodedata.category(c).startswith("C"))


def _wrap(text: str, columns: int) -> list[str]:
    lines = []
    for paragraph in text.expandtabs().split("\n"):
        line, width = "", 0
        for character in paragraph:
            advance = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            if unicodedata.combining(character):
                advance = 0
            if width + advance > columns:
                lines.append(line)
                line, width = "", 0
            line, width = line + character, width + advance
        lines.append(line)
    return lines
