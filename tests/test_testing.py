"""The pytest plugin, its assertions, and what notebooks show."""

from __future__ import annotations

import html.parser
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rig
from hypothesis import given
from hypothesis import strategies as st

import fakes
import jetrt
from jetrt.notebook import Card, Histogram, enable
from jetrt.testing import assert_close, assert_no_alloc, assert_no_copies

pytest_plugins = ["pytester"]


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    fakes.write_plan(tmp_path / "mlp.engine", "mlp")
    with jetrt.Engine(tmp_path / "mlp.engine") as opened:
        yield opened


X = np.ones((2, 64), np.float32)


# Assertions -----------------------------------------------------------------------------------------------------------


def test_copies_are_seen(engine: Any) -> None:
    with pytest.raises(AssertionError, match=r"^mlp copied: host_to_device_bytes \+512, .* \(in 1 calls\)"):  # noqa: SIM117
        with assert_no_copies(engine):
            engine(x=X)
    rig.enter()
    inputs = rig.Array(X)
    with assert_no_copies(engine):
        engine(x=inputs)


def test_allocations_are_seen(engine: Any) -> None:
    rig.enter()
    inputs = rig.Array(X)
    with pytest.raises(AssertionError, match=r"^mlp allocated: output_allocations \+1"):  # noqa: SIM117
        with assert_no_alloc(engine):
            engine(x=inputs)
    for _ in range(4):
        engine(x=inputs)
    with assert_no_alloc(engine):
        engine(x=inputs)

    def more() -> None:
        with assert_no_alloc(engine):
            engine(x=inputs)
            jetrt.pinned_empty(1 << 20, np.uint8)

    with pytest.raises(AssertionError, match=r"^jetrt allocated in this process: host_allocations \+"):
        more()


@pytest.mark.parametrize("context", [assert_no_copies, assert_no_alloc])
def test_nothing_shown_by_nothing(engine: Any, context: Any) -> None:
    with pytest.raises(AssertionError, match="mlp was not called, so that nothing is shown"), context(engine):
        pass
    with pytest.raises(TypeError, match="give the engines"), context():
        pass
    with pytest.raises(KeyError), context(engine):  # the error inside is the one that is seen
        raise KeyError


def test_close() -> None:
    expected = {"y": np.linspace(1, 2, 8, dtype=np.float32)}
    assert_close({"y": expected["y"] * np.float32(1 + 1e-6)}, expected)
    with pytest.raises(AssertionError, match=r"^1 of 1 outputs differ \(fp32\):\ny: "):
        assert_close({"y": expected["y"] * 1.01}, expected)
    assert_close({"y": expected["y"] * np.float32(1.01)}, expected, "fp16")
    with pytest.raises(AssertionError, match=r"max.abs"):
        assert_close({"y": expected["y"] * np.float32(1.01)}, expected, "fp16", max_abs=1e-3)
    with pytest.raises(AssertionError, match="no such output"):
        assert_close({}, expected)
    with pytest.raises(AssertionError, match="nothing is compared"):
        assert_close({}, {})
    with pytest.raises(AssertionError, match="y: "):
        assert_close({"y": np.full(8, np.nan, np.float32)}, expected)


def test_close_takes_what_engines_give(engine: Any) -> None:
    reference = {"y": fakes.mlp_reference(X)}
    assert_close(engine(x=X), reference)
    rig.enter()
    found = engine(x=rig.Array(X), synchronize=True)
    assert_close({name: found[name].numpy() for name in found}, reference)

    class Half:
        """A bfloat16 tensor of torch, as far as it is asked."""

        dtype = "torch.bfloat16"

        def detach(self) -> Any:
            return self

        cpu = detach

        def float(self) -> Any:
            return reference["y"]

    assert_close({"y": Half()}, reference, "bf16")


# The plugin -----------------------------------------------------------------------------------------------------------

TESTS = """
import pytest

@pytest.mark.jetrt_gpu
def test_gpu(): pass

@pytest.mark.jetrt_gpu(min_sm=90, tensorrt="10.6", memory="8G")
def test_all_of_it(): pass

@pytest.mark.jetrt_gpu(min_sm=100)
def test_sm(): assert False

@pytest.mark.jetrt_gpu(tensorrt="10.7")
def test_tensorrt(): assert False

@pytest.mark.jetrt_gpu(memory="9G")
def test_memory(): assert False

@pytest.mark.jetrt_runtime("no_such")
def test_runtime(): assert False

@pytest.mark.jetrt_runtime("tensorrt")
def test_has_runtime(): pass

def test_engine(jetrt_engine, jetrt_machine):
    import numpy
    engine = jetrt_engine("mlp.engine", graphs="off")
    assert engine(x=numpy.ones((1, 64), "float32"))["y"].shape == (1, 10)
    assert jetrt_machine.sm == 90
    pytest.opened = engine

def test_it_was_closed():
    assert pytest.opened.closed
"""


def outcomes(pytester: pytest.Pytester, **environ: Any) -> Any:
    pytester.makepyfile(TESTS)
    fakes.write_plan(pytester.path / "mlp.engine", "mlp")
    installed = any(point.value == "jetrt.pytest_plugin" for point in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "jetrt.pytest_plugin"]
    command = [sys.executable, "-m", "pytest", *plugin, "--strict-markers", "-rs", "-W", "error"]
    for name, value in environ.items():
        pytester._monkeypatch.setenv(name, value)
    return pytester.run(*command)


def test_skipped_with_the_reason(pytester: pytest.Pytester) -> None:
    result = outcomes(pytester)
    result.assert_outcomes(passed=5, skipped=4)
    result.stdout.fnmatch_lines(
        [
            "*needs SM 100 or newer: Fake GPU 0 has 90",
            "*needs TensorRT 10.7 or newer: here is 10.6.0.26",
            "*needs 9G of GPU memory: Fake GPU 0 has 8192 MiB",
            "*needs the runtime no_such: *",
        ]
    )


def test_skipped_without_a_gpu(pytester: pytest.Pytester) -> None:
    result = outcomes(pytester, JETRT_TENSORRT_PATH="/nowhere")
    assert result.parseoutcomes()["skipped"] >= 7
    result.stdout.fnmatch_lines(["*needs a GPU with TensorRT: LibraryNotFoundError: *"])


# Notebooks ------------------------------------------------------------------------------------------------------------


class Words(html.parser.HTMLParser):
    """The texts of a page; tags must be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_card_of_an_engine(engine: Any) -> None:
    engine(x=X)
    words = Words(Card(engine)._repr_html_()).words
    assert words[0] == "mlp"
    assert "[1, 64] / [8, 64] / [64, 64]" in words
    assert "profile 0: min / opt / max" in words
    assert any(word.startswith("1: 0 as graphs, 1 eager") for word in words)
    assert "[1, 64] / [8, 64] / [64, 64]" in repr(Card(engine))


def test_names_cannot_leave_the_card(tmp_path: Path) -> None:
    path = tmp_path / "<b>.engine"
    fakes.write_plan(
        path,
        fakes.copy_of("float32", [2], n=1)
        | {"io": [fakes.tensor("<script>", "input", "float32", [2]), fakes.tensor("y0", "output", "float32", [2])]},
    )
    with jetrt.Engine(path) as opened:
        page = Card(opened)._repr_html_()
    assert "<script>" not in page
    assert "<script>" in Words(page).words


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50), st.integers(1, 20))
def test_every_latency_is_in_one_bin(seconds: list[float], bins: int) -> None:
    histogram = Histogram(seconds, bins)
    assert sum(histogram.counts()) == len(seconds)
    assert len(histogram.counts()) == bins
    words = Words(histogram._repr_html_()).words
    assert f"{1e3 * max(seconds):.3f} ms" in words
    assert f"{len(seconds)} calls" in repr(histogram)


@pytest.mark.parametrize("seconds", [[], [-1.0], [float("nan")], [float("inf")]])
def test_what_is_no_latency(seconds: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^seconds: found none, or one that is negative or not finite"):
        Histogram(seconds)


def test_engines_are_shown_as_cards(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[Any, Any] = {}
    formatter = SimpleNamespace(for_type=shown.__setitem__)
    shell = SimpleNamespace(display_formatter=SimpleNamespace(formatters={"text/html": formatter}))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    enable()
    assert shown[jetrt.Engine](engine) == Card(engine)._repr_html_()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    with pytest.raises(RuntimeError, match="this is no IPython"):
        enable()
    monkeypatch.setitem(sys.modules, "IPython", None)
    with pytest.raises(RuntimeError, match="IPython is not installed"):
        enable()
