"""`jetrt inspect`: what is read from files, what TensorRT adds, as data, text, JSON and picture."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import manifests
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifests import MANIFEST, ORIN

import fakes
from jetrt import errors, inspection
from jetrt.builder.audit import audit
from jetrt.commands.inspect import add_inspect
from jetrt.inspection import collect, text
from jetrt.provenance import BuildReport, EngineFile, Manifest, Parity, Sha256Sidecar, Tensor

HALF = "Channel major FP16 format where channel % 8 == 0"
FLOAT = "Row major linear FP32"


def layer(name, kind, into, out, tactic=""):
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": "i", "Format/Datatype": into}],
        "Outputs": [{"Name": "o", "Format/Datatype": out}],
        "TacticName": tactic,
    }


LAYERS = [
    layer("copy", "Reformat", FLOAT, HALF),
    layer("conv", "CaskConvolution", HALF, HALF, "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tile"),
    layer("head $1$", "CaskConvolution", FLOAT, FLOAT, "ampere_scudnn_128x64_relu_interior_nn_v1"),
    layer("{ForeignNode[/a/MatMul.../b/Add]}", "Myelin", HALF, HALF),
]
MS = {"copy": 0.1, "conv": 0.6, "head $1$": 0.2, "{ForeignNode[/a/MatMul.../b/Add]}": 0.1}
PROFILE = {"shapes": {"x": {"min": [1, 3], "opt": [2, 3], "max": [8, 3]}}, "values": {}}
AUDIT = audit({"Layers": LAYERS}, {name: [ms] for name, ms in MS.items()}, "fp16").to_mapping()
PARITY = Parity("not run", "it was switched off", None, None, ())


@pytest.fixture
def plan(tmp_path):
    """A plan that stands alone."""
    return fakes.write_plan(tmp_path / "det.engine", "mlp")


def stamp(plan, **changes):
    """Its companions."""
    manifest = replace(MANIFEST, engine=EngineFile.of(plan), profiles=(PROFILE,), parity=PARITY, **changes)
    Manifest.path_for(plan).write_text(manifest.to_json())
    Sha256Sidecar.of(plan).write(plan)
    return manifest


def info(name, shape, profiles=(), location="device", dtype="float32"):
    return SimpleNamespace(
        name=name, dtype=dtype, shape=shape, location=location, format="kLINEAR", profiles=list(profiles)
    )


class Device:
    """An engine as `jetrt.Engine` shows it, that remembers what it was asked."""

    num_profiles, device, tensorrt_version, device_memory_size = 1, 0, "10.3.0.30", 31 << 20

    def __init__(self, layers=LAYERS, times=MS, **changes):
        self.layers, self.times = layers, times
        self.inputs = {"x": info("x", (-1, 3), [((1, 3), (2, 3), (8, 3))])}
        self.outputs = {"y": info("y", (-1, 10), dtype="float16")}
        self.load_report = {"peak_host_bytes": 52 << 20, "seconds": 0.25, "warnings": ["not recommended"]}
        self.asked = {}
        vars(self).update(changes)

    def open(self, path, **options):
        self.path = str(path)
        self.asked["options"] = options
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.asked["closed"] = True

    def inspect(self, shapes, *, profile):
        self.asked["inspect"] = (dict(shapes), profile)
        return json.dumps({"Layers": self.layers, "Bindings": ["x", "y"]})

    def layer_times(self, inputs, *, runs):
        self.asked["inputs"] = inputs
        if isinstance(self.times, Exception):
            raise self.times
        # Not one run like the other: 1, 2, 3 … times what it says, so that a median is not a mean.
        return [[(name, ms * (1 + run)) for name, ms in self.times.items()] for run in range(runs)]


def on(device, plan, machine=ORIN, **options):
    return collect(plan, open_engine=device.open, machine=lambda: machine, **options)


def refuse(*_, **__):
    raise errors.LibraryNotFoundError("libnvinfer.so.10 was found nowhere")


def test_a_plan_without_companions(plan):
    data = collect(plan, gpu="off", open_engine=pytest.fail, machine=pytest.fail)
    digest = hashlib.sha256(plan.read_bytes()).hexdigest()
    assert data["file"] == {"path": str(plan), "bytes": plan.stat().st_size, "sha256": digest, "sidecar": "none"}
    assert data["plan"]["tensorrt"] == "10.6.0.26"
    assert data["manifest"] is data["device"] is data["here"] is None
    assert text(data).splitlines() == [
        f"det.engine  plan of TensorRT 10.6.0.26, {plan.stat().st_size} bytes",
        f"sha256      {digest} (.sha256 beside it: none)",
        "manifest    none, so nothing says where it came from",
        "",
        "Not looked at on a GPU: it was not asked for",
    ]


KNOWN = {"kind": "failure", "cause": "It broke.", "next_step": "Mend it.", "line": "a  line", "count": 1, "source": ""}
FOUND = (
    {"pattern": "x", "lines": 2},
    KNOWN | {"kind": "accuracy", "cause": "Norms overflow.", "next_step": "Use fp32.", "count": 2, "source": "nowhere"},
    KNOWN,
    {"kind": "precision", "text": "precision audit: 50 % runs in\nfp16"},
)


def test_everything_that_a_manifest_says(plan):
    stamp(
        plan,
        model=replace(MANIFEST.model, sha256="2" * 64),
        options={"precision": "fp16", "workspace": None, "strict": False, "fp32_norms": True, "hints": []},
        build=BuildReport(93.2, {}, 3, 6 << 30, ("Detected layernorm nodes in FP16", *FOUND)),
        calibration={"algorithm": "entropy"},
        driver_floor="535.104",
        stripped=True,
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        outputs=(Tensor("y", "float32", (-1, 10), "device", "kLINEAR"),),
        audit=AUDIT,
    )
    shown = text(collect(plan, gpu="off"))
    for line in (
        f"sha256      {hashlib.sha256(plan.read_bytes()).hexdigest()} (.sha256 beside it: matches)",
        "made     2026-11-20T21:13:07Z by jetrt 0.1.0, in 93 s, optimisation level 3, peak host memory 6,144.0 MiB",
        f"from     my model.onnx, opset 17, pytorch 2.4, sha256 {'2' * 64}",
        "command  jetrt build --onnx 'my model.onnx' --engine det.engine --precision fp16",
        "for      Orin, aarch64, SM 87, 16 multiprocessors, TensorRT 10.3.0.30, CUDA 12.6, driver 540.4.0, L4T 36.4.7, "
        "JetPack 6.2.1, power mode MAXN",
        "runs on  Ampere and newer GPUs, this and newer TensorRT, driver 535.104 or newer, "
        "WITHOUT WEIGHTS: only after a refit from its ONNX",
        "options  fp32_norms, precision=fp16",
        "input   x     float32  [-1, 3, 640, 640]  device  kLINEAR  [1, 3] / [2, 3] / [8, 3]",
        "output  y     float32  [-1, 10]           device  kLINEAR",
        "- Detected layernorm nodes in FP16",
        "- lines: 2, pattern: x",
        "- accuracy: Norms overflow. Use fp32. (nowhere) TensorRT said, 2 times: a line",
        "- failure: It broke. Mend it. TensorRT said: a line",
        "- precision audit: 50 % runs in fp16",
        "algorithm: entropy",
        "precision audit: fp16 was asked for; 66.7 % of the GEMM and convolution time runs in it, 22.2 % in fp32, "
        "11.1 % unknown",
        "  fp32, 0.2000 ms: head $1$",
        "parity not run: it was switched off",
    ):
        assert line in shown.splitlines(), f"{line}\n--- is not in\n{shown}"


def test_values_of_shape_tensors(plan):
    stamp(plan)
    profile = {**PROFILE, "values": {"size": {"min": [1], "opt": [32], "max": [64]}}}
    manifest = replace(Manifest.read(plan), profiles=(profile,))
    Manifest.path_for(plan).write_text(manifest.to_json())
    assert "0        size       [1]  [32]  [64]" in text(collect(plan, gpu="off")).splitlines()


def test_an_edited_plan(plan):
    stamp(plan)
    with plan.open("ab") as file:
        file.write(b"!")
    data = collect(plan, gpu="off")
    shown = text(data)
    assert data["file"]["sidecar"].startswith("differs: it says ")
    assert "manifest    NOT OF THIS PLAN: it was written for 'det.engine' with SHA-256" in shown
    assert "one of the two was edited or copied alone" in shown


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema": "jetrt-manifest-9"}', b"\xff"])
def test_a_damaged_manifest(plan, content):
    Manifest.path_for(plan).write_bytes(content)
    data = collect(plan, gpu="off")
    assert data["manifest"] is None
    assert data["manifest_problem"] in text(data)
    assert f"{plan}.json" in data["manifest_problem"]


def test_a_damaged_sidecar(plan):
    Sha256Sidecar.path_for(plan).write_text("nothing")
    assert "no SHA-256 digest in this file" in text(collect(plan, gpu="off"))


def test_no_plan(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x07" * 40)
    with pytest.raises(errors.PlanError, match=r"model\.onnx"):
        collect(path, gpu="off")
    with pytest.raises(FileNotFoundError):
        collect(tmp_path / "none.engine")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(manifest=manifests.MANIFESTS)
def test_any_manifest_can_be_shown(plan, manifest):
    """Whatever the parts hold that the schema leaves open: no crash, no control character, no lie about the plan."""
    Manifest.path_for(plan).write_text(manifest.to_json())
    data = collect(plan, gpu="off")
    shown = text(data)
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert "NOT OF THIS PLAN" in shown
    assert json.loads(json.dumps(data, allow_nan=False))["manifest"] == data["manifest"]


def test_names_do_not_reach_the_terminal_as_they_are(plan):
    stamp(plan, options={"precision": "fp16", "evil": "\x1b]0;owned\x07 \u202e line\nNot looked at on a GPU: fine"})
    shown = text(collect(plan, gpu="off"))
    assert "evil=\\x1b]0;owned\\x07 \\u202e line Not looked at on a GPU: fine" in shown


# With a GPU -----------------------------------------------------------------------------------------------------------


def test_on_a_gpu(plan):
    stamp(plan)
    device = Device()
    data = on(device, plan, runs=5)
    assert device.asked["options"] == {"graphs": "off", "profile": 0}
    assert device.asked["inspect"] == ({"x": (2, 3)}, 0)
    assert device.asked["inputs"]["x"].shape == (2, 3)
    assert device.asked["inputs"]["x"].dtype == "float32"
    assert device.asked["closed"]
    assert data["differences"] == []
    found = data["device"]
    assert found["memory"]["context_bytes"] == 31 << 20
    assert found["timing"]["run_ms"] == pytest.approx([1, 2, 3, 4, 5])
    assert {row["name"]: row["ms"] for row in found["layers"]} == pytest.approx({n: 3 * ms for n, ms in MS.items()})
    assert found["audit"]["share"] == pytest.approx(6 / 9)
    shown = text(data, layers=3)
    for line in (
        "input   x     float32  [-1, 3]   device  kLINEAR  [1, 3] / [2, 3] / [8, 3]",
        "output  y     float16  [-1, 10]  device  kLINEAR",
        "loaded by                  TensorRT 10.3.0.30 on GPU 0",
        "memory of a context        31.0 MiB",
        "host memory while loading  52.0 MiB",
        "looked at                  profile 0 of 1, x [2, 3]",
        "all layers                 3.0000 ms (median of 5 runs, layer by layer)",
        "- not recommended",
        "ms      share   precision  in -> out     type             layer (4)",
        "1.8000  60.0 %  fp16       fp16 -> fp16  CaskConvolution  conv",
        "0.6000  20.0 %  fp32       fp32 -> fp32  CaskConvolution  head $1$",
        "0.3000  10.0 %  -          fp32 -> fp16  Reformat         copy",
        "… and 1 more layers",
        "  fp32, 0.6000 ms: head $1$",
    ):
        assert line in shown.splitlines(), f"{line}\n--- is not in\n{shown}"
    assert "Not looked at" not in shown
    json.dumps(data, allow_nan=False)


def test_another_machine_is_pointed_out(plan):
    stamp(plan)
    data = on(Device(), plan, replace(ORIN, sm_count=8, jetpack="6.2", power_mode="15W"))
    assert [d["field"] for d in data["differences"] if d["refused"]] == ["sm_count"]
    lines = [line.split() for line in text(data).splitlines()]
    assert ["sm_count", "16", "8", "refused"] in lines
    assert ["power_mode", "MAXN", "15W"] in lines


def test_without_a_manifest_nothing_was_asked_for(plan):
    shown = text(on(Device(), plan))
    assert (
        "GEMM and convolution time: 66.7 % fp16, 22.2 % fp32, 11.1 % unknown; what was asked for is not known" in shown
    )
    assert "mixed" not in shown


def test_other_shapes(plan):
    device = Device()
    data = on(device, plan, shapes={"x": [5, 3]})
    assert device.asked["inspect"] == ({"x": (5, 3)}, 0)
    assert device.asked["inputs"]["x"].shape == (5, 3)
    assert "profile 0 of 1, x [5, 3]" in text(data)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": [9, 3]}, r"--shape x=9x3: profile 0 has \[1, 3\] to \[8, 3\]\."),
        ({"x": [5]}, r"--shape x=5: profile 0 has \[1, 3\] to \[8, 3\]\."),
        ({"z": [5, 3]}, r"--shape z=5x3: the inputs are x\."),
    ],
)
def test_shapes_that_it_does_not_have(plan, shapes, message):
    with pytest.raises(errors.BuildOptionError, match=message):
        on(Device(), plan, shapes=shapes)


def test_shape_tensors_need_the_manifest(plan):
    inputs = {**Device().inputs, "n": info("n", (1,), [((1,), (1,), (1,))], "host", "int64")}
    data = on(Device(inputs=inputs), plan)
    assert data["device"]["timing"] is None
    assert "without a manifest the values of the shape tensor n are not known" in text(data)
    assert [row["ms"] for row in data["device"]["layers"]] == [None] * 4

    manifest = replace(stamp(plan), profiles=({**PROFILE, "values": {"n": {"min": [1], "opt": [5], "max": [9]}}},))
    Manifest.path_for(plan).write_text(manifest.to_json())
    device = Device(inputs=inputs)
    assert on(device, plan)["device"]["timing"] is not None
    assert device.asked["inputs"]["n"].tolist() == [5]
    assert device.asked["inspect"] == ({"x": (2, 3)}, 0)

    Manifest.path_for(plan).write_text(replace(manifest, profiles=({"values": {"n": [5]}},)).to_json())
    assert "profile 0 in its manifest is damaged" in on(Device(inputs=inputs), plan)["device_problem"]


def test_a_plan_that_cannot_run(plan):
    data = on(Device(times=errors.InferenceError("an illegal memory access")), plan)
    assert "no layer times             InferenceError: an illegal memory access" in text(data)


def test_without_a_gpu_the_files_are_enough(plan):
    data = collect(plan, machine=refuse, open_engine=pytest.fail)
    assert text(data).endswith("Not looked at on a GPU: LibraryNotFoundError: libnvinfer.so.10 was found nowhere")
    with pytest.raises(errors.LibraryNotFoundError):
        collect(plan, machine=refuse, gpu="require")


def test_a_profile_that_it_does_not_have(plan):
    def no_profile(path, **options):
        raise ValueError("profile=7: this engine has 1 optimisation profile(s), numbered from 0.")

    with pytest.raises(errors.BuildOptionError, match=r"det\.engine: profile=7: this engine has 1"):
        collect(plan, profile=7, open_engine=no_profile, machine=lambda: ORIN)


def test_on_the_stand_in(plan):
    """Through the extension, the driver and TensorRT's interfaces."""
    data = collect(plan, gpu="require", runs=3)
    assert data["device"]["shapes"] == {"x": [8, 64]}
    assert data["device"]["timing"]["runs"] == 3
    assert [row["name"] for row in data["device"]["layers"]] == ["layer_0", "layer_1"]
    assert all(row["ms"] > 0 for row in data["device"]["layers"])
    assert data["device"]["tensorrt"] == "10.6.0.26"
    assert "looked at                  profile 0 of 1, x [8, 64]" in text(data)
    with pytest.raises(errors.BuildOptionError, match=r"det\.engine: profile=3"):
        collect(plan, profile=3, machine=lambda: ORIN)


# The picture ----------------------------------------------------------------------------------------------------------


def test_a_picture_needs_matplotlib(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(errors.RuntimeNotAvailableError, match=r"pip install 'jetrt\[plot\]'") as caught:
        inspection.picture(on(Device(), plan), tmp_path / "x.png")
    assert caught.value.missing == ["matplotlib"]


def test_a_picture_needs_times(plan, tmp_path):
    with pytest.raises(
        errors.PlanError, match=r"no layer times to draw: neither from a GPU \(it was not asked for\) nor"
    ):
        inspection.picture(collect(plan, gpu="off"), tmp_path / "x.png")
    stamp(plan, audit={"layers": [{"name": "a", "ms": "long"}, 7, {"name": "b", "ms": 1.0, "possible": ["gold"]}]})
    with pytest.raises(errors.PlanError, match="no layer times to draw"):
        inspection.picture(collect(plan, gpu="off"), tmp_path / "x.png")
    idle = on(Device(times=dict.fromkeys(MS, 0.0)), plan)
    with pytest.raises(errors.PlanError, match=r"neither from a GPU \(no layer took any time\)"):
        inspection.picture(idle, tmp_path / "x.png")


@pytest.fixture
def drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'jetrt[plot]')")

    def draw(data, **options):
        """The words of the picture. SVG keeps them as text when it is told to."""
        import matplotlib

        with matplotlib.rc_context({"svg.fonttype": "none"}):
            inspection.picture(data, tmp_path / "x.svg", **options)
        inspection.picture(data, tmp_path / "x.png", **options)
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        return (tmp_path / "x.svg").read_text()

    return draw


def test_a_picture_of_what_was_measured_here(plan, drawn):
    stamp(plan)
    words = drawn(on(Device(), plan, runs=1))
    for said in (
        "det.engine on Orin, TensorRT 10.3.0.30",
        "profile 0: x [2, 3]",
        "1.000 ms in all",
        "median time of a layer, ms",
        "added up, % of all layers",
        "0.6 ms",
        "head 1",
        "fp16  60.0 %",
        "fp32  20.0 %",
        "unknown  10.0 %",
        "conversion or other  10.0 %",
    ):
        assert f">{said}<" in words, said


def test_a_picture_of_what_the_build_measured(plan, drawn):
    stamp(plan, audit=AUDIT)
    words = drawn(collect(plan, gpu="off"), layers=2)
    assert ">det.engine on Orin, TensorRT 10.3.0.30, as measured when it was built<" in words
    assert ">2 slowest of 4 layers, 1.000 ms in all<" in words
    assert ">copy<" not in words


# The command ----------------------------------------------------------------------------------------------------------


def command(*words):
    parser = argparse.ArgumentParser(prog="jetrt inspect")
    add_inspect(parser)
    arguments = parser.parse_args([str(word) for word in words])
    arguments.function(arguments)


def test_the_command_prints_text(plan, capsys):
    command(plan, "--no-gpu")
    assert capsys.readouterr().out == text(collect(plan, gpu="off")) + "\n"


def test_the_command_prints_json(plan, capsys):
    stamp(plan)
    command(plan, "--no-gpu", "--json")
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(collect(plan, gpu="off")))


def test_the_command_passes_everything_on(plan, monkeypatch, capsys, tmp_path):
    asked = {}
    data = on(Device(), plan)

    def remember(path, **options):
        asked.update(path=path, **options)
        return data

    monkeypatch.setattr(inspection, "collect", remember)
    monkeypatch.setattr(inspection, "picture", lambda data, out: asked.update(picture=out))
    options = ["--profile", 1, "--shape", "a=b=1x3x5", "--shape", "n=", "--repeat", 7, "--layers", 0]
    options += ["--refit", "m.onnx", "--plugin", "p.so", "--allow-host-code", "--picture", tmp_path / "x.png"]
    command(plan, *options)
    assert asked == {
        "path": plan,
        "gpu": "require",
        "profile": 1,
        "shapes": {"a=b": (1, 3, 5), "n": ()},
        "runs": 7,
        "load": {"refit": "m.onnx", "plugins": [tmp_path.__class__("p.so")], "allow_host_code": True},
        "picture": tmp_path / "x.png",
    }
    assert capsys.readouterr().out.endswith(f"\nlayer times drawn in {tmp_path / 'x.png'}\n")
    command(plan)
    assert (asked["gpu"], asked["profile"], asked["load"]) == ("auto", 0, {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--profile=-1"], "argument --profile: '-1' is not a whole number of at least 0"),
        (["--profile", "x"], "'x' is not a whole number of at least 0"),
        (["--repeat", "0"], "0 is not a whole number of at least 1"),
        (["--shape", "1x3"], "'1x3': write it as NAME=1x3x224x224"),
        (["--shape", "x=1,3"], "'x=1,3': write it as NAME=1x3x224x224"),
    ],
)
def test_a_command_line_that_makes_no_sense(plan, capsys, words, message):
    with pytest.raises(SystemExit):
        command(plan, *words)
    assert message in capsys.readouterr().err


@given(st.text(max_size=8).filter(bool), st.lists(st.integers(0, 10**6), max_size=5))
def test_shapes_are_read_as_written(name, shape):
    from jetrt.commands.inspect import _shape

    assert _shape(f"{name}={'x'.join(map(str, shape))}") == (name, tuple(shape))
