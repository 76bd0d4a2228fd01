"""`python -m benchmarks accuracy`: its documents, and that it tells good results from bad ones."""

import json

import numpy as np
import pytest

from benchmarks import accuracy
from benchmarks.__main__ import main

pytest.importorskip("matplotlib")
pytest.importorskip("ml_dtypes")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The exit status and the rows of a short run on the CPU."""
    monkeypatch.setattr(accuracy, "LENGTHS", (5, 100))
    monkeypatch.setattr(accuracy, "LOGITS", (1, 80))

    def call():
        status = main(["accuracy", "--device", "cpu", "--out", str(tmp_path), "--name", "short"])
        return status, json.loads((tmp_path / "short.json").read_text())["rows"]

    return call


def test_documents(run, tmp_path, capsys):
    status, rows = run()
    assert status == 0
    assert len(rows) == len(accuracy.KINDS) * 4
    assert {row["length"] for row in rows} == {5, 100}
    assert (tmp_path / "short.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "short.md").read_text()
    assert all(f"| {kind.name} |" in text for kind in accuracy.KINDS)
    assert capsys.readouterr().out.count("of the same precision") == len(rows)


def test_errors_are_those_of_rounding(run):
    largest = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
    for row in run()[1]:
        bound = largest[row["kind"].split(",")[0]]
        assert bound / 20 < row["error"] < bound, row


@pytest.mark.parametrize("fault", ["scale", "last token"])
def test_a_fault_is_found(run, monkeypatch, fault):
    right = accuracy.cupy_paged.paged_attention

    def wrong(query, key_cache, value_cache, block_tables, seq_lens, **options):
        if fault == "scale":
            options["scale"] = 1.02 * query.shape[2] ** -0.5
        else:
            seq_lens = seq_lens - np.int32(1)
        return right(query, key_cache, value_cache, block_tables, seq_lens, **options)

    monkeypatch.setattr(accuracy.cupy_paged, "paged_attention", wrong)
    assert run()[0] == 1
