"""`--opt-level auto`: which level is kept, what is recorded, what is remembered."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetrt import errors
from jetrt.builder import remembered as remembered_module
from jetrt.builder.levels import NOISE_FLOOR, Built, Failure, LevelTable, Timing, Trial, choose, search, ties
from jetrt.builder.parity import Case, Thresholds, judge, not_run
from jetrt.builder.reference import Reference
from jetrt.builder.remembered import Remembered

ONES = np.ones(3, np.float32)
CASES = [Case(0, "opt", {})]
REFERENCES = [Reference("onnxruntime", {"y": ONES}, {}, 0.0)]
PASSED = judge(CASES, [{"y": ONES}], REFERENCES, Thresholds.of("fp32"))
MISMATCH = judge(CASES, [{"y": 2 * ONES}], REFERENCES, Thresholds.of("fp32"))
CRASH = Failure("crash", "signal 6 (SIGABRT)", ("[E] 1", "[E] CUDA error 400"))
HANG = Failure("timeout", "no answer for 10 s")


@dataclass
class Machine:
    """Stands for the build and the GPU: what each level does, and a clock that its steps move."""

    build_: dict[int, Any] = field(default_factory=dict)
    run: dict[int, Any] = field(default_factory=dict)
    parity: dict[int, Any] = field(default_factory=dict)
    rounds: Any = field(default_factory=dict)
    step: float = 1.0
    now: float = 0.0
    calls: list[tuple[str, Any, float]] = field(default_factory=list)

    def _answer(self, what, given, level, timeout, default):
        self.calls.append((what, level, timeout))
        self.now += self.step
        answer = given.get(level, default)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def build(self, level, *, timeout):
        return self._answer("build", self.build_, level, timeout, Built(f"plan{level}", 2.5, 100))

    def try_run(self, plan, *, timeout):
        return self._answer("run", self.run, int(plan[-1]), timeout, Trial((1000,), (1.0,)))

    def compare(self, plan, *, timeout):
        return self._answer("compare", self.parity, int(plan[-1]), timeout, PASSED)

    def race(self, plans, *, timeout):
        self.calls.append(("race", sorted(plans), timeout))
        if isinstance(self.rounds, (BaseException, Failure)):
            if isinstance(self.rounds, BaseException):
                raise self.rounds
            return self.rounds
        assert plans == {level: f"plan{level}" for level in plans}
        return {level: self.rounds.get(level, [0.010] * 9) for level in plans}

    def search(self, levels=(2, 3, 4, 5), **options):
        return search(
            levels,
            build=self.build,
            try_run=self.try_run,
            compare=self.compare,
            race=self.race,
            clock=lambda: self.now,
            **options,
        )

    def tried(self, what):
        return [level for name, level, _ in self.calls if name == what]


def states(table):
    return {row.level: row.state for row in table.rows}


def row(table, level):
    (found,) = [row for row in table.rows if row.level == level]
    return found


# ---------------------------------------------------------------------------------------------------------- the choice


def test_the_fastest_correct_one_is_kept():
    machine = Machine(rounds={2: [0.012] * 9, 3: [0.010] * 9, 4: [0.008] * 9, 5: [0.011] * 9})
    table = machine.search()
    assert (table.chosen, table.plan) == (4, "plan4")
    assert states(table) == {2: "slower", 3: "slower", 4: "chosen", 5: "slower"}
    assert row(table, 3).reason == "+25.0 % against level 4"
    assert (row(table, 4).median, row(table, 4).spread, row(table, 4).runs, row(table, 4).parity) == (
        0.008,
        0.0,
        1000,
        "passed",
    )
    assert machine.tried("race") == [[2, 3, 4, 5]]


def test_the_default_level_is_tried_first_and_wins_ties():
    machine = Machine(rounds={3: [0.01] * 9, 4: [0.00991] * 9, 5: [0.00995] * 9})
    table = machine.search((5, 4))
    assert machine.tried("build") == [3, 4, 5]
    assert states(table) == {3: "chosen", 4: "tie", 5: "tie"}


def test_the_noise_of_the_rounds_counts():
    """Medians 10 % apart do not differ when single rounds do by 30 %."""
    noisy = [0.0075, 0.0085, 0.0090, 0.0105, 0.0110]
    machine = Machine(rounds={3: [0.0085, 0.0095, 0.0100, 0.0115, 0.0120], 4: noisy})
    assert machine.search((3, 4)).chosen == 3
    machine = Machine(rounds={3: [0.0100] * 5, 4: [0.0090] * 5})
    assert machine.search((3, 4)).chosen == 4


def test_among_equals_that_beat_the_default_the_lower_level_is_kept():
    table = Machine(rounds={3: [0.010] * 5, 4: [0.00803] * 5, 5: [0.0080] * 5}).search((3, 4, 5))
    assert states(table) == {3: "slower", 4: "chosen", 5: "tie"}


TIMINGS = st.dictionaries(
    st.integers(0, 5), st.lists(st.floats(1e-5, 1.0), min_size=1, max_size=12).map(Timing.of), min_size=1
)


@given(TIMINGS, st.integers(0, 5))
def test_never_slower_than_the_default_or_than_the_fastest_beyond_noise(timings, default):
    chosen = choose(timings, default)
    assert chosen in timings
    fastest = min(timings.values(), key=lambda timing: timing.median)
    if default in timings:
        assert timings[chosen].median <= timings[default].median
        if chosen != default:
            assert not ties(timings[chosen], timings[default])
        rivals = [t for t in timings.values() if t.median < timings[default].median and not ties(t, timings[default])]
        assert (chosen == default) == (not rivals)
    else:
        assert ties(timings[chosen], fastest)
        assert not any(ties(timings[level], fastest) for level in timings if level < chosen)


@given(TIMINGS, st.integers(0, 5), st.floats(0.01, 100))
def test_the_choice_does_not_depend_on_the_unit(timings, default, factor):
    # A power of two, so that nothing is rounded.
    factor = 2.0 ** round(np.log2(factor))
    scaled = {level: Timing(t.median * factor, t.spread * factor) for level, t in timings.items()}
    assert choose(scaled, default) == choose(timings, default)


@given(st.floats(1e-4, 1.0), st.floats(0, 1))
def test_one_percent_is_noise_whatever_the_spread(median, share):
    assert ties(Timing(median, 0.0), Timing(median * (1 + 0.999 * share * NOISE_FLOOR), 0.0))
    assert not ties(Timing(median, 0.0), Timing(median * (1 + 1.001 * NOISE_FLOOR), 0.0))


def test_spread_is_half_the_interquartile_range():
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 1.0)
    assert Timing.of([5.0]) == (5.0, 0.0)


BEHAVIOURS = st.sampled_from(["fine", "build", "run", "short", "mismatch", "race"])


@given(
    st.dictionaries(st.integers(0, 5), st.tuples(BEHAVIOURS, st.floats(0.001, 0.1)), min_size=1),
    st.integers(0, 5),
)
def test_what_failed_is_never_kept(levels, default):
    machine = Machine(rounds={})
    for level, (behaviour, seconds) in levels.items():
        machine.rounds[level] = CRASH if behaviour == "race" else [seconds] * 3
        if behaviour == "build":
            machine.build_[level] = CRASH
        elif behaviour == "run":
            machine.run[level] = HANG
        elif behaviour == "short":
            machine.run[level] = Trial((1000, 999), (1.0, 29.9))
        elif behaviour == "mismatch":
            machine.parity[level] = MISMATCH
    ok = {level for level, (behaviour, _) in levels.items() if behaviour == "fine"} | ({default} - set(levels))
    alone = {level for level, (behaviour, _) in levels.items() if behaviour == "race"}
    try:
        table = machine.search(levels, default_level=default)
    except errors.EngineBuildError:
        assert not ok
        assert not alone
        return
    # Where the race itself fails for everyone, one of those that ran and agreed is kept untimed.
    assert table.chosen in (ok or alone)
    assert table.plan == f"plan{table.chosen}"
    assert {r.level for r in table.rows} == set(levels) | {default}
    if default in ok:
        chosen = levels.get(table.chosen, ("fine", 0.01))[1]
        assert chosen <= levels.get(default, ("fine", 0.01))[1]


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_failures_are_recorded_with_reason_and_log():
    machine = Machine(
        build_={0: CRASH},
        run={1: HANG},
        parity={2: MISMATCH, 4: errors.BuildCrashError("out of memory", how="out of memory", log=["a", "b"])},
    )
    table = machine.search((0, 1, 2, 4))
    assert table.chosen == 3
    assert [(r.level, r.state, r.stage, r.how) for r in table.rows] == [
        (0, "failed", "build", "crash"),
        (1, "failed", "run", "timeout"),
        (2, "failed", "compare", "mismatch"),
        (3, "chosen", None, None),
        (4, "failed", "compare", "out of memory"),
    ]
    assert row(table, 0).log == ("[E] 1", "[E] CUDA error 400")
    assert row(table, 4).log == ("a", "b")
    assert row(table, 2).reason.startswith("1 of 1 comparisons; output 'y' at opt of profile 0: max_rel")
    assert machine.tried("race") == []  # one is left
    text = table.table()
    assert "3 (default)  chosen" in text
    assert "signal 6 (SIGABRT)" in text


def test_only_the_last_log_lines_are_kept():
    machine = Machine(build_={2: Failure("crash", "died", tuple(map(str, range(100))))})
    assert row(machine.search((2, 3)), 2).log == tuple(map(str, range(80, 100)))


@pytest.mark.parametrize(
    ("trial", "fails"),
    [
        (Trial((1000,), (0.1,)), False),
        (Trial((1,), (30.0,)), False),
        (Trial((1000, 5), (9.0, 31.0)), False),
        (Trial((1000, 999), (9.0, 29.0)), True),
        (Trial((), ()), True),
    ],
)
def test_a_short_trial_proves_nothing(trial, fails):
    table = Machine(run={4: trial}).search((3, 4))
    assert (row(table, 4).state == "failed") == fails
    if fails and trial.runs:
        assert "999 runs in 29.0 s on profile 1; needed: 1000 or 30 s." in row(table, 4).reason


def test_all_failed():
    machine = Machine(build_={2: CRASH, 3: Failure("error", "refused")}, run={4: HANG}, parity={5: MISMATCH})
    with pytest.raises(
        errors.EngineBuildError, match="no optimisation level gave a plan that can be trusted"
    ) as caught:
        machine.search()
    assert "signal 6 (SIGABRT)" in str(caught.value)
    assert "Try --opt-level 0 or 1" in str(caught.value)
    assert caught.value.log == ["[E] 1", "[E] CUDA error 400"]
    assert LevelTable.from_mapping(caught.value.levels).chosen is None


@pytest.mark.parametrize(
    "error",
    [
        errors.ModelError("the parser refused it"),
        errors.BuildOptionError("no such flag"),
        errors.BuildCrashError("stopped", how="interrupted"),
        KeyboardInterrupt(),
        ZeroDivisionError(),  # our own mistake
    ],
)
def test_what_no_level_can_change_ends_the_search(error):
    machine = Machine(build_={3: error})
    with pytest.raises(type(error)):
        machine.search()
    assert machine.tried("build") == [3]


def test_parity_that_was_not_run_is_no_pass():
    unknown = not_run("no onnxruntime")
    table = Machine(parity=dict.fromkeys((2, 3), unknown), rounds={2: [1.0], 3: [2.0]}).search((2, 3))
    assert table.chosen == 2
    assert row(table, 2).parity == "not run"
    table = Machine(parity={2: unknown}, rounds={2: [1.0], 3: [2.0]}).search((2, 3))
    assert states(table) == {2: "failed", 3: "chosen"}


def test_a_race_that_cannot_be_had_leaves_the_default():
    for failure in (CRASH, errors.CudaError("gone"), {}):
        machine = Machine(rounds=failure) if failure != {} else Machine()
        if failure == {}:
            machine.race = lambda plans, timeout: {}
        table = machine.search((2, 3, 4))
        assert states(table) == {2: "not timed", 3: "chosen", 4: "not timed"}
        assert row(table, 2).reason
    machine = Machine(rounds=CRASH, build_={3: CRASH})
    assert machine.search((2, 3, 4)).chosen == 2


def test_limits_of_time():
    machine = Machine(step=10.0)
    table = machine.search(level_seconds=25.0, total_seconds=65.0)
    left = {(what, level): timeout for what, level, timeout in machine.calls if what != "race"}
    assert (left["build", 3], left["run", 3], left["compare", 3]) == (25.0, 15.0, 5.0)
    assert (left["build", 4], left["build", 2]) == (5.0, 25.0)  # at 30 s, 60 s and so on
    assert states(table) == {2: "tie", 3: "chosen", 4: "tie", 5: "not tried"}
    assert row(table, 5).reason == "The time for all levels was over."
    assert machine.calls[-1] == ("race", [2, 3, 4], 25.0)


def test_levels_that_do_not_exist():
    with pytest.raises(errors.BuildOptionError, match="--levels: there is no optimisation level 6; allowed: 0 to 5"):
        Machine().search((3, 6))


# ---------------------------------------------------------------------------------------------------------- the record


def test_table_goes_through_json():
    machine = Machine(build_={2: CRASH}, parity={5: MISMATCH}, rounds={4: [0.008] * 3})
    table = machine.search(total_seconds=11.0)
    data = json.loads(json.dumps(table.to_mapping(), allow_nan=False))
    assert LevelTable.from_mapping(data) == table
    assert data["chosen"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": 2}, "chosen is 2, and the rows say something else"),
        ({"chosen": None}, "chosen is None"),
        ({"rows": [{"level": 3}]}, "'log'"),
        ({"rows": [{"level": 3, "state": "fine", "log": []}]}, "level 3 is 'fine'"),
        ({"rows": [{"level": 3, "state": "chosen", "log": [], "more": 1}]}, "more"),
        ({"rows": 7}, "not iterable"),
    ],
)
def test_damaged_record(change, message):
    data = Machine().search((3,)).to_mapping()
    with pytest.raises(errors.ManifestError, match=f"levels: the record is damaged: .*{message}"):
        LevelTable.from_mapping({**data, **change})


# ---------------------------------------------------------------------------------------------- crashes of earlier runs


IDENTITY = {
    "tensorrt": "10.6.0.26",
    "gpu": "NVIDIA H200",
    "sm_count": 132,
    "model_sha256": "ab" * 32,
    "options": {"precision": "fp16"},
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "levels.json"


def memory(path, **changes):
    return Remembered(**{**IDENTITY, **changes}, path=path)


def test_a_level_that_crashed_is_not_tried_again_unless_asked(path):
    machine = Machine(build_={2: CRASH}, run={4: HANG, 5: Failure("killed", "signal 9")}, parity={1: MISMATCH})
    machine.search((1, 2, 3, 4, 5), memory=memory(path))

    again = Machine()
    table = again.search((1, 2, 3, 4, 5), memory=memory(path))
    assert again.tried("build") == [3, 1, 5]  # a difference or a kill may have another reason than the level
    assert states(table) == {1: "tie", 2: "remembered", 3: "chosen", 4: "remembered", 5: "tie"}
    assert "An earlier run saw a crash (build, 2" in row(table, 2).reason
    assert "An earlier run saw a timeout (run, " in row(table, 4).reason
    assert "--retry-levels tries it again." in row(table, 2).reason

    asked = Machine(run={4: HANG})
    assert asked.search((2, 3, 4), memory=memory(path), retry=True).chosen == 3
    assert asked.tried("build") == [3, 2, 4]
    assert sorted(memory(path).levels()) == [4]  # 2 works again


@pytest.mark.parametrize(
    "change",
    [
        {"tensorrt": "10.7.0.1"},
        {"gpu": "Orin"},
        {"sm_count": 114},
        {"model_sha256": "cd" * 32},
        {"options": {"precision": "bf16"}},
    ],
)
def test_another_library_gpu_or_model_is_tried(path, change):
    Machine(build_={2: CRASH}).search((2, 3), memory=memory(path))
    assert list(memory(path).levels()) == [2]
    assert memory(path, **change).levels() == {}


def test_a_build_that_takes_too_long_may_be_given_more_time(path):
    Machine(build_={2: HANG}).search((2, 3), memory=memory(path))
    assert memory(path).levels() == {}


def test_when_nothing_works_the_levels_are_not_to_blame(path):
    with pytest.raises(errors.EngineBuildError):
        Machine(build_=dict.fromkeys((2, 3), CRASH)).search((2, 3), memory=memory(path))
    assert not path.exists()


def test_all_levels_remembered_says_how_to_try_again(path):
    Machine(build_={2: CRASH, 3: CRASH}).search((2, 3, 4), memory=memory(path))
    with pytest.raises(errors.EngineBuildError, match="--retry-levels tries those again"):
        Machine().search((2, 3), memory=memory(path))


def test_nothing_is_written_when_there_is_nothing_to_remember(path):
    Machine().search(memory=memory(path))
    assert not path.parent.exists()


def test_a_crash_is_remembered_when_the_search_is_interrupted(path):
    machine = Machine(build_={2: CRASH, 4: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        machine.search(memory=memory(path))
    assert list(memory(path).levels()) == [2]


def _nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"3",
        b'{"entries": []}',
        b'{"entries"',
        b'{"other": {}}',
        _nested(100_000).encode(),
    ],
)
def test_a_damaged_file_counts_as_empty_and_is_replaced(path, content, caplog):
    path.parent.mkdir()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "jetrt.build"):
        assert memory(path).levels() == {}
    assert "is damaged and counts as empty" in caplog.text
    Machine(build_={2: CRASH}).search((2, 3), memory=memory(path))
    assert list(memory(path).levels()) == [2]
    assert [p.name for p in path.parent.iterdir()] == ["levels.json"]  # no lock, no temporary file


@pytest.mark.parametrize(
    "entry", [None, 3, {}, {"levels": []}, {"levels": {"x": {}, "2": None, "3": {"how": "crash"}}}]
)
def test_a_damaged_entry_counts_as_empty(path, entry):
    path.parent.mkdir()
    own = memory(path)
    path.write_text(json.dumps({"entries": {own._key: entry, "other": 5}}))
    assert own.levels() == {}
    Machine(build_={4: CRASH}).search((3, 4), memory=own)
    assert 4 in own.levels()
    assert json.loads(path.read_text())["entries"]["other"] == 5


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "jetrt.build"):
        table = Machine(build_={2: CRASH}).search((2, 3), memory=memory(tmp_path / "file" / "levels.json"))
    assert table.chosen == 3
    assert "crashed levels could not be remembered" in caplog.text


def test_the_file_does_not_grow_for_ever(path, monkeypatch):
    monkeypatch.setattr(Remembered, "_ENTRIES", 3)
    for i in range(5):
        Machine(build_={2: CRASH}).search((2, 3), memory=memory(path, model_sha256=str(i)))
    kept = [i for i in range(5) if memory(path, model_sha256=str(i)).levels()]
    assert kept == [2, 3, 4]


def test_the_place_follows_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Remembered(**IDENTITY).path == tmp_path / "jetrt" / "levels.json"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unusable in ("", "relative"):  # the specification has a relative one ignored
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert remembered_module._cache_folder() == tmp_path / "home" / ".cache" / "jetrt"


def test_processes_do_not_lose_each_others_entries(path):
    script = textwrap.dedent(
        """
        import sys
        from jetrt.builder.levels import LevelRow
        from jetrt.builder.remembered import Remembered
        for i in range(10):
            Remembered(tensorrt="10", gpu="g", sm_count=1, model_sha256=f"{sys.argv[2]}.{i}", options={},
                       path=sys.argv[1]).update([LevelRow(3, "chosen"), LevelRow(2, "failed", how="crash")])
        """
    )
    children = [subprocess.Popen([sys.executable, "-c", script, path, str(n)], env=os.environ) for n in range(4)]
    assert [child.wait(60) for child in children] == [0] * 4
    assert len(json.loads(path.read_text())["entries"]) == 40
