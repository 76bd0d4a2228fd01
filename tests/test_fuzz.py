"""Random cases of every operator on host arrays, and the fuzzer's own work."""

import json
from dataclasses import replace

import numpy as np
import pytest

from cupy_paged import reference
from fuzz import attention, runner, space
from support import oracle

SEEDS, CASES = 10, 200


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_cases(seed):
    failures = [f for f in runner.run_cases(seed, range(CASES), "host") if f is not None]
    assert not failures, "\n".join(map(str, failures))


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
    found = [f for f in runner.run_cases(0, attention_cases(30), "host") if f is not None]
    assert len(found) >= 10
    seed, case = found[0].seed, found[0].case
    assert str(found[0]).startswith(f"FAILED  python -m tests.fuzz --seed {seed} --case {case}  #")
    with pytest.raises(runner.CaseError, match="attention of "):
        runner.main(["--seed", str(seed), "--case", str(case), "--device", "host"])
    assert runner.main(["--cases", str(case + 1), "--device", "host"]) == 1
    log = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert case in [failure["case"] for failure in log["failures"]]


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


def test_workers_share_all_cases(capsys):
    assert runner.main(["--cases", "40", "--device", "host", "--workers", "2"]) == 0
    log = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (log["cases"], log["not_run"], log["failures"]) == (40, 0, [])
    assert (log["seed"], log["device"]) == (0, "CPU")


def test_cases_behind_a_lost_device_are_not_judged(monkeypatch):
    class CUDARuntimeError(RuntimeError):
        pass

    causes = {2: ValueError("wrong"), 4: CUDARuntimeError("an illegal memory access")}

    def run_case(seed, case, on):
        if case in causes:
            raise runner.CaseError(f"case {case}", causes[case])

    monkeypatch.setattr(runner, "run_case", run_case)
    found = list(runner.run_cases(0, range(10), "host"))
    assert [failure and failure.case for failure in found] == [None, None, 2, None, 4]
    assert "illegal memory access" in found[-1].error


def test_a_worker_that_dies_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(runner.sys, "executable", "false")
    assert runner.main(["--cases", "4", "--device", "host", "--workers", "2"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["not_run"] == 4
