"""Configurations of runtimes: mapping, TOML, environment; what is wrong is named with its place."""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jetrt
from jetrt.errors import RuntimeConfigError
from jetrt.runtime import RUNTIMES
from jetrt.runtimes.config import OPTIONS, build_flag, flag_is_on, read_config

TOML = """
[other]
anything = 1

[runtime]
name = "tensorrt"
allowed = ["tensorrt", "onnx_cpu"]
fallback = ["onnx_cpu"]
consumers = ["c2_vpr", "c3_matcher"]
precision = "fp16"
workspace_mb = 64
calibration_dataset = "calibration.npz"
optimization_profiles = [{ input = "x", min = [1, 64], opt = [8, 64], max = [64, 64] }]

[runtime.tensorrt]
max_contexts = 4
timeout = 1

[runtime.onnx_cpu]
threads = 2

[runtime.build_flags]
BUILD_OPENVINO_CPU_RUNTIME = false
"""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for variable in list(os.environ):
        if variable.startswith(("JETRT_RUNTIME", "BUILD_")):
            monkeypatch.delenv(variable)


@pytest.fixture
def toml(tmp_path):
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli", reason="Python 3.10 reads TOML by the package tomli")

    def write(text: str) -> Path:
        path = tmp_path / "robot.toml"
        path.write_text(text)
        return path

    return write


def test_flags_have_the_names_of_the_runtimes():
    assert [build_flag(name) for name in RUNTIMES] == [
        "BUILD_TENSORRT_RUNTIME",
        "BUILD_ONNX_TRT_EP_RUNTIME",
        "BUILD_PYTORCH_FP16_RUNTIME",
        "BUILD_TORCH_TENSORRT_RUNTIME",
        "BUILD_ONNX_CPU_RUNTIME",
        "BUILD_OPENVINO_CPU_RUNTIME",
    ]


def test_a_toml_file(toml, tmp_path):
    found = read_config(toml(TOML))
    assert (found.name, found.allowed, found.fallback) == ("tensorrt", ("tensorrt", "onnx_cpu"), ("onnx_cpu",))
    assert found.consumers == ("c2_vpr", "c3_matcher")
    assert found.build == jetrt.BuildConfig(
        precision="fp16",
        workspace_mb=64,
        calibration_dataset=tmp_path / "calibration.npz",  # relative to the file
        optimization_profiles=[("x", (1, 64), (8, 64), (64, 64))],
    )
    assert found.options == {"tensorrt": {"max_contexts": 4, "timeout": 1}, "onnx_cpu": {"threads": 2}}
    assert found.flags == {"BUILD_OPENVINO_CPU_RUNTIME": False}


def test_a_mapping_with_the_table_or_as_the_table():
    table = {"name": "onnx_cpu", "onnx_cpu": {"threads": 1}}
    assert read_config(table) == read_config({"runtime": table, "another": 1})
    assert read_config(read_config(table)) == read_config(table)
    assert read_config(table).build is None  # nothing was said about building


def test_the_environment(monkeypatch, tmp_path):
    for name, text in {
        "JETRT_RUNTIME": "tensorrt",
        "JETRT_RUNTIME_ALLOWED": "tensorrt, onnx_cpu",
        "JETRT_RUNTIME_FALLBACK": "onnx_cpu",
        "JETRT_RUNTIME_CONSUMERS": "c2_vpr,c3_matcher",
        "JETRT_RUNTIME_PRECISION": "int8",
        "JETRT_RUNTIME_WORKSPACE_MB": "512",
        "JETRT_RUNTIME_CALIBRATION_DATASET": str(tmp_path / "c.npz"),
    }.items():
        monkeypatch.setenv(name, text)
    found = read_config()
    assert (found.name, found.allowed, found.fallback) == ("tensorrt", ("tensorrt", "onnx_cpu"), ("onnx_cpu",))
    assert found.consumers == ("c2_vpr", "c3_matcher")
    assert found.build == jetrt.BuildConfig(precision="int8", workspace_mb=512, calibration_dataset=tmp_path / "c.npz")


def test_the_environment_counts_more_than_the_file_it_names(toml, monkeypatch):
    monkeypatch.setenv("JETRT_RUNTIME_CONFIG", str(toml(TOML)))
    monkeypatch.setenv("JETRT_RUNTIME_PRECISION", "fp32")
    found = read_config()
    assert found.name == "tensorrt"
    assert found.build.precision == "fp32"
    assert found.options["tensorrt"]["max_contexts"] == 4


def test_an_empty_environment_takes_no_runtime_by_itself():
    with pytest.raises(RuntimeConfigError, match=r"No runtime is configured: set JETRT_RUNTIME to one of tensorrt, "):
        read_config()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"precison": "fp16"}, "config: [runtime].precison: unknown key; allowed: name, "),
        ({"precison": "fp16"}, "; did you mean precision?"),
        ({"runtime": "tensorrt"}, "config: [runtime].runtime: unknown key; allowed: name, "),
        ({"runtime": "tensorrt"}, "; did you mean name?"),
        ({}, "config: [runtime].name: missing; allowed: tensorrt, onnx_trt_ep"),
        ({"name": 3}, "config: [runtime].name: found 3; allowed: tensorrt, "),
        ({"name": "tensorrt", "precision": "fp12"}, "config: [runtime].precision: found 'fp12'; allowed: fp32, fp16"),
        ({"name": "tensorrt", "precision": 16}, "config: [runtime].precision: found 16; allowed: fp32"),
        ({"name": "tensorrt", "workspace_mb": "64"}, "[runtime].workspace_mb: found '64'; allowed: a whole number"),
        ({"name": "tensorrt", "workspace_mb": True}, "[runtime].workspace_mb: found True; allowed: a whole number"),
        ({"name": "tensorrt", "workspace_mb": 0}, "[runtime].workspace_mb: found 0; allowed: a whole number of MiB"),
        ({"name": "tensorrt", "calibration_dataset": 1}, "[runtime].calibration_dataset: found 1; allowed: a path"),
        (
            {"name": "tensorrt", "allowed": "tensorrt"},
            "[runtime].allowed: found 'tensorrt'; allowed: a list of runtimes",
        ),
        ({"name": "tensorrt", "allowed": ["tensort"]}, "found 'tensort'; allowed: tensorrt, "),
        ({"name": "tensorrt", "allowed": ["tensort"]}, "(did you mean tensorrt?)"),
        (
            {"name": "tensorrt", "fallback": ["tensorrt"]},
            "[runtime].fallback: found 'tensorrt'; allowed: other runtimes",
        ),
        (
            {"name": "tensorrt", "allowed": ["tensorrt"], "fallback": ["onnx_cpu"]},
            "[runtime].fallback: found 'onnx_cpu'; allowed: runtimes that config: [runtime].allowed has: tensorrt.",
        ),
        ({"name": "tensorrt", "consumers": [1]}, "[runtime].consumers: found [1]; allowed: a list of names"),
        ({"name": "tensorrt", "tensorrt": 1}, "[runtime].tensorrt: found 1; allowed: a table"),
        (
            {"name": "tensorrt", "tensorrt": {"max_context": 2}},
            "config: [runtime].tensorrt.max_context: unknown key; allowed: device, ",
        ),
        ({"name": "tensorrt", "tensorrt": {"max_context": 2}}, "; did you mean max_contexts?"),
        (
            {"name": "tensorrt", "tensorrt": {"max_contexts": "2"}},
            "config: [runtime].tensorrt.max_contexts: found '2'; allowed: a whole number.",
        ),
        (
            {"name": "tensorrt", "tensorrt": {"graphs": "on"}},
            "[runtime].tensorrt.graphs: found 'on'; allowed: 'auto' or 'off' or 'require'.",
        ),
        ({"name": "tensorrt", "tensorrt": {"profile": 1.5}}, "found 1.5; allowed: 'auto' or a whole number."),
        ({"name": "tensorrt", "tensorrt": {"plugins": ["a", 1]}}, "allowed: a list, each of it a text."),
        (
            {"name": "tensorrt", "build_flags": {"BUILD_X": True}},
            "[runtime].build_flags.BUILD_X: unknown key; allowed: ",
        ),
        (
            {"name": "tensorrt", "build_flags": {"BUILD_TENSORRT_RUNTIME": 1}},
            "[runtime].build_flags.BUILD_TENSORRT_RUNTIME: found 1; allowed: true or false.",
        ),
        (
            {"name": "tensorrt", "build_flags": {"BUILD_TENSORRT_RUNTIME": "maybe"}},
            "[runtime].build_flags.BUILD_TENSORRT_RUNTIME: found 'maybe'; allowed: ON or OFF",
        ),
        (
            {"name": "tensorrt", "optimization_profiles": "x"},
            "[runtime].optimization_profiles: found 'x'; allowed: a list",
        ),
        (
            {"name": "tensorrt", "optimization_profiles": [{"input": "x", "mn": [1]}]},
            "[runtime].optimization_profiles[0].mn: unknown key; allowed: input, min, opt, max; did you mean min?",
        ),
        (
            {"name": "tensorrt", "optimization_profiles": [{"input": "x", "min": [1], "opt": [2]}]},
            "[runtime].optimization_profiles[0].max: found None; allowed: a list of whole numbers.",
        ),
        (
            {"name": "tensorrt", "optimization_profiles": [["x", [4], [2], [8]]]},
            "config: [runtime]: profile of 'x': min (4,) <= opt (2,) <= max (8,) does not hold",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_place(table, message):
    with pytest.raises(RuntimeConfigError, match=re.escape(message)) as caught:
        read_config(table)
    assert caught.value.key.startswith("config: [runtime]")
    assert isinstance(caught.value, ValueError)


def test_what_is_wrong_in_a_file(toml, tmp_path):
    path = toml('[runtime]\nname = "tensorrt"\nprecison = "fp16"\n')
    with pytest.raises(RuntimeConfigError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: [runtime].precison: unknown key; allowed: name, allowed, ")
    assert caught.value.key == f"{path}: [runtime].precison"
    with pytest.raises(RuntimeConfigError, match=r"robot\.toml is no TOML: Expected"):
        read_config(toml("[runtime"))
    with pytest.raises(RuntimeConfigError, match=r"\[runtime\]: found tables engine; allowed: a table of that name"):
        read_config(toml("[engine]\na = 1\n"))
    with pytest.raises(RuntimeConfigError, match=r"\[runtime\]: found 3; allowed: a table of that name"):
        read_config(toml("runtime = 3\n"))
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        read_config(tmp_path / "absent.toml")


def test_python_310_without_tomli(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    monkeypatch.setitem(sys.modules, "tomli", None)
    (tmp_path / "robot.toml").write_text(TOML)
    with pytest.raises(RuntimeConfigError, match=r"Python 3\.10 reads no TOML by itself\. Install the package tomli"):
        read_config(tmp_path / "robot.toml")


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("JETRT_RUNTIME_PRECISON", "fp16", "environment: JETRT_RUNTIME_PRECISON: unknown variable; allowed: "),
        ("JETRT_RUNTIME_PRECISON", "fp16", "; did you mean JETRT_RUNTIME_PRECISION?"),
        ("JETRT_RUNTIME_PRECISION", "fp12", "environment: JETRT_RUNTIME_PRECISION: found 'fp12'; allowed: fp32"),
        (
            "JETRT_RUNTIME_WORKSPACE_MB",
            "1GiB",
            "environment: JETRT_RUNTIME_WORKSPACE_MB: found '1GiB'; allowed: a whole",
        ),
        ("JETRT_RUNTIME_FALLBACK", "cpu", "environment: JETRT_RUNTIME_FALLBACK: found 'cpu'; allowed: tensorrt"),
    ],
)
def test_what_is_wrong_in_the_environment(monkeypatch, variable, text, message):
    monkeypatch.setenv("JETRT_RUNTIME", "onnx_cpu")
    monkeypatch.setenv(variable, text)
    with pytest.raises(RuntimeConfigError, match=re.escape(message)):
        read_config()


@pytest.mark.parametrize(
    ("text", "on"),
    [("ON", True), ("1", True), ("True", True), ("yes", True), ("OFF", False), ("0", False), ("no", False)],
)
def test_flags_of_the_environment(monkeypatch, text, on):
    assert flag_is_on("onnx_cpu", {})
    monkeypatch.setenv("BUILD_ONNX_CPU_RUNTIME", text)
    assert flag_is_on("onnx_cpu", {}) is on
    assert flag_is_on("onnx_cpu", {"BUILD_ONNX_CPU_RUNTIME": not on}) is not on  # the configuration counts more


@pytest.mark.parametrize("text", ["", "maybe", "2"])
def test_a_flag_that_says_neither(monkeypatch, text):
    monkeypatch.setenv("BUILD_ONNX_CPU_RUNTIME", text)
    with pytest.raises(
        RuntimeConfigError, match=f"environment: BUILD_ONNX_CPU_RUNTIME: found '{text}'; allowed: ON or"
    ):
        jetrt.get_runtime("onnx_cpu")


def test_every_runtime_has_its_options():
    """What a configuration can give is what the models take, except what is no plain value or said by BuildConfig."""
    from jetrt.runtimes.onnx_cpu import OnnxModel
    from jetrt.runtimes.onnx_trt_ep import OnnxTrtModel
    from jetrt.runtimes.openvino_cpu import OpenvinoModel
    from jetrt.runtimes.pytorch_fp16 import TorchModel
    from jetrt.runtimes.torch_tensorrt import TorchTensorrtModel

    models = {
        "tensorrt": jetrt.Engine,
        "onnx_trt_ep": OnnxTrtModel,
        "pytorch_fp16": TorchModel,
        "torch_tensorrt": TorchTensorrtModel,
        "onnx_cpu": OnnxModel,
        "openvino_cpu": OpenvinoModel,
    }
    assert set(models) == set(OPTIONS) == set(RUNTIMES)
    elsewhere = {"path", "source", "device_memory", "example", "precision", "profiles", "workspace_mb"}
    for name, model in models.items():
        assert set(OPTIONS[name]) == set(inspect.signature(model).parameters) - elsewhere, name


def test_the_key_tells_configurations_apart():
    base = read_config({"name": "onnx_cpu"})
    same = read_config({"name": "onnx_cpu", "consumers": ["a"]})
    assert base.key() == same.key()
    for other in ({"onnx_cpu": {"threads": 1}}, {"precision": "fp32"}, {"allowed": ["onnx_cpu"]}):
        assert read_config({"name": "onnx_cpu", **other}).key() != base.key()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)
WORDS = ("name", "allowed", "fallback", "consumers", "precision", "workspace_mb", "calibration_dataset")
KEYS = st.sampled_from([*WORDS, "optimization_profiles", "build_flags", *RUNTIMES, "typo"])


@given(st.dictionaries(KEYS, VALUES | st.sampled_from(list(RUNTIMES)), max_size=6))
def test_any_table_is_a_configuration_or_refused_with_a_place(table):
    refused = None
    try:
        found = read_config(table)
    except RuntimeConfigError as error:
        refused = error
    if refused is not None:
        assert refused.key.startswith("config: [runtime]")
        assert "[runtime]" in str(refused)
        return
    assert found.name == table["name"]
    assert set(found.options) == set(table) & set(RUNTIMES)
    assert isinstance(found.key(), str)
