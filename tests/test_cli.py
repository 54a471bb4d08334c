"""The command `jetrt`."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

import fakes
import jetrt
from jetrt.cli import main
from jetrt.report import io_table, latency_table, table
from jetrt.runtime import RUNTIMES

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.full((2, 3), 10, dtype=np.float32)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a model and its inputs, which is the current one."""
    import onnx_models  # skips where there is no onnxruntime

    onnx_models.add(tmp_path / "add.onnx")
    np.save(tmp_path / "a.npy", A)
    np.save(tmp_path / "b.npy", B)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = ["run", "add.onnx", "--runtime", "onnx_cpu"]
INPUTS = ["--input", "a=a.npy", "--input", "b=b.npy"]


def test_version(capsys):
    assert main(["--version"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    info = jetrt.build_info()
    assert line.startswith(
        f"jetrt {info['version']} ({info['profile']} build for {info['target']}, {info['rustc']}, abi3"
    )
    assert line.endswith(f"runs TensorRT {info['tensorrt']})")
    assert f"numpy {np.__version__}" in line


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "jetrt"], [f"{sysconfig.get_path('scripts')}/jetrt"]], ids=["module", "script"]
)
def test_as_a_command(command):
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert re.match(r"jetrt \d+\.\d+\.\d+ \(", done.stdout)
    assert done.stderr == ""


def test_run(files, capsys):
    assert main([*RUN, *INPUTS, "--output-dir", "out", "--repeat", "3", "--warmup", "1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^input +a +float32 +\[-1, 3\] +host$", printed, re.M)
    assert re.search(r"^output +twice +float32 +\[-1, 3\] +host$", printed, re.M)
    assert re.search(r"^latency, ms +min +median +p90 +p99 +max\n3 calls( +\d+\.\d{3}){5}$", printed, re.M)
    assert re.search(r"^sum +float32 +\[2, 3\] +10 +15 +out/sum.npy$", printed, re.M)
    np.testing.assert_array_equal(np.load("out/sum.npy"), A + B)
    np.testing.assert_array_equal(np.load("out/twice.npy"), A + A)


def test_run_a_plan(tmp_path, monkeypatch, capsys):
    fakes.write_plan(tmp_path / "mlp.engine", "mlp")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "mlp.engine", "--random-inputs", "3", "--output-dir", "."]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^input +x +float32 +\[-1, 64\] +device +\[1, 64\] / \[8, 64\] / \[64, 64\]$", printed, re.M)
    assert np.load("y.npy").shape == (8, 10)  # the profile's optimum
    x = np.ones((2, 64), np.float32)
    np.save("x.npy", x)
    assert main(["run", "mlp.engine", "--runtime", "tensorrt", "--input", "x=x.npy", "--output", "y=z.npy"]) == 0
    np.testing.assert_allclose(np.load("z.npy"), fakes.mlp_reference(x), rtol=1e-5, atol=1e-6)


def test_output_by_name(files, capsys):
    assert main([*RUN, *INPUTS, "--output", "sum=s.npy"]) == 0
    np.testing.assert_array_equal(np.load("s.npy"), A + B)
    assert sorted(path.name for path in files.iterdir()) == ["a.npy", "add.onnx", "b.npy", "s.npy"]


def test_random_inputs_are_repeatable(files, capsys):
    shapes = ["--shape", "a=2x3", "--shape", "b=2x3"]
    for name in ("1", "2"):
        assert main([*RUN, "--random-inputs", "7", *shapes, "--output-dir", name]) == 0
    np.testing.assert_array_equal(np.load("1/sum.npy"), np.load("2/sum.npy"))
    assert main([*RUN, "--random-inputs", "8", *shapes, "--output-dir", "3"]) == 0
    assert not np.array_equal(np.load("1/sum.npy"), np.load("3/sum.npy"))
    # A file goes before a random value.
    assert main([*RUN, "--random-inputs", "7", "--input", "a=a.npy", "--shape", "b=2x3", "--output-dir", "4"]) == 0
    np.testing.assert_array_equal(np.load("4/twice.npy"), A + A)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            [*RUN, "--input", "a=a.npy"],
            2,
            "jetrt: no file for input b: give --input NAME=FILE.npy, or .*--random-inputs",
        ),
        ([*RUN, *INPUTS, "--input", "a=a.npy"], 2, "jetrt: --input a is given twice"),
        ([*RUN, *INPUTS, "--output", "c=c.npy"], 2, "jetrt: --output c=c.npy: the outputs are sum, twice"),
        ([*RUN, *INPUTS, "--output", "sum=x", "--output", "twice=x"], 2, "jetrt: .* would both go to x; use --output"),
        ([*RUN, "--random-inputs", "1"], 2, r"jetrt: input a has dynamic dimensions \[-1, 3\]: give --shape a="),
        ([*RUN, "--random-inputs", "1", "--shape", "a=2,3"], 2, "jetrt: --shape a=2,3: write it as 1x3x224x224"),
        (
            [*RUN, *INPUTS, "--random-inputs", "1", "--shape", "a=2x3"],
            2,
            "jetrt: --shape a: the random inputs are none",
        ),
        ([*RUN, *INPUTS, "--input", "c=a.npy"], 1, "jetrt: InputNameError: input 'c': found no input of that name"),
        ([*RUN, "--input", "a=a.npy", "--input", "b=add.onnx"], 1, "jetrt: InputError: add.onnx is not an .npy file"),
        ([*RUN, "--input", "a=a.npy", "--input", "b=none.npy"], 1, "jetrt: FileNotFoundError: .*none.npy"),
        (["run", "add.onnx"], 1, "jetrt: PlanError: add.onnx is an ONNX file and no runtime was named"),
        (["run", "add.onnx", "--runtime", "gpu"], 1, "jetrt: RuntimeNotAvailableError: There is no runtime 'gpu'"),
        (["run", "none.onnx", "--runtime", "onnx_cpu"], 1, "jetrt: FileNotFoundError: .*none.onnx"),
    ],
)
def test_errors_are_one_line(files, capsys, arguments, code, message):
    assert main(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(message, line), line


def test_a_flag_that_says_nothing(files, capsys, monkeypatch):
    monkeypatch.setenv("BUILD_ONNX_CPU_RUNTIME", "maybe")
    assert main([*RUN, *INPUTS]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jetrt: RuntimeConfigError: environment: BUILD_ONNX_CPU_RUNTIME: found 'maybe'; allowed: ON")


def test_run_names_every_runtime(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert f"--runtime NAME {', '.join(RUNTIMES)} (what a plan gets: tensorrt)" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["walk"],
        ["run"],
        ["run", "m", "--repeat", "0"],
        ["run", "m", "--warmup", "-1"],
        ["run", "m", "--input", "a.npy"],
        ["run", "m", "--random-inputs", "x"],
    ],
)
def test_a_command_line_that_makes_no_sense(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "jetrt" in capsys.readouterr().err


def test_latency_percentiles_were_measured():
    text = latency_table([i / 1000 for i in range(1, 201)])
    assert text.splitlines()[1].split() == ["200", "calls", "1.000", "100.000", "180.000", "198.000", "200.000"]
    assert latency_table([0.0015]).splitlines()[1].split() == ["1", "calls", *["1.500"] * 5]


def test_tables_are_aligned():
    assert table(["a", "b"], [["long", "x"], ["s", ""]]) == "a     b\nlong  x\ns"


def test_io_table_shows_profiles():
    class Info:
        name, dtype, location, mode, shape = "x", "float16", "device", "input", (-1, 3)
        profiles = [((1, 3), (2, 3), (8, 3)), ((9, 3), (9, 3), (9, 3))]  # noqa: RUF012

    class Model:
        inputs = {"x": Info}  # noqa: RUF012
        outputs = {}  # noqa: RUF012

    assert io_table(Model).splitlines() == [
        "       name  dtype    shape    memory  min / opt / max",
        "input  x     float16  [-1, 3]  device  [1, 3] / [2, 3] / [8, 3]; [9, 3] / [9, 3] / [9, 3]",
    ]
