"""Which pages there are, in the order of the site, and what they link to."""

from __future__ import annotations

import re
from pathlib import Path

import cupy_paged

DOCS = Path(__file__).parent
ROOT = DOCS.parent

PAGES = [
    "index", "cupy", "torch", "jax", "dlpack", "vllm", "transformers", "streams", "numerics",
    "RELIABILITY",
    "PERFORMANCE",
]  # fmt: skip
"""The Markdown files of this folder."""

API = {
    "cupy_paged": cupy_paged.__all__,
    "cupy_paged.batches": ["Batch"],
    "cupy_paged.sequences": ["Sequence", "Statistics"],
    "cupy_paged.layouts": [],
    "cupy_paged.masks": ["BlockSparse"],
    "cupy_paged.interop.torch_ops": [],
    "cupy_paged.interop.jax_ops": [],
    "cupy_paged.interop.transformers": [],
    "cupy_paged.interop.vllm": ["install"],
    "cupy_paged.interop.replacement": ["Replacement"],
}
"""What the reference has of each module, beside the module's own docstring."""

CONSTRUCTED = ["PagedKVCache", "BlockAllocator", "Replacement"]
"""The classes of which users make objects; the others they are given."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_HEADING = re.compile(r"^#+ (.+)$", re.M)


def text_of(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def title_of(text: str) -> str:
    """The first heading of a page."""
    return _HEADING.search(text)[1]


def examples(text: str) -> list[str]:
    """The Python code of a page."""
    return [code for language, code in _FENCE.findall(text) if language == "python"]


def links(text: str) -> list[str]:
    """Where a page points to, code aside."""
    return [target for _, target, _ in _LINK.findall(_FENCE.sub("", text))]


def anchors(text: str) -> set[str]:
    """The headings of a page, as links name them."""
    kept = (re.sub(r"[^\w\s-]", "", heading) for heading in _HEADING.findall(_FENCE.sub("", text)))
    return {re.sub(r"[\s-]+", "-", heading).strip("-").lower() for heading in kept}


def for_site(text: str) -> tuple[str, set[str]]:
    """A page as the site has it, and the files of the repository that it points to.

    Those are copied to the site's folder `files`, so that it needs nothing beside it.
    """
    files: set[str] = set()

    def moved(link: re.Match[str]) -> str:
        path, hash_, anchor = link[2].partition("#")
        if "://" in path or not path:
            return link[0]
        if path.startswith("../"):
            files.add(path.removeprefix("../"))
            path = "files/" + path.removeprefix("../")
        elif path.endswith(".md"):
            path = path.removesuffix(".md") + ".html"
        return f"{link[1]}{path}{hash_}{anchor}{link[3]}"

    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(moved, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join(parts) + _LINK.sub(moved, text[end:]), files
