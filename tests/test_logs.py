"""JSON logs: what a line says, and that logging never waits for it."""

from __future__ import annotations

import contextlib
import datetime
import gc
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetrt import logs
from jetrt.errors import EngineBuildError, OutOfMemoryError, ShapeError

log = logging.getLogger("jetrt.tests")


@pytest.fixture(autouse=True)
def everything_as_before():
    logger = logging.getLogger("jetrt")
    before = (logger.level, list(logger.handlers))
    yield
    assert (logger.level, logger.handlers) == before
    assert not logs._open


@contextlib.contextmanager
def alone():
    """Without pytest's own handlers, which keep records and raise what they raise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])
        yield


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    text = stream.getvalue()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def logged(*, level: str | int = "DEBUG", by: Any) -> list[dict[str, Any]]:
    stream = io.StringIO()
    with logs.configure_json_logging(stream, level) as handle:
        by()
    assert handle.dropped == 0
    return lines_of(stream)


def test_a_line():
    before = time.time()
    (line,) = logged(
        by=lambda: log.info(
            "ready: runtime=%s", "tensorrt", extra={"event": "runtime_ready", "fields": {"engines": ["dit@fp16"]}}
        )
    )
    when = line.pop("time")
    assert line == {
        "level": "INFO",
        "logger": "jetrt.tests",
        "event": "runtime_ready",
        "message": "ready: runtime=tensorrt",
        "fields": {"engines": ["dit@fp16"]},
    }
    assert when.endswith("Z")
    at = datetime.datetime.fromisoformat(when.replace("Z", "+00:00")).timestamp()
    assert before - 0.01 <= at <= time.time() + 0.01


#: What the levels are for.
EXAMPLES = [
    (logging.ERROR, "engine_build_failed", "engine build failed; model=dit.onnx"),
    (logging.ERROR, "out_of_memory", "out of memory during infer; engine=dit; frame=12345"),
    (logging.WARNING, "thermal_throttle_entered", "thermal throttle active; gpu_temp=83C; clock=750mhz"),
    (logging.WARNING, "telemetry_unavailable", "telemetry unavailable"),
    (logging.INFO, "runtime_ready", "ready: runtime=tensorrt, engines=[dit@fp16]"),
    (logging.DEBUG, "infer", "infer engine=dit frame=12345 took=37ms"),
]


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARN", "WARNING", "ERROR", logging.INFO, "error"])
def test_levels(level):
    def all_of_them() -> None:
        for number, event, text in EXAMPLES:
            log.log(number, "%s", text, extra={"event": event})

    lowest = {"WARN": 30}.get(level) or (level if isinstance(level, int) else logging.getLevelName(level.upper()))
    found = logged(level=level, by=all_of_them)
    assert [line["event"] for line in found] == [event for number, event, _ in EXAMPLES if number >= lowest]


@pytest.mark.parametrize("level", ["LOUD", "", -1, 0, True, None, 1.5])
def test_levels_that_do_not_exist(level):
    with pytest.raises(
        ValueError, match=r"level is .*; allowed: DEBUG, INFO, WARNING, WARN, ERROR, CRITICAL, or a num"
    ):
        logs.configure_json_logging(io.StringIO(), level)


def test_what_is_always_written_is_written_at_every_level():
    def both() -> None:
        log.warning("an ordinary warning")
        log.warning("thermal throttle active", extra={"event": "thermal_throttle_entered", "always": True})

    assert [line["event"] for line in logged(level="CRITICAL", by=both)] == ["thermal_throttle_entered"]


def test_one_line_each_whatever_the_text_says():
    text = 'a\nb "c" \\ \u2028 é \ud800 \0'
    (line,) = logged(by=lambda: log.info("%s", text))
    assert line["message"] == text


def test_arguments_that_do_not_fit_lose_nothing():
    with alone():
        (line,) = logged(by=lambda: log.info("%d items", "many"))
    assert line["message"] == "%d items ('many',)"


class Odd:
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_values_that_json_has_not():
    fields = {
        "nan": float("nan"),
        "inf": -np.inf,
        "half": np.float16(0.5),
        "count": np.int64(3),
        "truth": np.bool_(True),
        "array": np.zeros((2, 3), np.float32),
        "path": Path("/a/b"),
        "bytes": b"\xff",
        "set": {1},
        ("a", 1): "key",
        "odd": Odd(),
        "long": list(range(1500)),
        "text": object.__new__(type("Long", (), {"__str__": lambda self: "x" * 5000})),
    }
    (line,) = logged(by=lambda: log.info("x", extra={"fields": fields}))
    found = line["fields"]
    assert (found["nan"], found["inf"], found["half"], found["count"], found["truth"]) == (
        "NaN",
        "-Infinity",
        0.5,
        3,
        True,
    )
    assert (found["array"], found["path"], found["bytes"], found["set"]) == ("float32[2, 3]", "/a/b", "b'\\xff'", [1])
    assert (found["('a', 1)"], found["odd"]) == ("key", "<Odd whose text raises RuntimeError>")
    assert found["long"][-2:] == [999, "… 500 more"]
    assert found["text"] == "x" * 1000 + "… 4000 characters more"


def test_a_container_in_itself_ends():
    loop: dict[str, Any] = {}
    loop["self"] = loop
    (line,) = logged(by=lambda: log.info("x", extra={"fields": loop}))
    assert line["fields"]["self"]["self"]


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
    max_leaves=20,
)


@given(message=st.text(), fields=st.dictionaries(st.text(), JSONISH))
def test_any_text_and_any_fields_make_one_line_of_json(message, fields):
    record = logging.LogRecord("jetrt", logging.INFO, "", 0, "%s", (message,), None)
    record.fields = fields
    text = logs.JsonFormatter().format(record)
    assert "\n" not in text
    assert text.isascii()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads(text, parse_constant=refuse)
    assert line["message"] == message
    assert len(line["fields"]) == len(fields)


def test_exceptions_with_their_fields_and_causes():
    def fail() -> None:
        try:
            try:
                raise OutOfMemoryError("no room", requested=4 << 30, free=1 << 30)
            except OutOfMemoryError as error:
                raise EngineBuildError("the build failed", path="m.onnx", log=["[E] x"]) from error
        except EngineBuildError:
            log.exception("engine build failed", extra={"event": "engine_build_failed"})

    (line,) = logged(by=fail)
    error = line["error"]
    assert (error["type"], error["message"]) == ("jetrt.errors.EngineBuildError", "the build failed")
    assert error["fields"] == {"path": "m.onnx", "log": ["[E] x"]}
    assert "in fail" in error["traceback"]
    cause = error["cause"]
    assert (cause["type"], cause["fields"]) == (
        "jetrt.errors.OutOfMemoryError",
        {"requested": 4 << 30, "free": 1 << 30},
    )


def test_other_exceptions():
    def fail() -> None:
        try:
            raise KeyError("x") from None
        except KeyError:
            log.error("x", exc_info=True)
            log.error("y", exc_info=ShapeError("bad shape", tensor="a", found=(1, 2)))

    first, second = logged(by=fail)
    assert (first["error"]["type"], first["error"]["message"]) == ("KeyError", "'x'")
    assert "cause" not in first["error"]
    assert second["error"]["fields"] == {"tensor": "a", "found": [1, 2]}


def test_the_line_is_of_the_moment():
    stream, fields = Slow(), {"n": 1}
    with logs.configure_json_logging(stream, "INFO"):
        log.info("x", extra={"fields": fields})
        fields["n"] = 2
        stream.go.set()
    assert lines_of(stream)[0]["fields"] == {"n": 1}


def test_the_stack_of_an_exception_is_not_kept_alive():
    stream = Slow()

    class Big:
        pass

    def fail() -> weakref.ref[Big]:
        big = Big()
        try:
            raise ValueError("x")
        except ValueError:
            log.exception("failed")
        return weakref.ref(big)

    with alone(), logs.configure_json_logging(stream, "INFO"):
        gone = fail()
        gc.collect()
        assert gone() is None
        stream.go.set()


def test_other_handlers_get_the_record_as_it_is(caplog):
    with caplog.at_level("INFO", "jetrt"):
        logged(by=lambda: log.info("%s", "x", extra={"fields": {"a": 1}}))
    (record,) = caplog.records
    assert (record.args, record.fields, hasattr(record, "json_line")) == (("x",), {"a": 1}, False)


def test_levels_of_the_program_are_kept():
    logger = logging.getLogger("jetrt")
    logger.setLevel(logging.DEBUG)
    try:
        with logs.configure_json_logging(io.StringIO(), "ERROR"):
            assert logger.level == logging.DEBUG, "another handler may want them"
        assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(logging.NOTSET)


def test_two_streams_and_their_levels():
    loud, quiet = io.StringIO(), io.StringIO()
    with logs.configure_json_logging(loud, "DEBUG"):
        with logs.configure_json_logging(quiet, "ERROR"):
            log.debug("a")
            log.error("b")
        log.debug("c")
    assert [line["message"] for line in lines_of(loud)] == ["a", "b", "c"]
    assert [line["message"] for line in lines_of(quiet)] == ["b"]


def test_the_same_stream_twice_is_refused():
    stream = io.StringIO()
    handle = logs.configure_json_logging(stream)
    with pytest.raises(ValueError, match=r"already go to .*; close the first handle before"):
        logs.configure_json_logging(stream)
    handle.close()
    logs.configure_json_logging(stream).close()


def test_closing_twice_and_logging_afterwards():
    stream = io.StringIO()
    handle = logs.configure_json_logging(stream)
    handle.close()
    handle.close()
    log.error("not there")
    assert stream.getvalue() == ""
    assert not stream.closed


class Slow(io.StringIO):
    """Takes nothing before it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.held = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.held.set()
        self.go.wait(30)
        return super().write(text)


def test_a_full_queue_drops_and_counts():
    stream = Slow()
    handle = logs.JsonLogging(stream, "INFO", capacity=10)
    log.info("first")
    assert stream.held.wait(10)
    for i in range(100):
        log.info("%d", i)  # would hang here if it waited
    assert handle.dropped == 90
    stream.go.set()
    handle.close()
    lines = lines_of(stream)
    assert [line["message"] for line in lines if line["event"] is None] == ["first", *map(str, range(10))]
    (told,) = [line for line in lines if line["event"] == "log_records_dropped"]
    assert (told["level"], told["fields"]) == ("WARNING", {"dropped": 90})
    assert told["message"] == "90 log records were dropped: more came than the stream took"


@pytest.mark.parametrize("full", [False, True])
def test_closing_does_not_wait_for_a_stream_that_hangs(full, monkeypatch):
    monkeypatch.setattr(logs, "PATIENCE_S", 0.1)
    stream = Slow()
    handle = logs.JsonLogging(stream, "INFO", capacity=3)
    log.info("first")
    assert stream.held.wait(10)
    for _ in range(10 if full else 1):
        log.info("x")
    start = time.monotonic()
    handle.close()
    assert time.monotonic() - start < 20
    stream.go.set()


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_stream_that_fails_is_counted_and_nothing_else(capsys):
    handle = logs.JsonLogging(Broken(), "INFO")
    for _ in range(3):
        log.info("x")
    handle.close()
    assert handle.dropped == 3
    assert capsys.readouterr() == ("", "")


def test_many_threads():
    stream = io.StringIO()
    with logs.configure_json_logging(stream) as handle:

        def work(k: int) -> None:
            for i in range(500):
                log.info("%d %d", k, i)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert handle.dropped == 0
    pairs = [tuple(map(int, line["message"].split())) for line in lines_of(stream)]
    assert len(pairs) == 4000
    for k in range(8):
        assert [i for owner, i in pairs if owner == k] == list(range(500)), "in the order of each thread"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_what_waits_is_written_at_exit():
    done = python("""
import logging, sys
from jetrt import logs
logs.configure_json_logging(sys.stdout)
for i in range(1000):
    logging.getLogger("jetrt.x").info("%d", i)
""")
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["message"] for line in done.stdout.splitlines()] == [str(i) for i in range(1000)]


def test_stderr_unless_told():
    done = python("""
import logging
from jetrt import logs
logs.configure_json_logging()
logging.getLogger("jetrt.x").warning("w")
""")
    assert done.stdout == ""
    assert json.loads(done.stderr)["message"] == "w"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_logs_too(tmp_path):
    path = tmp_path / "log"
    with path.open("w") as stream, logs.configure_json_logging(stream):
        log.info("parent")
        child = os.fork()
        if child == 0:
            try:
                log.info("child")
                for handler in logs._open:
                    handler.close()
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        log.info("parent again")
    messages = [json.loads(line)["message"] for line in path.read_text().splitlines()]
    assert sorted(messages) == ["child", "parent", "parent again"]


def test_the_formatter_serves_any_handler():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    log.addHandler(handler)
    try:
        log.error("x", extra={"event": "e"})
    finally:
        log.removeHandler(handler)
    assert lines_of(stream)[0]["event"] == "e"


def test_importing_jetrt_does_not_import_logs():
    done = python("import sys, jetrt; print([m for m in sys.modules if m in ('jetrt.logs', 'jetrt.thermal')])")
    assert done.stdout.strip() == "[]"


def test_errors_can_be_pickled_all_the_same():
    # What a line shows of an error must not be attached to the error.
    error = ShapeError("bad", tensor="a")
    logged(by=lambda: log.error("x", exc_info=error))
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)
