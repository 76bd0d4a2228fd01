"""How the benchmarks take times."""

from benchmarks import frameworks, timing
from support.benchmark_host import FakeReplay


def test_time_is_the_median_without_the_first_replay():
    replay = FakeReplay([lambda: None] * 4, microseconds=100.0)
    found = timing.time_replays(replay, 7)
    assert found == timing.Timing(25.0, 25.0, 25.0, 25.0, 25.0, 7)


def test_replays_follow_the_length():
    assert timing.replays_for(400) == 100
    assert timing.replays_for(1400) == 29
    assert timing.replays_for(1e5) == timing.FEWEST
    assert timing.replays_for(0) == timing.MOST
    assert timing.time_replays(FakeReplay([print], 2000.0)).replays == 20


def test_summary_has_quartiles():
    found = timing.summarise([4, 1, 3, 2, 5])
    assert found == timing.Timing(3, 2, 4, 1, 5, 5)


def test_wall_clock_waits_for_each_stamp():
    waits = []
    clock = timing.WallClock(lambda: waits.append(1))
    first, second = clock.stamp(), clock.stamp()
    assert len(waits) == 2
    assert clock.microseconds(first, second) >= 0
    assert clock.microseconds(1.0, 1.5) == 5e5


def test_chain_waits_for_its_last_call():
    waited = []
    chain = frameworks.Chain([lambda: "first", lambda: "last"], waited.append)
    chain.launch()
    chain.clock.wait()
    assert (chain.count, waited) == (2 * frameworks.CHAIN, ["last"])
