"""Timing, ratios and tables of the speed benchmark, on a clock that moves only when told."""

import gc
import json

import pytest

from bayesguard.benchmarks.speed.limits import Rates
from bayesguard.benchmarks.speed.measure import Call, Candidate, Spread, Timings, calling, interleaved
from bayesguard.benchmarks.speed.table import Row, as_json, as_markdown, as_text, row_of, rows_at_main_samples, tables


class FakeClock:
    """A clock that moves only when a call says how long it took."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, *seconds: float) -> Call:
        """Return a call that takes these times in turn, the last one from then on."""
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


# Timing.


def test_a_slow_candidate_is_seen_as_slow() -> None:
    clock = FakeClock()
    calls = {"ours": calling(clock.taking(0.6)), "loop": calling(clock.taking(0.2))}
    ratio = interleaved(calls, 5, clock).ratio("ours", "loop")
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((3.0, 3.0, 3.0))


def test_medians_and_ranges() -> None:
    clock = FakeClock()
    # The first call warms up; it takes more than a second, so that no second one is made.
    timings = interleaved({"ours": calling(clock.taking(9.0, 1.0, 5.0, 2.0, 3.0, 4.0))}, 5, clock)
    assert timings.of("ours") == Spread(3.0, 1.0, 5.0)


def test_ratios_are_taken_within_a_round() -> None:
    timings = Timings({"ours": [1.0, 10.0, 2.0], "loop": [2.0, 20.0, 8.0]})
    assert timings.ratio("ours", "loop") == Spread(0.5, 0.25, 0.5)


def test_candidates_take_turns() -> None:
    clock, order = FakeClock(), list[str]()
    wait = clock.taking(2.0)

    def named(name: str) -> Candidate:
        def call() -> None:
            order.append(name)
            wait()

        return calling(call)

    interleaved({name: named(name) for name in "abc"}, 3, clock)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_short_calls_are_made_often_and_the_mean_counts() -> None:
    clock, made = FakeClock(), list[int]()

    def call() -> None:
        made.append(1)
        clock.now += 0.001

    timings = interleaved({"ours": calling(call)}, 4, clock)
    assert len(made) == 2 + 4 * 20
    assert timings.of("ours").median == pytest.approx(0.001)


def test_calls_that_use_up_their_state_are_prepared_anew() -> None:
    clock, prepared = FakeClock(), list[int]()

    def prepare() -> Call:
        clock.now += 100.0  # preparing does not count
        prepared.append(1)
        return clock.taking(0.001)

    timings = interleaved({"ours": Candidate(prepare, repeatable=False)}, 5, clock)
    assert len(prepared) == 2 + 5
    assert timings.of("ours").high == pytest.approx(0.001)


def test_a_part_of_the_work_is_scaled() -> None:
    clock = FakeClock()
    assert interleaved({"loop": calling(clock.taking(1.5), scale=10)}, 3, clock).of("loop").median == 15.0


def test_three_rounds_where_they_are_long() -> None:
    clock = FakeClock()
    timings = interleaved({"a": calling(clock.taking(15.0)), "b": calling(clock.taking(6.0))}, 5, clock)
    assert len(timings.seconds["a"]) == 3


def test_only_optional_candidates_may_fail() -> None:
    clock = FakeClock()

    def fail() -> None:
        raise RuntimeError("no such kernel")

    calls = {"ours": calling(clock.taking(1.0)), "peer": calling(fail)}
    timings = interleaved(calls, 3, clock, optional=["peer"])
    assert timings.skipped == {"peer": "RuntimeError: no such kernel"}
    assert list(timings.seconds) == ["ours"]
    with pytest.raises(RuntimeError, match="no such kernel"):
        interleaved(calls, 3, clock)


def test_the_collector_is_as_it_was_after_an_error() -> None:
    seen = list[bool]()

    def fail() -> None:
        seen.append(gc.isenabled())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        interleaved({"ours": calling(fail)}, 1, FakeClock())
    assert seen == [False]
    assert gc.isenabled()


def test_the_limit_is_a_sum_of_parts() -> None:
    timings = Timings({"before": [1.0, 2.0], "after": [3.0, 4.0]})
    timings.combined("limit", {"before": 1, "after": 50})
    assert timings.seconds["limit"] == [151.0, 202.0]


def test_the_longer_of_products_and_copies_bounds() -> None:
    rates = Rates(operations=100.0, bytes=10.0)
    assert rates.seconds(1000, 10) == 10.0
    assert rates.seconds(10, 1000) == 100.0


# Rows and tables.


def example_rows() -> list[Row]:
    timings = Timings({"ours": [1.0, 2.0, 3.0], "loop": [10.0, 10.0, 10.0], "slow": [40.0] * 3, "quick": [5.0] * 3})
    timings.seconds["limit"] = [1.0] * 3
    peers = ["slow", "quick", "missing"]
    ratio = row_of(timings, "mlp", "MC dropout", "loop", peers=peers, limit="limit", must=0.25, aim=0.17, note="replay")
    return [ratio, Row("draws", "draws", Spread(31.0, 30.0, 32.0), must=25, aim=17, unit="draws")]


def test_a_row_has_everything_in_one_unit() -> None:
    row = example_rows()[0]
    assert row.value == Spread(0.2, 0.1, 0.3)
    assert row.fastest_peer == ("quick", 0.5)
    assert row.limit == pytest.approx(0.1)
    assert row.seconds["ours"] == 2.0


@pytest.mark.parametrize(
    ("value", "must", "aim", "verdict"),
    [
        (0.1, 0.25, 0.17, "aim"),
        (0.2, 0.25, 0.17, "must"),
        (0.3, 0.25, 0.17, "missed"),
        (0.2, 0.25, None, "must"),
        (9.0, None, None, ""),
    ],
)
def test_verdicts(value: float, must: float | None, aim: float | None, verdict: str) -> None:
    assert Row("mlp", "", Spread(value, value, value), must=must, aim=aim).verdict == verdict


def test_markdown() -> None:
    lines = as_markdown(example_rows()).splitlines()
    assert lines[0] == "| case | ours | over | must | aim |  | fastest peer | limit |"
    assert lines[2] == "| MC dropout | 0.2 [0.1, 0.3] | loop | 0.25 | 0.17 | must | 0.5 (quick) | 0.1 |"
    assert lines[3] == "| draws | 31 draws [30, 32] |  | 25 | 17 | missed |  |  |"
    assert len({line.count("|") for line in lines}) == 1


def rows_of_draws() -> list[Row]:
    values = {10: 0.4, 50: 0.2, 100: 0.1}
    dropout = [
        Row("mlp", f"MC dropout, S={n}, masks shared", Spread(v, v, v), "loop", must=0.3 if n == 50 else None)
        for n, v in values.items()
    ]
    memory = [Row("memory", f"memory, S={n}", Spread(1.0, 1.0, 1.0), "one pass", must=1.5) for n in (10, 100)]
    return [*dropout, *memory, Row("draws", "draws", Spread(31.0, 30.0, 32.0))]


def test_the_first_table_has_each_case_once() -> None:
    # The number of draws with a demand; where all have one, the nearest to 50; what has no draws is kept.
    names = [row.name for row in rows_at_main_samples(rows_of_draws())]
    assert names == ["MC dropout, S=50, masks shared", "memory, S=10", "draws"]
    variational = [Row("v", f"v, S={n}", Spread(1, 1, 1), must=1.2 if n == 20 else None) for n in (20, 50)]
    assert [row.name for row in rows_at_main_samples(variational)] == ["v, S=20"]


def test_the_second_table_has_a_column_for_each_number_of_draws() -> None:
    first, title, second = tables(rows_of_draws()).split("\n\n")
    assert first == as_markdown(rows_at_main_samples(rows_of_draws()))
    assert title == "Other numbers of draws:"
    assert second.splitlines() == [
        "| case | over | S=10 | S=50 | S=100 |",
        "|---|---|---|---|---|",
        "| MC dropout, masks shared | loop | 0.4 [0.4, 0.4] | 0.2 [0.2, 0.2] | 0.1 [0.1, 0.1] |",
        "| memory | one pass | 1 [1, 1] |  | 1 [1, 1] |",
    ]
    assert tables(example_rows()) == as_markdown(example_rows())  # one number of draws needs no second table


def test_text_has_aligned_columns_and_notes() -> None:
    lines = as_text(example_rows()).splitlines()
    assert lines[0].index("over") == lines[2].index("loop")
    assert lines[-1] == "MC dropout: replay"


def test_json_goes_and_comes_back() -> None:
    rows = json.loads(json.dumps(as_json(example_rows()), allow_nan=False))
    assert rows[0]["value"] == {"median": 0.2, "low": 0.1, "high": 0.3}
    assert rows[0]["peers"] == {"slow": 4.0, "quick": 0.5}
    assert (rows[0]["verdict"], rows[0]["fastest_peer"], rows[1]["fastest_peer"]) == ("must", "quick", None)
