"""Every call of the driver and of TensorRT fails once: a typed error or a right result, no leak, the next run works.

The walk goes on in a forked process, and in another one from the next call on when that has died: a crash or a hang is
one finding. What is set up once a process is walked by the scenario `load`, which has a process for every call.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fakes

LIMIT = 20  # seconds that one process may take before its stacks are printed
X = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)

# Calls whose failure nobody needs to hear of, and allocations, which are tried again when something else has gone.
PASSES = {
    *(
        "cuMemFree_v2",
        "cuMemFreeHost",
        "cuStreamDestroy_v2",
        "cuEventDestroy_v2",
        "cuGraphDestroy",
        "cuGraphExecDestroy",
    ),
    *("cuStreamBeginCapture_v2", "cuStreamEndCapture"),  # only the test's own, see WITHOUT_GRAPHS
    *("cuCtxGetCurrent", "cuThreadExchangeStreamCaptureMode", "cuMemAlloc_v2", "cuMemHostAlloc"),
}
# Scenarios that capture no graph: what fails there must be raised. Elsewhere a call may go on without its graph.
WITHOUT_GRAPHS = {"device", "host", "data_dependent", "shape_tensor", "callers_capture"}

# What runs. Each sets up what is the caller's, then yields the part that is walked; it makes no driver call of its own,
# so that the failing call is always one of jetrt's. ------------------------------------------------------------------


def equal(got: Any, wanted: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def engine(program: str = "mlp", /, options: dict[str, Any] | None = None, **fields: Any) -> Any:
    import jetrt

    with tempfile.TemporaryDirectory() as folder:
        return jetrt.Engine(fakes.write_plan(Path(folder) / "a.plan", program, **fields), **(options or {}))


def load() -> Iterator[Callable[[], None]]:
    def body() -> None:
        with engine() as e:
            equal(e(X)["y"], fakes.mlp_reference(X))

    yield body


def device() -> Iterator[Callable[[], None]]:
    """Device inputs on two streams and on the legacy one, reused outputs, `out=`."""
    import rig

    x, y = rig.Array(X), rig.Array(shape=(8, 10))
    with rig.new_stream() as one, rig.new_stream() as two:

        def body() -> None:
            with engine(options={"graphs": "off"}) as e:
                for stream in (one, one, two, rig.LEGACY, rig.PER_THREAD):
                    equal(rig.peek(e(x, stream=stream, synchronize=True)["y"]), fakes.mlp_reference(X))
                e(x, stream=one, out={"y": y}, synchronize=True)
                equal(rig.peek(y), fakes.mlp_reference(X))
                equal(e(x)["y"].numpy(), fakes.mlp_reference(X))

        yield body


def host() -> Iterator[Callable[[], None]]:
    """Host arrays: staged, page-locked, strided, cast, mixed with device ones."""
    import rig

    import jetrt

    def body() -> None:
        x = jetrt.pinned_empty((8, 8))
        x[:] = X[:, :8]
        with engine("add", options={"graphs": "off", "on_dtype": "cast", "on_strided": "copy"}) as e:
            equal(e(x, x)["y"], x + x)
            equal(e(x.astype(np.float64), X[:, ::8])["y"], x + X[:, ::8])
            equal(e(np.zeros((0 + 1, 8), np.float32), x[:1])["y"], x[:1])
            e.run([device, x], synchronize=True)

    device = rig.Array(X[:, :8])
    yield body


def prepared(**options: Any) -> Iterator[Callable[[], None]]:
    """A captured graph that is compared, replayed, and falls back to another output set."""
    import rig

    x = rig.Array(X)
    with rig.new_stream() as stream:

        def body() -> None:
            with engine(options={"warmup": 0, **options}) as e:
                e.prepare(inputs=[{"x": x}], stream=stream)
                held = [e(x, stream=stream, synchronize=True)["y"] for _ in range(3)]
                for y in held:
                    equal(rig.peek(y), fakes.mlp_reference(X))

        yield body


def required() -> Iterator[Callable[[], None]]:
    yield from prepared(graphs="require")


def captured() -> Iterator[Callable[[], None]]:
    """Graphs in the background, from host arrays (with a copy, and an answer on the host) and changing shapes."""

    def body() -> None:
        import rig

        with engine(options={"warmup": 0, "graph_bytes": 3000}) as e:
            streams = rig.cuda().live("stream")
            for n in (8, 8, 8, 4, 2, 8, 8):
                equal(e(X[:n])["y"], fakes.mlp_reference(X[:n]))
                rig.compared(streams)

    yield body


def data_dependent() -> Iterator[Callable[[], None]]:
    import rig

    data = (X[:, :4] > 0).astype(np.float32)
    x = rig.Array(data)

    def body() -> None:
        with engine("nonzero") as e:
            equal(e(data)["y"], fakes.nonzero_reference(data))
            equal(e(x)["y"].numpy(), fakes.nonzero_reference(data))
            equal(e(np.zeros_like(data))["y"], np.zeros((2, 0)))

    yield body


def shape_tensor() -> Iterator[Callable[[], None]]:
    def body() -> None:
        with engine("shape_input") as e:
            for size in ((2, 3), (8, 8), (2, 3)):
                y = e(np.arange(4, dtype=np.float32), np.array(size))["y"]
                assert y.shape == size

    yield body


def profiles() -> Iterator[Callable[[], None]]:
    """Switching profiles, several contexts, context memory of the caller's, shapes prepared by `shapes=`."""
    import jetrt

    two = [([1, 4], [2, 4], [4, 4]), ([5, 4], [6, 4], [9, 4])]

    def body() -> None:
        with engine(fakes.copy_of("float32", [-1, 4], two), options={"max_contexts": 2}) as e:
            for n in (2, 6, 2):
                x = X[:n, :4].copy()
                equal(e(x)["y"], x)
        memory = jetrt.DeviceMemory(4096)
        with engine(options={"device_memory": memory}, device_memory=4096) as e:
            e.prepare([{"x": (2, 64)}])
            equal(e(X)["y"], fakes.mlp_reference(X))

    yield body


def integrated() -> Iterator[Callable[[], None]]:
    import rig

    import jetrt

    rig.cuda().set("integrated", 1)

    def body() -> None:
        x = jetrt.pinned_empty((8, 64))
        x[:] = X
        with engine(options={"warmup": 0}) as e:
            streams = rig.cuda().live("stream")
            for array in (x, X, x, X):
                equal(e(array)["y"], fakes.mlp_reference(X))
                rig.compared(streams)

    yield body


def callers_capture() -> Iterator[Callable[[], None]]:
    """Inside a capture of the caller's. That capture may be lost; the engine must not be."""
    import rig

    x = rig.Array(X)
    with rig.new_stream() as stream:

        def body() -> None:
            with engine() as e:
                e(x, stream=stream, synchronize=True)
                # The caller's own calls are counted too; one of these two that fails is the caller's to see.
                if rig.cuda().call("cuStreamBeginCapture_v2", stream, 1) != 0:
                    return
                try:
                    e(x, stream=stream)
                finally:
                    rig.abandon_capture(stream)
                equal(e(X)["y"], fakes.mlp_reference(X))

        yield body


SCENARIOS = {
    f.__name__: f
    for f in (
        load,
        device,
        host,
        prepared,
        required,
        captured,
        data_dependent,
        shape_tensor,
        profiles,
        integrated,
        callers_capture,
    )
}


# The walk, in a process that found the stand-ins ----------------------------------------------------------------------


def chosen(library: str) -> Any:
    import rig

    return rig.cuda() if library == "cuda" else rig.trt()


def one(name: str, library: str, n: int) -> dict[str, Any]:
    """The scenario with the n-th call failing, then once more without."""
    import rig

    import jetrt

    def left() -> dict[str, int]:
        return {kind: n for kind, n in rig.live().items() if n and kind != "module"}

    fake = chosen(library)
    report: dict[str, Any] = {"outcome": "ok", "text": ""}
    for failing in (n, 0):
        scenario = SCENARIOS[name]()
        body = next(scenario)
        fake.fail_at(failing)
        try:
            body()
        except jetrt.errors.JetrtError as error:
            report.update(outcome=type(error).__name__, text=str(error), call=getattr(error, "call", None))
            if failing == 0:
                raise
        if failing:
            report["failed"] = fake.last_failed()
        fake.fail_at(0)
        next(scenario, None)
        del body, scenario
        gc.collect()
        jetrt.pinned_empty(1)  # lets the extension drop what threads of its own left to it
        gc.collect()
        rig.until(lambda: not left(), lambda: f"giving back {left()} after {report['failed']}", LIMIT / 4)
        assert not rig.mistakes(), (report["failed"], rig.mistakes())
    return report


def part(name: str, library: str, first: int, say: Callable[[dict[str, Any]], None]) -> None:
    if name != "load":
        one(name, library, 1 << 40)  # what is kept for the process
    for n in range(first, 1 << 40):
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        report = {"n": n, **one(name, library, n)}
        say(report)
        if name == "load" or report["failed"] == "":
            return


def walk(name: str, library: str) -> None:
    """Prints one line of JSON for each n, up to a run that has not reached its n."""
    import jetrt  # noqa: F401, before the fork: once

    gc.freeze()  # the modules need not be looked through after every run
    n = died = 0
    while died < 9:  # enough to see what is wrong
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            os.dup2(write, 2)
            try:
                part(
                    name,
                    library,
                    n + 1,
                    lambda report: os.write(2, b"\n=" + json.dumps(report).encode() + b"\n") and None,
                )
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        os.close(write)
        with os.fdopen(read) as file:
            lines = file.read().splitlines()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = [line for line in lines if not line.startswith("=")]
        reports = [json.loads(line[1:]) for line in lines if line.startswith("=")]
        n = reports[-1]["n"] if reports else n
        if status != 0:
            n, died = n + 1, died + 1
            reports.append({"n": n, "outcome": "died", "status": status, "text": said, "failed": "?"})
        for report in reports:
            print(json.dumps({"status": 0, "panic": any("panicked" in line for line in said), **report}), flush=True)
        if status == 0 and reports[-1]["failed"] == "":
            return


# The tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["cuda", "trt"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_walk(name: str, library: str) -> None:
    code = f"import test_failure_walk; test_failure_walk.walk({name!r}, {library!r})"
    done = fakes.run_python(code, env={"OPENBLAS_NUM_THREADS": 1})
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    *walked, last = reports
    assert last["outcome"] == "ok"
    assert len(walked) > 10
    wrong = [r for r in reports if r["status"] != 0 or r["panic"]]
    assert wrong == []
    # Closing passes everything; before it, what failed was raised.
    end = max(r["n"] for r in walked if r["outcome"] != "ok")
    silent = {r["failed"] for r in walked if r["outcome"] == "ok" and r["n"] < end}
    if name in WITHOUT_GRAPHS:
        assert silent <= PASSES
    if library == "cuda":
        named = [r for r in walked if r["outcome"] == "CudaError"]
        assert named
        assert [r for r in named if r["call"] != r["failed"]] == []
