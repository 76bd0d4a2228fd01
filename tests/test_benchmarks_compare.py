"""Comparing two results: what is a regression, and what is noise."""

import dataclasses

from benchmarks import __main__, compare, timing
from support.benchmark_results import made_up


def compared(tmp_path, old, new, *words):
    for name, result in (("old", old), ("new", new)):
        result.write(tmp_path / name)
    return __main__.main(["compare", str(tmp_path / "old"), str(tmp_path / "new"), *words])


def test_compare_without_a_regression(tmp_path, capsys):
    assert compared(tmp_path, made_up(), made_up(lambda *_: 205.0)) == 0
    out = capsys.readouterr().out
    assert "No regression." in out
    assert "1.025  anchors ours" in out


def test_compare_with_a_regression(tmp_path, capsys):
    def slower(shape, layout):
        return 230.0 if (shape, layout) == ("b64_2k", "HND") else 200.0

    assert compared(tmp_path, made_up(), made_up(slower)) == 1
    out = capsys.readouterr().out
    assert "3 regressions" in out
    assert "1.150  anchors b64_2k bf16 HND ours v2 cupy: 200.0 -> 230.0 us" in out
    assert compared(tmp_path, made_up(), made_up(slower), "--tolerance", "0.2") == 0


def test_compare_knows_noise():
    old, new = made_up(), made_up(lambda *_: 220.0)
    wide = [
        dataclasses.replace(m, low=0.8 * m.time) if m.system == "ours" else m
        for m in new.measurements
    ]
    found = compare.compare(old, dataclasses.replace(new, measurements=wide))
    assert not found.is_worse
    assert len(found.noise) == 90
    assert "Within the noise" in compare.report(old, new, found, 0.05)


def test_compare_sees_what_broke_and_what_is_missing(tmp_path, capsys):
    old, new = made_up(), made_up()
    ours = [i for i, m in enumerate(new.measurements) if m.system == "ours"]
    new.measurements[ours[0]] = new.measurements[ours[0]].without_time("failed", "why")
    new.measurements[ours[1]] = new.measurements[ours[1]].checked(1.4)
    del new.measurements[ours[2]]
    assert compared(tmp_path, old, new) == 1
    out = capsys.readouterr().out
    assert "2 regressions" in out
    assert "1 measurements only in the old result" in out


def test_compare_does_not_blame_us_for_the_machine(tmp_path, capsys):
    old, new = made_up(), made_up(device="another")
    for i, m in enumerate(new.measurements):
        if m.system == "floor":
            new.measurements[i] = m.timed(timing.summarise([1.5 * m.time] * 3))
    assert compared(tmp_path, old, new) == 0
    out = capsys.readouterr().out
    assert "another" in out
    assert "was it the same machine?" in out


def test_compare_of_strangers_is_no_success(tmp_path):
    assert compared(tmp_path, made_up(), made_up(dtypes="fp8")) == 1
