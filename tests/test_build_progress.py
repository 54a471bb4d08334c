"""What a build shows while it runs, character by character, under a clock that the test moves."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetrt.builder.progress import KINDS, Reporter, _cut, reporter
from jetrt.errors import BuildOptionError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def new(self) -> str:
        """What came since this was asked last."""
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text


class Notebook:
    """`IPython.display.display`: every output with all that it ever showed."""

    def __init__(self) -> None:
        self.outputs: list[list[str]] = []

    def __call__(self, data: dict[str, str], *, raw: bool, display_id: bool = False) -> Any:
        assert raw
        output = [data["text/plain"]]
        self.outputs.append(output)

        def update(data: dict[str, str], *, raw: bool) -> None:
            assert raw
            output.append(data["text/plain"])

        return SimpleNamespace(update=update) if display_id else None


class Build:
    """Plays a child: time passes with ticks, four in a second (exact in binary)."""

    def __init__(self, kind: str, stream: Any = None, columns: int = 200, display: Any = None) -> None:
        self.clock = Clock()
        self.reporter = reporter(kind, stream, clock=self.clock, width=lambda: columns, display=display)

    def title(self, text: str) -> None:
        self.began = self.clock.now
        self.reporter.title(text)

    def phase(self, name: str) -> None:
        self.reporter.event({"event": "phase", "phase": name})

    def progress(self, kind: str, phase: str, number: int = 0, parent: str = "") -> None:
        self.reporter.event({"event": "progress", "kind": kind, "phase": phase, "parent": parent, "number": number})

    def log(self, level: int) -> None:
        self.reporter.event({"event": "log", "level": level, "line": "a line of TensorRT"})

    def wait(self, seconds: float) -> None:
        start = self.clock.now
        for turn in range(1, round(seconds * 4) + 1):
            self.clock.now = start + turn / 4
            self.reporter.tick(self.clock.now - self.began)


def shown(stream: Terminal) -> str:
    """What stands in the line now."""
    return re.sub(r"\x1b\[K", "", stream.getvalue().rpartition("\r")[2])


def play(build: Build) -> None:
    """The same build for every kind."""
    build.title("building m.engine")
    build.wait(0.25)
    build.phase("parse")
    build.wait(0.5)
    build.phase("build")
    build.progress("start", "Building Engine", 4)
    build.progress("start", "Timing graph nodes", 20, "Building Engine")
    build.progress("step", "Timing graph nodes", 11)
    build.log(30)
    build.wait(1)
    build.reporter.note("the timing cache is of another GPU\nand was not used")
    build.wait(0.5)
    build.progress("finish", "Timing graph nodes")
    build.progress("step", "Building Engine", 0)
    build.wait(21.5)
    build.title("trying m.engine")
    build.wait(0.25)
    build.phase("run")
    build.wait(0.25)
    build.reporter.done("m.engine is built")
    build.reporter.clear()


# ----------------------------------------------------------------------------------------------------- exact, per kind


def test_plain_lines() -> None:
    stream = io.StringIO()
    play(Build("plain", stream))
    assert stream.getvalue().splitlines() == [
        "[0:00] building m.engine",
        "[0:00] building m.engine: parse",
        "[0:00] building m.engine: build",
        "the timing cache is of another GPU",
        "and was not used",
        "[0:10, 1 warning] building m.engine: build: Building Engine (step 2 of 4)",
        "[0:20, 1 warning] building m.engine: build: Building Engine (step 2 of 4)",
        "[0:00, 1 warning] trying m.engine",
        "[0:00, 1 warning] trying m.engine: run",
        "m.engine is built (0:24, 1 warning)",
    ]


def test_the_line_of_a_terminal_is_rewritten_when_it_changes() -> None:
    stream = Terminal()
    play(Build("terminal", stream))
    inner, outer = "Timing graph nodes (step 13 of 20)", "Building Engine (step 1 of 4)"
    start = [
        "[0:00] building m.engine",
        "[0:00] building m.engine: parse",
        f"[0:01, 1 warning] building m.engine: build: {inner} in {outer}",
    ]
    again = [
        f"[0:02, 1 warning] building m.engine: build: {inner} in {outer}",
        *(f"[0:{n:02}, 1 warning] building m.engine: build: Building Engine (step 2 of 4)" for n in range(2, 24)),
        "[0:00, 1 warning] trying m.engine",
        "[0:00, 1 warning] trying m.engine: run",
    ]
    assert stream.getvalue() == (
        "".join(f"\r{line}\x1b[K" for line in start)
        + "\r\x1b[Kthe timing cache is of another GPU\nand was not used\n"
        + "".join(f"\r{line}\x1b[K" for line in again)
        + "\r\x1b[Km.engine is built (0:24, 1 warning)\n"
    )


def test_the_output_of_a_notebook_is_updated() -> None:
    display = Notebook()
    play(Build("notebook", display=display))
    line, *others = display.outputs
    assert line[:2] == ["[0:00] building m.engine", "[0:00] building m.engine: parse"]
    assert line[2].startswith("[0:01, 1 warning] building m.engine: build: Timing graph nodes (step 13 of 20) in ")
    assert "[0:20, 1 warning] building m.engine: build: Building Engine (step 2 of 4)" in line
    ends = ["[0:00, 1 warning] trying m.engine", "[0:00, 1 warning] trying m.engine: run", ""]
    assert line[-3:] == ends
    assert others == [
        ["the timing cache is of another GPU\nand was not used"],
        ["m.engine is built (0:24, 1 warning)"],
    ]


def test_the_end_of_a_build_takes_the_place_of_its_progress() -> None:
    display = Notebook()
    build = Build("notebook", display=display)
    build.title("t")
    build.reporter.done("built")
    assert display.outputs == [["[0:00] t", ""], ["built (0:00)"]]


def test_none_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    display, stream = Notebook(), Terminal()
    play(Build("none", stream, display=display))
    assert (stream.getvalue(), display.outputs, capfd.readouterr()) == ("", [], ("", ""))


# ------------------------------------------------------------------------------------------------------------- phases


def status(play: Callable[[Build], None]) -> str:
    stream = Terminal()
    build = Build("terminal", stream)
    build.title("t")
    play(build)
    build.wait(0.25)
    return shown(stream)


def test_nested_phases_are_shown_from_the_innermost() -> None:
    def nested(build: Build) -> None:
        build.phase("build")
        build.progress("start", "A", 4)
        build.progress("start", "B", 1, "A")
        build.progress("start", "C", 100, "B")
        build.progress("step", "C", 98)

    assert status(nested) == "[0:00] t: build: C (step 100 of 100) in B in A (step 1 of 4)"


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([("start", "A", 3)], "A (step 1 of 3)"),
        ([("start", "A", 3), ("step", "A", 0)], "A (step 2 of 3)"),
        ([("start", "A", 3), ("step", "A", 2)], "A (step 3 of 3)"),
        ([("start", "A", 3), ("step", "A", 7)], "A (step 3 of 3)"),
        ([("start", "A", 9), ("step", "A", 5), ("step", "A", 2)], "A (step 7 of 9)"),  # two threads, out of order
        ([("start", "A", 1)], "A"),
        ([("start", "A", 0)], "A"),
        ([("start", "A", 3), ("finish", "A", 0)], ""),
        ([("start", "A", 3), ("start", "B", 2), ("finish", "A", 0)], "B (step 1 of 2)"),
        ([("start", "A", 3), ("start", "B", 2, "A"), ("start", "C", 2, "B"), ("finish", "A", 0)], ""),
        ([("start", "A", 3), ("start", "B", 2), ("finish", "B", 0)], "A (step 1 of 3)"),
        ([("start", "A", 3), ("step", "A", 0), ("start", "B", 2), ("start", "A", 5)], "A (step 1 of 5)"),
        ([("step", "A", 3), ("finish", "A", 0)], ""),  # of a phase that nobody began
        ([("start", "A", 2, "A")], "A (step 1 of 2)"),
        ([("start", "A", 1, "B"), ("start", "B", 1, "A")], "B in A"),
    ],
)
def test_what_is_shown_of_tensorrts_phases(events: list[tuple[Any, ...]], expected: str) -> None:
    def report(build: Build) -> None:
        for event in events:
            build.progress(*event)

    assert status(report) == f"[0:00] t: {expected}".removesuffix(": ")


EVENTS = st.tuples(
    st.sampled_from(["start", "step", "finish"]),
    st.sampled_from("ABC"),
    st.integers(-1, 5),
    st.sampled_from(["", "A", "B", "C"]),
)


@given(events=st.lists(EVENTS, max_size=30))
def test_any_order_of_reports_gives_a_line_that_tells_the_truth(events: list[tuple[str, str, int, str]]) -> None:
    def report(build: Build) -> None:
        for event in events:
            build.progress(*event)

    line = status(report)
    last = {name: kind for kind, name, *_ in events if kind != "step"}
    for name in re.findall(r"\b[ABC]\b", line):
        assert last[name] == "start"
    for step, steps in re.findall(r"step (\S+) of (\d+)", line):
        assert 1 <= int(step) <= int(steps)
    assert "%" not in line


@pytest.mark.parametrize("what", ["title", "phase"])
def test_a_new_title_or_phase_forgets_tensorrts_phases(what: str) -> None:
    def report(build: Build) -> None:
        build.phase("build")
        build.progress("start", "A", 3)
        getattr(build, what)("next")

    assert status(report) == {"title": "[0:00] next", "phase": "[0:00] t: next"}[what]


# --------------------------------------------------------------------------------------------------- time and numbers


def test_ticks_without_events_are_a_heartbeat() -> None:
    stream = io.StringIO()
    build = Build("plain", stream)
    build.title("building m.engine")
    build.wait(35)
    assert stream.getvalue().splitlines() == [f"[0:{n:02}] building m.engine" for n in (0, 10, 20, 30)]
    terminal = Terminal()
    build = Build("terminal", terminal)
    build.title("t")
    build.wait(61)
    assert terminal.getvalue() == "".join(f"\r[{n // 60}:{n % 60:02}] t\x1b[K" for n in range(62))


def test_ticks_without_a_title() -> None:
    stream = io.StringIO()
    build = Build("plain", stream)
    build.began = build.clock.now
    build.wait(10)
    assert stream.getvalue() == "[0:10]\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(59.99, "0:59"), (60, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (36061, "10:01:01")]
)
def test_time(seconds: float, text: str) -> None:
    stream = Terminal()
    build = Build("terminal", stream)
    build.title("t")
    build.clock.now += 1
    build.reporter.tick(seconds)
    assert shown(stream) == f"[{text}] t"


@pytest.mark.parametrize(
    ("levels", "text"),
    [
        ([10, 20], ""),
        ([30], ", 1 warning"),
        ([30, 30, 20, 30], ", 3 warnings"),
        ([40], ", 1 error"),
        ([30, 40, 50], ", 1 warning, 2 errors"),
    ],
)
def test_lines_of_the_log_are_counted_and_not_printed(levels: list[int], text: str) -> None:
    stream = io.StringIO()
    build = Build("plain", stream)
    for level in levels:
        build.log(level)
    assert stream.getvalue() == ""
    build.reporter.done("built")
    assert stream.getvalue() == f"built (0:00{text})\n"


def test_a_notebook_is_updated_at_most_twice_a_second() -> None:
    display = Notebook()
    build = Build("notebook", display=display)
    build.title("t")
    build.progress("start", "A", 1000)
    for step in range(100):
        build.progress("step", "A", step)
        build.wait(0.25)
    assert [len(output) for output in display.outputs] == [1 + 2 * 25]


def test_a_terminal_is_not_flooded() -> None:
    stream = Terminal()
    build = Build("terminal", stream)
    build.title("t")
    build.progress("start", "A", 1000)
    for step in range(1000):
        build.clock.now += 0.001
        build.progress("step", "A", step)
        build.reporter.tick(build.clock.now - build.began)
    assert 9 <= stream.getvalue().count("\r") <= 11


# ------------------------------------------------------------------------------------------------------ the line itself


def test_the_line_is_cut_and_what_is_written_by_the_user_is_not() -> None:
    stream = Terminal()
    build = Build("terminal", stream, columns=20)
    build.title("building a model with a long name")
    assert shown(stream) == "[0:00] building a m"
    stream.new()
    build.reporter.note("a note that is longer than the terminal is wide")
    assert stream.getvalue() == "\r\x1b[Ka note that is longer than the terminal is wide\n"


def test_wide_and_combining_characters_count_as_the_terminal_counts_them() -> None:
    assert _cut("模型模型", 5) == "模型"
    assert _cut("ＡＢＣ", 5) == "ＡＢ"
    assert _cut("e\u0301e\u0301e\u0301", 2) == "e\u0301e\u0301"
    assert _cut("", 0) == "" == _cut("abc", 0) == _cut("abc", -1)


@given(text=st.text(), columns=st.integers(0, 40))
def test_a_cut_text_is_a_beginning_and_narrow_enough(text: str, columns: int) -> None:
    got = _cut(text, columns)
    assert text.startswith(got)
    assert sum(1 for c in got if c.isascii()) <= columns
    assert got == text or len(got) >= columns // 2


@pytest.mark.parametrize("kind", ["plain", "terminal", "notebook"])
def test_control_characters_of_names_reach_nobody(kind: str) -> None:
    stream, display = Terminal(), Notebook()
    build = Build(kind, stream, display=display)
    evil = "a\x1b]0;owned\x07\r\nb\u202e\x9b"
    build.title(evil)
    build.progress("start", evil, 1)
    build.wait(10.5)
    build.reporter.note(evil)
    build.reporter.done(evil)
    seen = stream.getvalue() + "\n".join(text for output in display.outputs for text in output)
    seen = re.sub(r"\r([^\r]*)\x1b\[K", r"\1", seen)
    assert "[0:10] a\\x1b]0;owned\\x07\\r\\nb\\u202e\\x9b: a\\x1b]0;owned" in seen
    assert all(c.isprintable() or c == "\n" for c in seen), seen


@pytest.mark.parametrize("kind", ["plain", "terminal"])
def test_a_stream_without_unicode(kind: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", newline="")
    stream.isatty = lambda: True  # type: ignore[method-assign]
    build = Build(kind, stream, columns=22)
    build.title("modèle 模")
    build.reporter.note("– é")
    text = raw.getvalue().decode("ascii")
    assert ("[0:00] mod\\xe8le \\u6a21\n" if kind == "plain" else "\r[0:00] mod\\xe8le \\u6a\x1b[K") in text
    assert text.endswith("\\u2013 \\xe9\n")


def test_a_question_finds_a_clear_line() -> None:
    stream = Terminal()
    build = Build("terminal", stream)
    build.title("t")
    stream.new()
    build.reporter.clear()
    build.reporter.clear()
    assert stream.new() == "\r\x1b[K"
    build.wait(0.25)
    assert stream.new() == "\r[0:00] t\x1b[K"


def test_the_end_leaves_a_clear_line() -> None:
    stream, display = Terminal(), Notebook()
    for build in (Build("terminal", stream), Build("notebook", display=display)):
        with build.reporter as entered:
            assert entered is build.reporter
            build.title("t")
    assert stream.getvalue() == "\r[0:00] t\x1b[K\r\x1b[K"
    assert display.outputs == [["[0:00] t", ""]]


# ------------------------------------------------------------------------------------------------- what is broken


class Broken(io.StringIO):
    """Takes some writes and then fails."""

    def __init__(self, error: Exception, writes: int) -> None:
        super().__init__()
        self.error, self.left = error, writes

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.left == 0:
            self.left = -1
            raise self.error
        assert self.left > 0, "written to again after it failed"
        self.left -= 1
        return len(text)


@pytest.mark.parametrize("kind", ["plain", "terminal"])
@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "EIO"), ValueError("I/O operation on closed file")])
@pytest.mark.parametrize("writes", [0, 3])
def test_a_stream_that_fails_does_not_end_the_build(kind: str, error: Exception, writes: int) -> None:
    stream = Broken(error, writes)
    play(Build(kind, stream))
    assert stream.left == -1


def test_a_flush_that_fails_does_not_end_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()

    def flush() -> None:
        raise BrokenPipeError

    monkeypatch.setattr(stream, "flush", flush)
    play(Build("terminal", stream))
    assert stream.getvalue() == "\r[0:00] building m.engine\x1b[K"


def test_a_closed_stream(capfd: pytest.CaptureFixture[str]) -> None:
    for kind in ("auto", "terminal", "plain"):
        stream = Terminal()
        stream.close()
        play(Build(kind, stream))
    assert capfd.readouterr() == ("", "")


def test_a_stream_that_is_closed_in_the_middle() -> None:
    stream = Terminal()
    build = Build("terminal", stream)
    build.title("t")
    stream.close()
    play(build)


def test_a_notebook_that_fails_does_not_end_the_build() -> None:
    class Gone(Exception):
        pass

    calls = []

    def display(data: dict[str, str], **options: Any) -> Any:
        calls.append(data)
        raise Gone

    play(Build("notebook", display=display))
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------------- which kind


def kind_of(found: Reporter) -> str:
    return type(found).__name__.strip("_").lower()


@pytest.fixture
def ipython(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Notebook]:
    def install(shell: Any) -> Notebook:
        package, module, display = ModuleType("IPython"), ModuleType("IPython.display"), Notebook()
        package.get_ipython = lambda: shell  # type: ignore[attr-defined]
        module.display = display  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython", package)
        monkeypatch.setitem(sys.modules, "IPython.display", module)
        return display

    return install


def test_auto_is_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert kind_of(reporter("auto", Terminal())) == "terminal"
    assert kind_of(reporter("auto", io.StringIO())) == "plain"
    assert kind_of(reporter("terminal", io.StringIO())) == "plain"
    assert kind_of(reporter("plain", Terminal())) == "plain"
    assert kind_of(reporter("notebook", Terminal())) == "plain"
    assert "IPython" not in sys.modules
    monkeypatch.setenv("TERM", "dumb")
    assert kind_of(reporter("auto", Terminal())) == "plain"


def test_a_kernel_is_a_notebook(ipython: Callable[[Any], Notebook]) -> None:
    display = ipython(SimpleNamespace(kernel=object()))
    for kind in ("auto", "notebook"):
        reporter(kind, io.StringIO()).title("t")
    assert display.outputs == [["[0:00] t"]] * 2
    assert kind_of(reporter("terminal", Terminal())) == "terminal"


@pytest.mark.parametrize("shell", [None, SimpleNamespace()])  # imported by a script; IPython in a terminal
def test_ipython_without_a_kernel_is_no_notebook(ipython: Callable[[Any], Notebook], shell: Any) -> None:
    ipython(shell)
    assert kind_of(reporter("auto", Terminal())) == "terminal"
    assert kind_of(reporter("notebook", Terminal())) == "plain"


def test_standard_error_is_looked_at_when_the_reporter_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter("plain").title("t")
    assert capsys.readouterr() == ("", "[0:00] t\n")
    monkeypatch.setattr(sys, "stderr", None)
    found = reporter("auto")
    found.title("t")
    assert kind_of(found) == "reporter"


def test_an_unknown_kind() -> None:
    with pytest.raises(BuildOptionError) as caught:
        reporter("bar")
    assert str(caught.value) == "progress 'bar' is unknown: use auto, terminal, notebook, plain, none."
    assert (caught.value.option, caught.value.found, caught.value.allowed) == ("progress", "bar", KINDS)


@pytest.mark.parametrize(("columns", "room"), [(30, 29), (0, 79)])
def test_a_real_terminal_says_how_wide_it_is(columns: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w") as stream:
        found = reporter("auto", stream)
        found.title("x" * 200)
        text = os.read(ours, 1000).decode()
    found.title("closed")
    os.close(ours)
    assert text == "\r" + ("[0:00] " + "x" * 200)[:room] + "\x1b[K"
