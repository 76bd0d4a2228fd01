"""The command of the benchmarks: its options, and what a run leaves."""

import argparse
import json
from pathlib import Path

import pytest

import cupy_paged
from benchmarks import (
    __main__,
    attention_suite,
    compile_suite,
    data,
    device,
    environment,
    frameworks,
    host_suite,
    merge_suite,
    moves_suite,
    results,
    run,
    shapes,
)
from support.benchmark_host import (
    HostArrays,
    HostDevice,
    small_case,
    small_runner,
)


@pytest.fixture
def runner(tmp_path, monkeypatch):
    return small_runner(tmp_path, monkeypatch)


def parse(*words):
    return __main__.build_parser().parse_args(["run", *words])


def test_options():
    plain = parse()
    assert (plain.suite, plain.systems, plain.replays) == (["anchors"], ["ours", "floor"], None)
    given = parse(
        "--shapes", "b1_*", "b64*", "--systems", "ours,xqa", "--layouts", "HND,NHD", "--dtypes",
        "fp8", "--suite", "all", "--replays", "9", "--out", "x", "--time-budget", "120",
    )  # fmt: skip
    assert (given.systems, given.layouts, given.dtypes) == (
        ["ours", "xqa"],
        ["HND", "NHD"],
        ["fp8"],
    )
    assert (given.replays, given.out, given.time_budget) == (9, Path("x"), 120.0)
    assert run.chosen_suites(given.suite) == list(run.SUITES)
    names = [s.name for s in shapes.ANCHORS if shapes.matches(s.name, given.shapes)]
    assert names == ["b1_8k", "b1_128k", "b64_2k", "b64_d64"]
    recorded = run.recorded_options(given)
    assert "out" not in recorded
    json.dumps(recorded)


@pytest.mark.parametrize(
    "words",
    [
        ("--systems", "ours,other"),
        ("--layouts", ""),
        ("--dtypes", "fp4"),
        ("--replays", "1"),
        ("--time-budget", "0"),
        ("--suite", "other"),
    ],
)
def test_wrong_options_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[0] in capsys.readouterr().err


def test_parser_needs_a_command(capsys):
    with pytest.raises(SystemExit):
        __main__.main([])
    assert isinstance(__main__.build_parser(), argparse.ArgumentParser)


def test_measure_runs_the_suites_that_were_asked_for(runner, monkeypatch):
    ran = []
    monkeypatch.setattr(attention_suite, "run", lambda s, cases, *rest: ran.append(cases))
    monkeypatch.setattr(merge_suite, "run", lambda *a: ran.append("merge"))
    monkeypatch.setattr(moves_suite, "run", lambda *a: ran.append("moves"))
    monkeypatch.setattr(host_suite, "run", lambda s: ran.append("host"))
    monkeypatch.setattr(compile_suite, "run", lambda s: ran.append("compile"))
    run.measure(runner, parse("--suite", "all", "--shapes", "b1_8k", "base"), ["ours"])
    anchors, wide, *rest = ran
    assert [(c.shape.name, c.dtypes) for c in anchors] == [("b1_8k", "bf16"), ("b1_8k", "fp8")]
    assert [c.shape.name for c in wide] == ["base"] * 3
    assert rest == ["merge", "moves", "host", "compile"]


def test_run_leaves_a_document_tables_and_a_chart(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the test extra has it")
    monkeypatch.setattr(device, "Device", HostDevice)
    monkeypatch.setattr(frameworks, "CuPy", HostArrays)
    monkeypatch.setattr(data, "MIN_BYTES", 1)
    monkeypatch.setattr(shapes, "ANCHORS", (small_case().shape,))
    monkeypatch.setattr(run.signal, "signal", lambda *a: None)
    words = ["--dtypes", "bf16", "--layouts", "HND", "--replays", "3", "--name", "x", "--out"]
    command = ["run", *words, str(tmp_path / "new"), "--ops"]
    assert __main__.main([*command, "v1"]) == 0
    result = results.read(tmp_path / "new" / "x.json")
    assert result.finished
    assert [m.op for m in result.measurements] == ["streaming read", "v1"]
    assert result.options["replays"] == 3
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"x.json", "x.md"}  # v1 is no line
    assert "ours v1" in capsys.readouterr().out

    assert __main__.main([*command, "v1", "--time-budget", "1e-9"]) == 0
    assert not results.read(tmp_path / "new" / "x.json").finished
    assert __main__.main([*command, "paged_attention"]) == 0
    assert (tmp_path / "new" / "x.png").exists()


def test_run_without_a_gpu_says_so(tmp_path, monkeypatch, capsys):
    def no_device():
        raise ImportError("No module named 'cupy'")

    monkeypatch.setattr(device, "Device", no_device)
    assert __main__.main(["run", "--out", str(tmp_path)]) == 2
    assert "No module named 'cupy'" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_environment_can_be_recorded():
    found = environment.describe()
    assert found["cupy_paged"] == cupy_paged.__version__
    assert {"device", "driver", "nvrtc", "commit", "date", "versions"} <= set(found)
    json.dumps(found)
