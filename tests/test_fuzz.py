"""Random cases of every operator on host arrays, and the fuzzer's own work."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from cupy_paged import reference
from fuzz import attention, runner, space
from support import frameworks, oracle

SEEDS, CASES = 10, 200


def failures_of(seed, cases):
    found = runner.run_cases([(seed, case) for case in cases], "host")
    return [failure for _, failure in found if failure is not None]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_cases(seed):
    failures = failures_of(seed, range(CASES))
    assert not failures, "\n".join(map(str, failures))


def test_a_few_seeds_meet_all_sizes():
    drawn = [runner.drawn(seed, CASES, "host") for seed in range(SEEDS)]
    assert set().union(*(one["head_sizes"] for one in drawn)) == set(range(8, 513, 8))
    assert set().union(*(one["block_sizes"] for one in drawn)) == set(range(1, 257))
    assert sum(sum(one["frameworks"].values()) for one in drawn) == SEEDS * CASES


def test_a_case_is_the_same_where_a_framework_is_missing(monkeypatch):
    words = [runner.run_case(3, case, "host") for case in range(12)]
    only = frameworks.host()[:1]
    monkeypatch.setattr(runner, "adapters", lambda on: only)
    for case, was in enumerate(words):
        now = runner.run_case(3, case, "host")
        assert re.sub(" of [a-z]+,", "", now) == re.sub(" of [a-z]+,", "", was)
        assert f" of {only[0].name}," in now


def test_specialisations_meet_every_value_of_every_axis():
    found = [chosen.template for chosen in space.specialisations(0) if chosen.kind == "attention"]
    assert len(space.specialisations(0)) == space.NUM_SPECIALISATIONS
    for axis, count in (
        ("dtype", 3), ("kv_cache_dtype", 4), ("layout", 3), ("alibi", 2), ("strides", 4),
        ("num_kv_heads", 3), ("head_size", 12), ("block_size", 10), ("group", 14),
    ):  # fmt: skip
        assert len({getattr(template, axis) for template in found}) >= count, axis
    assert sum(template.sparse is not None for template in found) >= 10


def attention_cases(count):
    """The first cases of attention, of which there are more than of anything else."""
    return [n for n in range(3 * count) if space.of_case(0, n)[0].kind == "attention"][:count]


def test_a_case_is_the_same_whatever_ran_before():
    number = attention_cases(9)[-1]
    assert runner.run_case(0, number, "host") == runner.run_case(0, number, "host")
    assert runner.run_case(1, number, "host") != runner.run_case(0, number, "host")


def test_a_wrong_token_is_found_and_can_be_run_again(monkeypatch, capsys):
    gather = reference._gather

    def without_the_second_token(cache, blocks, dtype):
        tokens = gather(cache, blocks, dtype).copy()
        tokens[:, 1:2] = tokens[:, :1]
        return tokens

    monkeypatch.setattr(reference, "_gather", without_the_second_token)
    found = failures_of(0, attention_cases(30))
    assert len(found) >= 10
    seed, case = found[0].seed, found[0].case
    assert str(found[0]).startswith(f"FAILED  python -m tests.fuzz --seed {seed} --case {case}  #")
    with pytest.raises(runner.CaseError, match="attention of "):
        runner.main(["--seed", str(seed), "--case", str(case), "--device", "host"])
    assert runner.main(["--cases", str(case + 1), "--device", "host"]) == 1
    log = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert case in [failure["case"] for failure in log["seeds"]["0"]["failures"]]


def test_needles_decide_their_rows():
    # Without one, thousands of tokens have a share so small that one of them would not be missed.
    shares = []
    for number in attention_cases(60):
        chosen, rng = space.of_case(0, number)
        problem = attention.draw(replace(chosen.template, sparse=None, alibi=False), rng)
        for seq, seq_len in enumerate(problem.case.seq_lens):
            row = problem.query[seq], problem.key_cache, problem.value_cache
            row = *row, problem.block_tables[seq], seq_len
            rows = oracle.heads_of(*row, **problem.rules) if seq_len > 100 else ()
            shares += [1 / oracle.softmax_sum(logits, value)[2] for _, logits, value, _ in rows]
    assert len(shares) > 100
    assert np.median(shares) > 0.9
    assert np.mean(np.array(shares) > 0.5) > 0.95


@pytest.mark.parametrize(("seeds", "cases"), [(1, 40), (2, 20)])
def test_workers_share_all_cases(seeds, cases, capsys):
    several = "--seed", "4", "--seeds", str(seeds), "--cases", str(cases), "--workers", "2"
    assert runner.main([*several, "--device", "host"]) == 0
    log = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (log["not_run"], log["device"]) == (0, "CPU")
    assert list(log["seeds"]) == [str(4 + i) for i in range(seeds)]
    for found in log["seeds"].values():
        assert (found["cases"], found["failures"], found["specialisations"]) == (cases, [], cases)
        assert sum(found["frameworks"].values()) == cases


def test_cases_behind_a_lost_device_are_not_judged(monkeypatch):
    class CUDARuntimeError(RuntimeError):
        pass

    causes = {2: ValueError("wrong"), 4: CUDARuntimeError("an illegal memory access")}

    def run_case(seed, case, on):
        if case in causes:
            raise runner.CaseError(f"case {case}", causes[case])

    monkeypatch.setattr(runner, "run_case", run_case)
    found = [failure for _, failure in runner.run_cases([(0, n) for n in range(10)], "host")]
    assert [failure and failure.case for failure in found] == [None, None, 2, None, 4]
    assert "illegal memory access" in found[-1].error


def test_a_worker_that_dies_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(runner.sys, "executable", "false")
    assert runner.main(["--cases", "4", "--device", "host", "--workers", "2"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["not_run"] == 4
