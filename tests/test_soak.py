"""A short soak on the CPU, and that it notices what it looks for."""

import concurrent.futures
import json

import numpy as np
import pytest

import soak


def test_a_short_soak(capsys):
    assert soak.main(["--steps", "400", "--workers", "1", "--device", "cpu"]) == 0
    assert '"failures": []' in capsys.readouterr().out


def test_every_event_comes_up():
    counts = soak.soak(seed=1, steps=400, on_gpu=False)
    assert all(counts[name] for name in ("added", "forked", "cut", "moved", "ended", "compared"))


def test_memory_of_one_worker_does_not_make_up_for_that_of_another(monkeypatch, capsys):
    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, workers, context):
            super().__init__(workers)

    def worker(seed, *_):
        return {"steps": 5, "grown_bytes": 100 * (1 - seed), "grown_pool_bytes": 7 * seed}

    monkeypatch.setattr(soak.concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(soak, "soak", worker)
    assert soak.main(["--steps", "20", "--workers", "4", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["soak"]
    assert found == {"steps": 20, "grown_bytes": 100, "grown_pool_bytes": 21}


@pytest.mark.parametrize("fault", ["a key in the wrong slot", "a step that is lost"])
def test_a_fault_is_found(fault, monkeypatch):
    right = soak.cupy_paged.PagedKVCache.write

    def wrong(self, layer, key, value, batch):
        if fault == "a key in the wrong slot":
            key = np.roll(key, 1, axis=0)
        else:
            key, value = key * 0, value * 0
        right(self, layer, key, value, batch)

    worker = soak.Worker(seed=2, on_gpu=False)
    for _ in range(30):
        running, _ = worker.step()
    monkeypatch.setattr(soak.cupy_paged.PagedKVCache, "write", wrong)
    for _ in range(5):
        running, out = worker.step()
    monkeypatch.undo()
    with pytest.raises(AssertionError, match=r"other bits|is off"):
        for _ in range(20):
            worker.compare(running, out)


def test_a_row_of_what_nobody_wrote_is_found(monkeypatch):
    worker = soak.Worker(seed=3, on_gpu=False)
    worker.look(worker.step()[1])
    worker.check_looks()
    monkeypatch.setattr(soak.cupy_paged.PagedKVCache, "write", lambda *arguments: None)
    worker.look(worker.step()[1])
    worker.look(np.zeros(3))
    with pytest.raises(AssertionError, match="has read what no sequence has written"):
        worker.check_looks()
