"""The pages in docs: their examples run, their links lead somewhere, and a site comes of them."""

import doctest
import html
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys

import pytest

import cupy_paged
from docs import pages
from support import fake_vllm
from support.examples import check_says_what_it_needs, imported, is_module, run
from support.receipt import ROOT

TEXTS = {name: pages.text_of(name) for name in pages.PAGES}
EXAMPLES = {
    f"{name}-{number}": code
    for name, text in TEXTS.items()
    for number, code in enumerate(pages.examples(text), 1)
}
BUILD = "python -m docs"
BUILDS_THE_SITE = pytest.mark.skipif(
    importlib.util.find_spec("pdoc") is None,
    reason="pdoc is not installed; the docs extra has it, and CI builds the site",
)


# ---- examples ----


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, monkeypatch):
    if "vllm" in imported(EXAMPLES[name]):
        fake_vllm.put_in_place(monkeypatch, fake_vllm.module())
    run(name, EXAMPLES[name], monkeypatch)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_asserts_its_result(name):
    assert re.search(r"^ *assert ", EXAMPLES[name], re.M)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_says_what_it_needs(name):
    check_says_what_it_needs(EXAMPLES[name])


def test_every_guide_has_examples():
    with_examples = {name.rpartition("-")[0] for name in EXAMPLES}
    assert with_examples == set(pages.PAGES) - {"PERFORMANCE", "RELIABILITY"}


def test_examples_of_cupy_need_a_gpu_for_streams_alone():
    code = [code for code in EXAMPLES.values() if "cupy" in imported(code)]
    assert sum("cp.cuda." not in one for one in code) >= 5


# ---- links ----


def test_there_are_no_other_pages():
    assert {path.stem for path in pages.DOCS.glob("*.md")} == set(pages.PAGES)
    reached = {link.removesuffix(".md") for link in pages.links(TEXTS["index"])}
    assert set(pages.PAGES) - {"index"} <= reached


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for link in pages.links(TEXTS[name]):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (pages.DOCS / path).resolve() if path else pages.DOCS / f"{name}.md"
        assert target.is_file() and ROOT in target.parents, link
        if anchor:
            assert anchor in pages.anchors(target.read_text(encoding="utf-8")), link


def test_names_in_the_pages_exist():
    for name, text in TEXTS.items():
        for dotted in re.findall(r"`(cupy_paged(?:\.\w+)+)`", text):
            module, attribute = dotted, ""
            while importlib.util.find_spec(module.partition(".")[0]) and not is_module(module):
                module, _, last = module.rpartition(".")
                attribute = f"{last}.{attribute}".strip(".")
            found = importlib.import_module(module) if attribute else None
            for part in filter(None, attribute.split(".")):
                found = getattr(found, part)  # an AttributeError names it
            assert module.startswith("cupy_paged"), f"{name}: {dotted}"


# ---- the site ----


def test_a_page_as_the_site_has_it():
    text = (
        "[a](torch.md#x) ![b](../LICENSE) [c](https://d.md)\n```python\nx[0](e.md)\n```\n[f](#g)\n"
    )
    shown, files = pages.for_site(text)
    assert files == {"LICENSE"}
    assert shown == (
        "[a](torch.html#x) ![b](files/LICENSE) [c](https://d.md)\n"
        "```python\nx[0](e.md)\n```\n[f](#g)\n"
    )


def test_the_reference_has_every_public_name():
    assert pages.API["cupy_paged"] == cupy_paged.__all__
    for module, names in pages.API.items():
        assert not names or set(names) <= set(vars(importlib.import_module(module)))


def test_docstrings_read_the_same_as_html():
    plain = pytest.importorskip("docs.plain", reason="pygments is not installed")
    assert doctest.testmod(plain).failed == 0
    for module, names in pages.API.items():
        for owner in (getattr(importlib.import_module(module), name) for name in names):
            check_reads_the_same(plain, owner.__doc__)
            for member in vars(owner).values() if inspect.isclass(owner) else ():
                if inspect.isfunction(member) and member.__doc__:
                    check_reads_the_same(plain, member.__doc__)


def check_reads_the_same(plain, docstring):
    shown = html.unescape(re.sub(r"<[^>]*>", "", plain.to_html(docstring)))
    assert shown.replace("`", "").split() == docstring.replace("`", "").split()
    # A table of arguments keeps its columns.
    aligned = re.findall(r'<pre class="aligned">(.*?)</pre>', plain.to_html(docstring), re.S)
    lines = {line for table in aligned for line in html.unescape(table).split("\n")}
    for line in inspect.cleandoc(docstring).split("\n"):
        if re.match(r"\w+,? {2,}\S", line):
            assert line in lines


@BUILDS_THE_SITE
def test_the_site_is_built_without_a_warning(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "docs", str(site)]
    for _ in range(2):  # the second time in place of the first
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for name in (*pages.PAGES, *(module.replace(".", "/") for module in pages.API)):
        assert (site / f"{name}.html").is_file()
    shown = (site / "cupy_paged.html").read_text(encoding="utf-8")
    for name in cupy_paged.__all__:
        assert f'<section id="{name}">' in shown


@BUILDS_THE_SITE
def test_a_link_of_the_site_to_nowhere_is_an_error(tmp_path):
    broken_links = importlib.import_module("docs.__main__").broken_links
    (tmp_path / "a.html").write_text('<a href="b.html#here"></a><a href="#there"></a>')
    (tmp_path / "b.html").write_text('<p id="here"></p><a href="https://c.org/d"></a>')
    assert broken_links(tmp_path) == ["a.html: #there leads nowhere"]
    (tmp_path / "b.html").unlink()
    assert len(broken_links(tmp_path)) == 2


@BUILDS_THE_SITE
def test_a_folder_that_is_no_site_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="is no site"):
        importlib.import_module("docs.__main__").build(tmp_path)
    assert (tmp_path / "mine").exists()


def test_one_command_builds_the_site_and_ci_runs_it():
    ci = (ROOT / ".ci" / "run").read_text()
    assert f"\n{BUILD}\n" in TEXTS["index"] and BUILD in (ROOT / "README.md").read_text()
    assert f"  {BUILD}" in ci and 'pip install -e ".[docs]"' in ci
    ignored = (ROOT / ".gitignore").read_text().split("\n")
    assert "/docs/_site/" in ignored
