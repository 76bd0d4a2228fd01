"""Builds the site: `python -m docs [FOLDER]`, from the checkout, with the `docs` extra.

The pages are docs/*.md; the reference is made from the docstrings. A warning, or a link to nowhere,
is an error.
"""

from __future__ import annotations

import ast
import importlib
import shutil
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pdoc.doc
import pdoc.render
import pdoc.render_helpers
from markupsafe import Markup

from docs import pages, plain

SITE = pages.DOCS / "_site"
SYNTHETIC = {f"cupy_paged.interop.{name}" for name in ("torch_ops", "jax_ops", "transformers")}
"""Modules that cannot be imported without a framework."""


def described(name: str) -> pdoc.doc.Module:
    """A module of the package, as pdoc sees it."""
    if name not in SYNTHETIC:
        return pdoc.doc.Module(importlib.import_module(name))
    source = (pages.ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    return pdoc.doc.Module(ModuleType(name, ast.get_docstring(ast.parse(source))))


def build(site: Path) -> None:
    """Writes the site into a folder, in place of what was there."""
    if site.exists():
        if not (site / "search.js").exists() and any(site.iterdir()):
            raise SystemExit(f"{site}: is no site, and is left as it is")
        shutil.rmtree(site)
    texts = {name: pages.for_site(pages.text_of(name)) for name in pages.PAGES}
    guide = {name: pdoc.doc.Module(ModuleType(name, text)) for name, (text, _) in texts.items()}
    api = {name: described(name) for name in pages.API}

    templates = pages.DOCS / "templates"
    pdoc.render.configure(
        docformat="markdown", show_source=False, search=True, template_directory=templates
    )
    # A line of prose may begin with a number and a full stop.
    pdoc.render_helpers.markdown_extensions.pop("cuddled-lists", None)
    environment = pdoc.render.env
    environment.filters["plain"] = lambda text: Markup(plain.to_html(text))
    environment.globals.update(
        guide={name: pages.title_of(pages.text_of(name)) for name in guide},
        api=pages.API,
        constructed=pages.CONSTRUCTED,
        relative_link=pdoc.render_helpers.relative_link,
    )

    for module in (*guide.values(), *api.values()):
        path = site / f"{module.modulename.replace('.', '/')}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pdoc.render.html_module(module, api), encoding="utf-8")
    (site / "search.js").write_text(pdoc.render.search_index({**guide, **api}), encoding="utf-8")
    for file in set().union(*(files for _, files in texts.values())):
        (site / "files" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(pages.ROOT / file, site / "files" / file)


class References(HTMLParser):
    """The anchors of a page, and what it points to."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.ids.add(value or "")
            elif name in ("href", "src") and value:
                self.targets.append(value)


def broken_links(site: Path) -> list[str]:
    """Links between the files of a site that lead nowhere."""
    found: dict[Path, References] = {}
    for path in site.rglob("*.html"):
        found[path.resolve()] = References()
        found[path.resolve()].feed(path.read_text(encoding="utf-8"))
    broken = []
    for page, references in found.items():
        for target in references.targets:
            if ":" in target.partition("/")[0]:  # of another place
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / unquote(path)).resolve() if path else page
            there = file.is_file()
            if there and anchor and file in found:
                there = unquote(anchor) in found[file].ids
            if not there:
                broken.append(f"{page.relative_to(site.resolve())}: {target} leads nowhere")
    return broken


def main(site: Path) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # pdoc evaluates annotations; Python takes this one as it stands only from 3.12 on.
        warnings.filterwarnings("ignore", r"Error parsing type annotation array\[int\]")
        build(site)
    wrong = [f"{w.filename}:{w.lineno}: {w.message}" for w in caught] + broken_links(site)
    for line in wrong:
        print(line, file=sys.stderr)
    if not wrong:
        print(f"{site}/index.html")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else SITE))
