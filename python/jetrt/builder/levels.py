"""`--opt-level auto`: builds the model at several optimisation levels and keeps the fastest plan that can be trusted.

Every level is built, run for long (a level may crash only now and then), compared with the reference, and timed against
the others round by round. What crashes, hangs, differs or is slower is recorded with its reason.

The rule, on the median of each plan's rounds: two plans tie while their medians are closer than the noise, which is the
sum of their spreads (half the interquartile range of the rounds) and at least 1 %. The default level stays unless
another one beats it by more than the noise; among those that do, the fastest is kept, and of those that tie with it the
lowest level. So nothing that was timed slower than the default level is ever returned, noise or not.

Nothing here builds or runs: `search` is given functions that do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, get_args

from ..errors import BuildCrashError, BuildOptionError, EngineBuildError, JetrtError, ManifestError, ModelError
from ..report import table
from .parity import ParityReport
from .remembered import Remembered

__all__ = [
    "MIN_RUNS",
    "MIN_SECONDS",
    "Built",
    "Failure",
    "LevelRow",
    "LevelTable",
    "Remembered",
    "Trial",
    "choose",
    "search",
]

#: What a level must stand on every profile: this many runs, or this many seconds.
MIN_RUNS, MIN_SECONDS = 1000, 30.0
#: Medians closer than this share of the smaller one tie, however quiet the rounds were.
NOISE_FLOOR = 0.01
_LOG_LINES = 20


# ------------------------------------------------------------------------------------------- what the functions return


@dataclass(frozen=True)
class Built:
    """A plan that was built. `plan` is whatever the other functions take, a path for example."""

    plan: Any
    seconds: float
    bytes: int = 0


@dataclass(frozen=True)
class Trial:
    """Runs and seconds on each profile, in its order."""

    runs: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Failure:
    #: "crash", "timeout", "out of memory", "killed" (`BuildCrashError.how`), "mismatch", or "error".
    how: str
    reason: str
    log: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: JetrtError) -> Failure:
        lines = tuple(getattr(error, "log", None) or ())[-_LOG_LINES:]
        return cls(getattr(error, "how", None) or "error", str(error), lines)


class Build(Protocol):
    def __call__(self, level: int, *, timeout: float) -> Built | Failure: ...


class TryRun(Protocol):
    def __call__(self, plan: Any, *, timeout: float) -> Trial | Failure: ...


class Compare(Protocol):
    def __call__(self, plan: Any, *, timeout: float) -> ParityReport: ...


class Race(Protocol):
    def __call__(self, plans: Mapping[int, Any], *, timeout: float) -> Mapping[int, Sequence[float] | Failure]:
        """Rounds of every plan, in seconds for one pass over the profiles; round i of all plans ran side by side."""


# --------------------------------------------------------------------------------------------------------------- table

State = Literal["chosen", "slower", "tie", "not timed", "failed", "remembered", "not tried"]
Stage = Literal["build", "run", "compare", "race"]


@dataclass(frozen=True)
class LevelRow:
    level: int
    state: State
    reason: str = ""
    #: Where it failed.
    stage: Stage | None = None
    #: `Failure.how`.
    how: str | None = None
    log: tuple[str, ...] = ()
    build_seconds: float | None = None
    bytes: int | None = None
    #: Over all profiles.
    runs: int | None = None
    #: State of the parity report.
    parity: str | None = None
    #: Of the rounds, in seconds; `spread` is half their interquartile range.
    median: float | None = None
    spread: float | None = None


@dataclass(frozen=True)
class LevelTable:
    rows: tuple[LevelRow, ...]
    default_level: int
    #: None if every level failed.
    chosen: int | None = None
    #: What `build` returned for it; not part of the record.
    plan: Any = field(default=None, compare=False)

    def table(self) -> str:
        header = ["level", "", "build s", "runs", "parity", "median ms", "spread ms", "reason"]
        rows = [
            [
                f"{row.level}{' (default)' if row.level == self.default_level else ''}",
                row.state,
                _cell(row.build_seconds, 1, ".1f"),
                _cell(row.runs, 1, "d"),
                row.parity or "",
                _cell(row.median, 1e3, ".3f"),
                _cell(row.spread, 1e3, ".3f"),
                _brief(row.reason),
            ]
            for row in self.rows
        ]
        return table(header, rows)

    def to_mapping(self) -> dict[str, Any]:
        rows = [{**asdict(row), "log": list(row.log)} for row in self.rows]
        return {"chosen": self.chosen, "default_level": self.default_level, "rows": rows}

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> LevelTable:
        """Raises `ManifestError` for a mapping that `to_mapping` cannot have made."""
        try:
            rows = tuple(LevelRow(**{**row, "log": tuple(map(str, row["log"]))}) for row in data["rows"])
            for row in rows:
                if row.state not in get_args(State) or not isinstance(row.level, int):
                    raise ValueError(f"level {row.level!r} is {row.state!r}")
            if [row.level for row in rows if row.state == "chosen"] != [data["chosen"]] * (data["chosen"] is not None):
                raise ValueError(f"chosen is {data['chosen']!r}, and the rows say something else")
            return cls(rows, int(data["default_level"]), data["chosen"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"levels: the record is damaged: {error}. Build again to make a new one.") from error


def _brief(reason: str) -> str:
    """What it was, and what is known about it; the record has the log beside it."""
    first, *rest = reason.splitlines() or [""]
    return " ".join([first, *(line for line in rest if line.startswith("Known "))])


def _cell(value: float | None, factor: float, form: str) -> str:
    return "" if value is None else format(value if form == "d" else value * factor, form)


# ---------------------------------------------------------------------------------------------------------- the choice


class Timing(NamedTuple):
    median: float
    spread: float  # half the interquartile range

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Timing:
        if len(rounds) < 2:
            return cls(rounds[0], 0.0)
        low, _, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return cls(statistics.median(rounds), (high - low) / 2)


def ties(a: Timing, b: Timing) -> bool:
    """Whether the difference of two plans is within the noise."""
    return abs(a.median - b.median) <= max(NOISE_FLOOR * min(a.median, b.median), a.spread + b.spread)


def choose(timings: Mapping[int, Timing], default_level: int) -> int:
    """The level to keep, of those that are correct and were timed (at least one)."""
    rivals = dict(timings)
    default = timings.get(default_level)
    if default is not None:
        rivals = {n: t for n, t in timings.items() if t.median < default.median and not ties(t, default)}
        if not rivals:
            return default_level
    fastest = min(rivals.values(), key=lambda timing: timing.median)
    return min(level for level, timing in rivals.items() if ties(timing, fastest))


# ---------------------------------------------------------------------------------------------------------- the search


def search(
    levels: Sequence[int] = (2, 3, 4, 5),
    *,
    build: Build,
    try_run: TryRun,
    compare: Compare,
    race: Race,
    memory: Remembered | None = None,
    level_seconds: float = 3600.0,
    total_seconds: float = 4 * 3600.0,
    default_level: int = 3,
    retry: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> LevelTable:
    """Tries the levels and keeps one. The default level is tried too, and first: the others have to beat it.

    The four functions are given the seconds that are left to them (the race has those of one level to itself) and end
    by themselves. They may raise jetrt's errors in place of returning a failure. What no level can change ends the
    search: a model or an option that is refused, Ctrl-C. A level whose parity was not run counts as correct only where
    no level's was.

    Raises `EngineBuildError`, with the table in its message and its record as `levels`, if no level is left.
    """
    for level in levels:
        if level not in range(6):
            raise BuildOptionError(
                f"--levels: there is no optimisation level {level}; allowed: 0 to 5. Leave it out.",
                option="--levels",
                found=level,
                allowed="0 to 5",
            )
    search_ = _Search(build, try_run, compare, race, level_seconds, clock() + total_seconds, clock)
    known = {} if memory is None or retry else memory.levels()
    rows = {}
    try:
        for level in dict.fromkeys([default_level, *sorted(levels)]):
            rows[level] = search_.level(level, known.get(level))
        rows = search_.decide(rows, default_level)
    finally:
        if memory is not None:
            memory.update(rows.values())
    ordered = tuple(rows[level] for level in sorted(rows))
    chosen = next((row.level for row in ordered if row.state == "chosen"), None)
    result = LevelTable(ordered, default_level, chosen, search_.plans.get(chosen) if chosen is not None else None)
    if chosen is None:
        last = next((row.log for row in reversed(ordered) if row.log), ())
        again = " --retry-levels tries those again that an earlier run remembers." if known else ""
        raise EngineBuildError(
            f"no optimisation level gave a plan that can be trusted:\n{result.table()}\n"
            f"Try --opt-level 0 or 1, another precision, or another TensorRT version.{again}",
            log=list(last),
            levels=result.to_mapping(),
        )
    return result


@dataclass
class _Search:
    build: Build
    try_run: TryRun
    compare: Compare
    race: Race
    level_seconds: float
    deadline: float
    clock: Callable[[], float]
    plans: dict[int, Any] = field(default_factory=dict)

    def level(self, level: int, known: str | None) -> LevelRow:
        if known is not None:
            return LevelRow(level, "remembered", f"{known} --retry-levels tries it again.")
        started = self.clock()
        if started >= self.deadline:
            return LevelRow(level, "not tried", "The time for all levels was over.")

        def left() -> float:
            return max(min(started + self.level_seconds, self.deadline) - self.clock(), 0.0)

        row = LevelRow(level, "not timed")
        built = _caught(lambda: self.build(level, timeout=left()))
        if isinstance(built, Failure):
            return _failed(row, "build", built)
        row = replace(row, build_seconds=built.seconds, bytes=built.bytes)
        trial = _caught(lambda: self.try_run(built.plan, timeout=left()))
        if isinstance(trial, Failure):
            return _failed(row, "run", trial)
        row = replace(row, runs=sum(trial.runs))
        if not trial.runs:
            return _failed(row, "run", Failure("error", "It was run on no profile."))
        for profile, (runs, seconds) in enumerate(zip(trial.runs, trial.seconds, strict=True)):
            if runs < MIN_RUNS and seconds < MIN_SECONDS:
                short = f"{runs} runs in {seconds:.1f} s on profile {profile}; needed: {MIN_RUNS} or {MIN_SECONDS:g} s."
                return _failed(row, "run", Failure("error", f"It was not run for long enough: {short}"))
        report = _caught(lambda: self.compare(built.plan, timeout=left()))
        if isinstance(report, Failure):
            return _failed(row, "compare", report)
        row = replace(row, parity=report.state)
        if report.state == "failed":
            output = next((o for _, o in report.failures()), None)
            why = report.reason or (f"output {output.output!r}: {'; '.join(output.reasons)}" if output else "")
            return _failed(row, "compare", Failure("mismatch", why))
        self.plans[level] = built.plan
        return row

    def decide(self, rows: Mapping[int, LevelRow], default_level: int) -> dict[int, LevelRow]:
        """Times what is left and names the one to keep."""
        rows = dict(rows)
        correct = [level for level in self.plans if rows[level].parity == "passed"] or list(self.plans)
        for level in set(self.plans) - set(correct):
            rows[level] = _failed(rows[level], "compare", Failure("error", "Parity was not run, and was for others."))
        if not correct:
            return rows
        rounds: Mapping[int, Sequence[float] | Failure] = {}
        if len(correct) > 1:
            answer = _caught(
                lambda: self.race({level: self.plans[level] for level in correct}, timeout=self.level_seconds)
            )
            rounds = dict.fromkeys(correct, answer) if isinstance(answer, Failure) else answer
        timings: dict[int, Timing] = {}
        failures: dict[int, Failure] = {}
        for level in correct:
            found = rounds.get(level, _NOT_TIMED)
            if isinstance(found, Failure):
                failures[level] = found
            else:
                timings[level] = Timing.of(list(found))
        if not timings:  # the race could not be had, or there was only one to run it
            chosen = default_level if default_level in correct else min(correct)
            for level, failure in failures.items():
                reason = failure.reason if len(correct) > 1 else ""
                rows[level] = replace(rows[level], reason=reason, log=failure.log[-_LOG_LINES:])
            rows[chosen] = replace(rows[chosen], state="chosen")
            return rows
        for level, failure in failures.items():
            rows[level] = _failed(rows[level], "race", failure)
        chosen = choose(timings, default_level)
        for level, timing in timings.items():
            rows[level] = _verdict(rows[level], chosen, timing, timings[chosen])
        return rows


_NOT_TIMED = Failure("error", "It was not timed.")


def _caught(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except (BuildOptionError, ModelError):
        raise
    except JetrtError as error:
        if isinstance(error, BuildCrashError) and error.how == "interrupted":
            raise
        return Failure.of(error)


def _failed(row: LevelRow, stage: Stage, failure: Failure) -> LevelRow:
    lines = failure.log[-_LOG_LINES:]
    return replace(row, state="failed", stage=stage, how=failure.how, reason=failure.reason, log=lines)


def _verdict(row: LevelRow, chosen: int, timing: Timing, best: Timing) -> LevelRow:
    row = replace(row, median=timing.median, spread=timing.spread)
    if row.level == chosen:
        return replace(row, state="chosen")
    difference = f"{100 * (timing.median / best.median - 1):+.1f} % against level {chosen}" if best.median else ""
    return replace(row, state="tie" if ties(timing, best) else "slower", reason=difference)
