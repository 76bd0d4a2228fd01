"""Results of the benchmarks: as documents, tables and charts."""

import dataclasses
import math

import pytest

from benchmarks import __main__, chart, published, results, summary, tables, timing
from benchmarks.results import Measurement, Result
from benchmarks.shapes import LAYOUTS
from support.benchmark_results import as_published, made_up

MIB = 2**20


def test_result_survives_the_disk(tmp_path):
    result = made_up()
    result.write(tmp_path / "new" / "r.json")
    assert results.read(tmp_path / "new" / "r.json") == result
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.json"]


def test_other_documents_are_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 1"):
        results.read(path)


def test_an_error_that_is_no_number_can_be_written(tmp_path):
    blank = Measurement(suite="anchors", shape="x", system="xqa", op="")
    checked = blank.timed(timing.summarise([1.0, 1.0])).checked(math.nan)
    Result({}, {}, {}, [checked]).write(tmp_path / "r.json")
    assert results.read(tmp_path / "r.json").measurements[0].status == "wrong"


def test_markdown():
    words = tables.markdown(made_up(as_published), "a title", "a.png")
    assert words.startswith("# a title\n")
    assert "![" in words
    row = next(line for line in words.splitlines() if line.startswith("| b64_2k: 64x2048"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["512 MiB", "177.7"]
    assert cells[3:7] == ["188.6 (0.94)"] * 3 + ["198.3 (0.90)"]
    assert "FlashInfer 0.6.4, published" in words
    assert "not measured in this run" in words
    assert "jax: not installed: no module" in words
    assert "RuntimeError: no kernel" in words
    assert "b1_8k vllm 0.670 (0.88)" in words
    assert "1.0% of the time in the middle case" in words
    assert "cut short" not in words
    assert "cut short" in tables.markdown(dataclasses.replace(made_up(), finished=False), "x")


def test_against_published_times_and_peers():
    found = made_up(as_published).measurements
    flashinfer = summary.against_published(found)[0]
    assert (flashinfer.other, flashinfer.layout) == ("FlashInfer 0.6.4, published", "vllm")
    assert flashinfer.geometric_mean == pytest.approx(1)
    here = summary.against_measured(found)
    assert [a.layout for a in here] == list(LAYOUTS)
    assert here[0].ratios["b64_2k"] == pytest.approx(198.3 / 188.6)
    assert here[0].worst == "b1_8k"


def test_the_faster_variant_of_a_peer_counts():
    blank = Measurement(suite="anchors", shape="x", system="flashinfer", op="a", moved_bytes=1)
    slow, fast = (
        dataclasses.replace(blank, op=op).timed(timing.summarise([t, t]))
        for op, t in zip("ab", (3, 2), strict=True)
    )
    ours = dataclasses.replace(blank, system="ours", op="paged_attention", layout="HND")
    (found,) = summary.against_measured([slow, fast, ours.timed(timing.summarise([1.0, 1.0]))])
    assert found.ratios == {"x": pytest.approx(2)}


def test_targets_follow_the_bytes():
    targets = [published.target_efficiency(mib * MIB) for mib in (8, 16, 32, 64, 128, 256, 2048)]
    assert targets == [None, 0.75, 0.88, 0.88, 0.92, 0.95, 0.95]


def test_chart(tmp_path):
    pytest.importorskip("matplotlib", reason="the test extra has it")
    assert chart.draw(made_up(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not chart.draw(Result({}, {}, {}, []), tmp_path / "b.png")


def test_chart_has_a_line_for_each_system():
    found = made_up(as_published).measurements
    lines = chart.lines(found)
    assert list(lines) == ["ours, vllm", "ours, HND", "ours, NHD", "xqa"]
    assert lines["ours, HND"][0] == (32.0, pytest.approx(13.6 / 20.3))
    assert len(chart.through(lines["ours, HND"])) == 6
    assert [len(points) for points in chart.published_lines(found, "bf16").values()] == [10]


def test_chart_has_the_better_kernel_of_a_peer_and_then_no_published_times():
    found = made_up(as_published).measurements
    for op, time in (("CUDA cores", 4.0), ("tensor cores", 2.0), ("others", 3.0)):
        blank = Measurement(suite="anchors", shape="x", system="flashinfer", op=op)
        blank = dataclasses.replace(blank, moved_bytes=MIB, dtypes="bf16")
        found.append(blank.timed(timing.summarise([time, time]), floor=1.0))
    assert chart.lines(found)["flashinfer"] == [(1.0, 0.5)]
    assert chart.published_lines(found, "bf16") == {}


def test_render_needs_no_matplotlib(tmp_path, monkeypatch, capsys):
    def no_matplotlib(*arguments):
        raise ImportError("matplotlib")

    monkeypatch.setattr(chart, "draw", no_matplotlib)
    path = tmp_path / "r.json"
    made_up().write(path)
    assert __main__.main(["render", str(path)]) == 0
    assert "![" not in (tmp_path / "r.md").read_text()
    assert "bench extra" in capsys.readouterr().out
