"""Docstrings that are plain text, with aligned tables of arguments, as HTML that reads the same."""

from __future__ import annotations

import html
import inspect
import re

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonConsoleLexer

_CODE = re.compile(r"`([^`\n]+)`")
# Columns, or lines that hang below others.
_ALIGNED = re.compile(r"\S {2,}\S|^ ", re.M)


def to_html(docstring: str) -> str:
    """Each paragraph as what it is: an example, a list, a table, or prose.

    >>> to_html("Adds `a` to 1 < b.")
    '<p>Adds <code>a</code> to 1 &lt; b.</p>'
    >>> to_html("a   int")
    '<pre class="aligned">a   int</pre>'
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    # `cleandoc` leaves the indentation of paragraphs; the end of each line is nothing.
    return "\n".join(_paragraph(paragraph.rstrip()) for paragraph in paragraphs if paragraph)


def _paragraph(text: str) -> str:
    if text.startswith(">>> "):
        formatter = HtmlFormatter(cssclass="pdoc-code codehilite")
        return highlight(text + "\n", PythonConsoleLexer(), formatter)
    if text.startswith("- "):
        items = re.split(r"^- ", text, flags=re.M)[1:]
        return "<ul>" + "".join(f"<li>{_prose(item.strip())}</li>" for item in items) + "</ul>"
    if _ALIGNED.search(text):
        return f'<pre class="aligned">{html.escape(text, quote=False)}</pre>'
    return f"<p>{_prose(text)}</p>"


def _prose(text: str) -> str:
    return _CODE.sub(r"<code>\1</code>", html.escape(text, quote=False))
