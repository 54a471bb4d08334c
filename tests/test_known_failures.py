"""The table of known failures: each entry against the lines that were recorded, and against everybody else's."""

from __future__ import annotations

import pickle
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jetrt import errors
from jetrt.known_failures import attach, entries, explain, version_in

TABLE = {entry.id: entry for entry in entries()}
#: Versions that the entries distinguish.
VERSIONS = [
    (10, 0, 1),
    (10, 3, 0),
    (10, 6, 0),
    (10, 7, 0),
    (10, 8, 0),
    (10, 10, 1),
    (10, 13, 3),
    (10, 14, 1),
    (11, 1, 0),
]
RECORDED = [(entry, text) for entry in entries() for text in entry.examples]
NAMES = [f"{entry.id}-{entry.examples.index(text)}" for entry, text in RECORDED]


def holds(entry, inside=True):
    return [version for version in VERSIONS if version_in(version, entry.versions) is inside]


def test_the_table_is_complete():
    assert len(TABLE) == len(entries()), "an id is there twice"
    for entry in entries():
        assert entry.kind in ("failure", "accuracy", "note"), entry.id
        assert entry.applies, entry.id
        assert set(entry.applies) <= {"build", "load", "run"}, entry.id
        assert entry.examples, entry.id
        assert all(re.search(entry.pattern, text) for text in entry.examples), entry.id
        assert set(entry.unless) <= set(TABLE), entry.id
        assert entry.cause.endswith("."), entry.id
        assert entry.next_step.endswith("."), entry.id
        assert entry.source, entry.id
        assert holds(entry), entry.id
        # What is suppressed by another entry must stand behind it.
        assert all(list(TABLE).index(other) < list(TABLE).index(entry.id) for other in entry.unless), entry.id


@pytest.mark.parametrize(("entry", "text"), RECORDED, ids=NAMES)
def test_an_entry_fires_on_its_line_and_no_other_does(entry, text):
    for stage in entry.applies:
        for version in holds(entry):
            found = explain(text.split("\n"), tensorrt=version, stage=stage, gpu=entry.gpu)
            assert [finding.id for finding in found] == [entry.id], (stage, version)


@pytest.mark.parametrize(("entry", "text"), RECORDED, ids=NAMES)
def test_an_entry_is_silent_elsewhere(entry, text):
    lines = text.split("\n")
    for version in holds(entry, inside=False):
        for stage in entry.applies:
            assert entry.id not in [finding.id for finding in explain(lines, tensorrt=version, stage=stage)]
    for stage in {"build", "load", "run"} - set(entry.applies):
        for version in VERSIONS:
            assert entry.id not in [finding.id for finding in explain(lines, tensorrt=version, stage=stage)]


# What a healthy build and a healthy load print, in the words of TensorRT 10.6.
HEALTHY = """
[MemUsageChange] Init CUDA: CPU +1, GPU +0, now: CPU 89, GPU 1051 (MiB)
[MemUsageChange] Init builder kernel library: CPU +1950, GPU +423, now: CPU 2194, GPU 1474 (MiB)
ONNX IR version:  0.0.8
Opset version:    17
No importer registered for op: EfficientNMS_TRT. Attempting to import as plugin.
Searching for plugin: EfficientNMS_TRT, plugin_version: 1, plugin_namespace:
Successfully created plugin: EfficientNMS_TRT
Local timing cache in use. Profiling results in this builder pass will not be stored.
Detected 1 inputs and 1 output network tensors.
Total Host Persistent Memory: 4160 bytes
Engine generation completed in 0.171036 seconds.
[MemUsageStats] Peak memory usage of TRT CPU/GPU memory allocators: CPU 0 MiB, GPU 1 MiB
Loaded engine size: 6 MiB
[MemUsageChange] TensorRT-managed allocation in engine deserialization: CPU +0, GPU +5, now: CPU 0, GPU 5 (MiB)
Using default stream in enqueueV3() may lead to performance issues due to additional calls to cudaStreamSynchronize()
""".strip().split("\n")


@pytest.mark.parametrize("stage", ["build", "load", "run"])
@pytest.mark.parametrize("version", [None, *VERSIONS])
def test_a_healthy_log_has_no_findings(stage, version):
    assert explain(HEALTHY, tensorrt=version, stage=stage) == []


def test_the_special_case_stands_for_the_general_one():
    line = "CUDA error 400 launching __myl_CastMulMeanAddSqrtDivMulMul kernel"

    def ids(gpu):
        return [finding.id for finding in explain([line], tensorrt="10.13.3.9", stage="run", gpu=gpu)]

    assert ids("NVIDIA Thor") == ["myelin-norm-on-thor"]
    assert ids(None) == ["myelin-norm-on-thor"]  # an unknown GPU may be a Thor
    assert ids("NVIDIA H200") == ["myelin-launch"]
    (finding,) = explain([line], tensorrt="10.13.3.9", stage="run", gpu="NVIDIA Thor")
    assert "--opt-level 2" in finding.next_step
    assert "TRT_DISABLE_MYELIN has no effect" in finding.next_step


def test_scoped_operations_mean_attention_from_10_14_only():
    line = "Error: mScopedOps.size() == mGraph.scopedOps.size()"

    def found(version):
        return [finding.id for finding in explain([line], tensorrt=version, stage="build")]

    assert found((10, 6, 0)) == ["scoped-operations"]
    assert found("10.14.1.48") == ["several-attention-layers"]


def test_a_finding_as_text():
    line = "[W] Missing scale and zero-point for tensor {}, expect fall back to non-int8 implementation"
    (finding,) = explain([(2, line.format("a")), (2, line.format("b"))], tensorrt=(10, 6, 0), stage="build")
    assert finding.count == 2
    assert finding.text() == (
        f"Known trap 'missing-scale': {finding.cause}\n"
        f"  next step: {finding.next_step}\n"
        f"  seen: {line.format('a')} (2 times)\n"
        "  source: https://github.com/NVIDIA/TensorRT/issues/4058"
    )
    assert finding.to_mapping()["id"] == "missing-scale"
    (old,) = explain(["CHECK(graph().ssa_validation()) failed"], tensorrt=(10, 6, 0), stage="build")
    assert old.text().startswith("Known failure 'ssa-validation': ")
    assert old.text().endswith("issues/4468; TensorRT <10.11")


def test_attach_extends_the_message_once():
    error = errors.EngineBuildError("m.onnx: the builder failed.", path="m.onnx", log=["Magic tag does not match"])
    assert attach(error, tensorrt=(10, 6, 0), stage="build") is error
    assert error.findings == []  # no entry for that line while building
    error = errors.EngineDeserializeError("p: refused.", log=["x", "Magic tag does not match", "y"])
    attach(error, tensorrt=(10, 6, 0), stage="load")
    once = str(error)
    assert once.startswith("p: refused.\n\nKnown failure 'magic-tag': ")
    assert once.count("magic-tag") == 1
    assert str(attach(error, ["Platform specific tag mismatch"], tensorrt=None, stage="load")) == once
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == once
    assert copy.findings == error.findings


def test_attach_takes_the_parsers_reasons_and_the_message():
    problem = {
        "node": 2,
        "reason": '[6] creator && "Plugin not found, are the plugin name, version, and namespace correct?"',
    }
    error = attach(errors.ModelError("m: refused.", problems=[problem]), tensorrt=(10, 6, 0), stage="build")
    assert [finding.id for finding in error.findings] == ["operator-or-plugin-unknown"]
    error = errors.BuildCrashError("NvMapMemAllocInternalTagged: 1075072515 error 12")
    assert [f.id for f in attach(error, tensorrt=None, stage="build").findings] == ["nvmap"]


def test_a_cause_hides_the_notes():
    memory = "Tactic Device request: 1583MB Available: 1547MB. Device memory is insufficient to use tactic."
    error = attach(
        errors.EngineBuildError("m: failed.", log=[memory, "CHECK(graph().ssa_validation()) failed"]),
        tensorrt=(10, 6, 0),
        stage="build",
    )
    assert [finding.id for finding in error.findings] == ["tactic-memory", "ssa-validation"]
    assert "tactic-memory" not in str(error)
    note = attach(errors.EngineBuildError("m: failed.", log=[memory]), tensorrt=(10, 6, 0), stage="build")
    assert "Known trap 'tactic-memory'" in str(note)


@pytest.mark.parametrize(
    ("ranges", "inside", "outside"),
    [
        ("any", [(8, 6, 1), (11, 0, 0)], []),
        (">=10.14", [(10, 14, 0), (10, 14, 1), (11, 0, 0)], [(10, 13, 3)]),
        ("<10.8", [(10, 7, 9), (8, 6, 1)], [(10, 8, 0), (10, 8, 1)]),
        ("10.0-10.7", [(10, 0, 0), (10, 7, 3)], [(8, 6, 1), (10, 8, 0)]),
        ("10.3, >=11", [(10, 3, 0), (11, 1, 0)], [(10, 4, 0), (10, 2, 9)]),
    ],
)
def test_version_ranges(ranges, inside, outside):
    assert all(version_in(version, ranges) for version in inside)
    assert not any(version_in(version, ranges) for version in outside)
    assert version_in(None, ranges)


@given(st.lists(st.text(max_size=200), max_size=20), st.sampled_from(["build", "load", "run"]))
@example(["\n\n", "Cask unknown internal error\x00"], "run")
def test_any_text_may_come(lines, stage):
    for finding in explain(lines, tensorrt=(10, 6, 0), stage=stage):
        assert finding.line in "\n".join(lines)
        assert finding.text()


@pytest.mark.parametrize(
    "filler", ["a", " ", "No implementation of layer ", "Unable to load library: ", "__myl_Mean", "1"]
)
def test_no_pattern_blows_up(filler):
    text = filler * (200_000 // len(filler))
    start = time.perf_counter()
    for stage in ("build", "load", "run"):
        explain([text], tensorrt=None, stage=stage)
    assert time.perf_counter() - start < 5
