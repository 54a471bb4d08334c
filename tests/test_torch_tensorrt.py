"""The runtime "torch_tensorrt": refusals by the packages' own words, and the adapter over a stand-in for Torch-TensorRT
that compiles nothing (the program runs in torch) and keeps what it was asked for."""

from __future__ import annotations

import importlib.metadata
import sys
import types

import pytest

import jetrt
from jetrt import errors
from jetrt.runtimes import torch_tensorrt as adapter

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("packaging", reason="packaging is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:CUDA initialization.*:UserWarning"),
]

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x, scale):
        return self.linear(x) * scale


SCALE = torch.tensor(2.0)


@pytest.fixture
def head():
    torch.manual_seed(0)
    return Head().eval()


@pytest.fixture
def packages(monkeypatch):
    """What the metadata of installed packages says: {name: version}, and what torch_tensorrt requires."""

    def set_up(versions, requires):
        real = importlib.metadata.version

        def version(name):
            if name in versions:
                return versions[name]
            if name.startswith("tensorrt") or name == "torch_tensorrt":
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)
        module = types.ModuleType("torch_tensorrt")
        module.__version__ = versions["torch_tensorrt"]
        monkeypatch.setitem(sys.modules, "torch_tensorrt", module)

    return set_up


def missing(**options):
    with pytest.raises(errors.RuntimeNotAvailableError) as caught:
        jetrt.get_runtime("torch_tensorrt", **options)
    assert caught.value.runtime == "torch_tensorrt"
    return caught.value.missing


# ---------------------------------------------------------------------------------------------------------- refusals


def test_another_tensorrt_than_it_is_built_for(packages):
    requires = ["torch<99,>=1", "tensorrt-cu13<11.2.0,>=11.1.0", 'executorch<1.5,>=1.4; extra == "all"']
    packages({"torch_tensorrt": "2.14.0", "tensorrt-cu13": "10.6.0"}, requires)
    assert missing() == [
        "tensorrt-cu13 <11.2.0,>=11.1.0, which torch_tensorrt 2.14.0 is built for (tensorrt-cu13 here is 10.6.0); "
        "install the torch_tensorrt for it"
    ]


def test_another_torch_and_no_tensorrt(packages):
    packages({"torch_tensorrt": "2.5.0", "torch": "2.9.1"}, ["torch<2.6,>=2.5", "tensorrt-cu12==10.3.0"])
    assert missing() == [
        "torch <2.6,>=2.5, which torch_tensorrt 2.5.0 is built for (torch here is 2.9.1); "
        "install the torch_tensorrt for it",
        "tensorrt-cu12 ==10.3.0, which torch_tensorrt 2.5.0 is built for (tensorrt-cu12 is not installed); "
        "install the torch_tensorrt for it",
    ]


def test_two_versions_of_tensorrt_in_one_process(packages):
    packages({"torch_tensorrt": "2.5.0", "tensorrt": "10.3.0"}, ["torch", "tensorrt==10.3.0"])
    (reason,) = missing()
    assert reason.startswith(
        "a TensorRT of ==10.3.0, which torch_tensorrt is built for, as the only one of the process"
    )
    assert f"(jetrt uses {jetrt.library_info()['tensorrt']}); set JETRT_TENSORRT_PATH to it" in reason


@pytest.mark.parametrize(
    ("installed", "specifier"),
    [("10.6.0", "==10.6.0"), ("10.6.0.26", ">=10.6,<10.7"), ("10.6.0.post1", ">=10.6.0.post1")],
)
def test_it_runs_on_no_cpu(packages, installed, specifier):
    """Everything goes together, as the library's number does with the package's."""
    packages({"torch_tensorrt": "2.5.0", "tensorrt": installed}, ["torch", f"tensorrt{specifier}"])
    assert missing(device="cpu") == ["a CUDA device (device='cpu' was asked for, and TensorRT runs on no CPU)"]


# ----------------------------------------------------------------------------------------------------------- adapter


class StandIn:
    """`torch_tensorrt` with the functions that are used."""

    def __init__(self, monkeypatch, parts=("_run_on_acc_0",), autocast=True, fails=None):
        self.asked = []
        module = types.ModuleType("torch_tensorrt")
        module.__version__ = "2.14.0"
        module.dynamo = types.SimpleNamespace()

        class Compiled(torch.nn.Module):
            def __init__(self, program):
                super().__init__()
                self.program = program
                for part in parts:
                    self.add_module(part, torch.nn.Identity())
                self.run = program.module()

            def forward(self, *args, **kwargs):
                return self.run(*args, **kwargs)

        def compile_new(exported_program, *, arg_inputs=None, kwarg_inputs=None, enable_autocast=False, **settings):
            return record(exported_program, arg_inputs, kwarg_inputs, enable_autocast=enable_autocast, **settings)

        def compile_old(exported_program, *, arg_inputs=None, kwarg_inputs=None, enabled_precisions=None, **settings):
            return record(exported_program, arg_inputs, kwarg_inputs, enabled_precisions=enabled_precisions, **settings)

        def record(program, arg_inputs, kwarg_inputs, **settings):
            self.asked.append(types.SimpleNamespace(args=arg_inputs, kwargs=kwarg_inputs, settings=settings))
            if fails:
                raise RuntimeError(fails)
            return Compiled(program)

        def save(compiled, path, *, output_format, arg_inputs, kwarg_inputs):
            assert output_format == "exported_program"
            torch.export.save(compiled.program, path)

        module.dynamo.compile = compile_new if autocast else compile_old
        module.Input = lambda **fields: types.SimpleNamespace(**fields)
        module.save = save
        monkeypatch.setitem(sys.modules, "torch_tensorrt", module)


def compiled(source, **options):
    return adapter.TorchTensorrtModel(source, device="cpu", **options)


def test_a_module_is_exported_and_compiled(head, monkeypatch):
    stand_in = StandIn(monkeypatch)
    model = compiled(head, example={"x": X, "scale": SCALE})
    (asked,) = stand_in.asked
    assert asked.settings["require_full_compilation"] is True
    assert asked.settings["min_block_size"] == 1
    assert asked.settings["enable_autocast"] is True
    assert asked.settings["autocast_low_precision_type"] == torch.float16
    with torch.no_grad():
        torch.testing.assert_close(model(X, SCALE)["output"], head(X, SCALE))
    report = model.load_report
    assert report["compile_seconds"] > 0
    assert report["seconds"] >= report["compile_seconds"]  # in a field of its own
    assert report["parts"] == {"tensorrt": 1, "torch": 0}
    assert model.input_names == ("x", "scale")


def test_older_versions_take_the_precision_otherwise(head, monkeypatch):
    stand_in = StandIn(monkeypatch, autocast=False)
    compiled(head, example=[X, SCALE], autocast_dtype="bfloat16", workspace_mb=8)
    compiled(head, example=[X, SCALE], autocast_dtype="float32")
    assert stand_in.asked[0].settings["enabled_precisions"] == {torch.float32, torch.bfloat16}
    assert stand_in.asked[0].settings["workspace_size"] == 8 << 20
    assert stand_in.asked[1].settings["enabled_precisions"] is None


def test_profiles(head, monkeypatch):
    stand_in = StandIn(monkeypatch)
    model = compiled(head, example={"x": X, "scale": SCALE}, profiles=[("x", (1, 4), (2, 4), (8, 4))])
    ranges = stand_in.asked[0].kwargs["x"]
    assert (ranges.min_shape, ranges.opt_shape, ranges.max_shape) == ((1, 4), (2, 4), (8, 4))
    assert model.inputs["x"].shape == (-1, 4)
    assert model(torch.zeros(5, 4), SCALE)["output"].shape == (5, 3)


def test_a_program_is_compiled_for_its_own_shapes(head, monkeypatch, tmp_path):
    stand_in = StandIn(monkeypatch)
    torch.export.save(torch.export.export(head, (X, SCALE)), tmp_path / "head.pt2")
    model = compiled(tmp_path / "head.pt2")
    assert [tuple(value.shape) for value in stand_in.asked[0].args] == [(2, 4), ()]
    with torch.no_grad():
        torch.testing.assert_close(model(x=X, scale=SCALE)["output"], head(X, SCALE))
    dynamic = ({0: torch.export.Dim("n", min=1, max=8)}, None)
    torch.export.save(torch.export.export(head, (X, SCALE), dynamic_shapes=dynamic), tmp_path / "dynamic.pt2")
    with pytest.raises(
        errors.EngineDeserializeError, match=r"input 'x' has dynamic dimensions \[-1, 4\] and no profile"
    ):
        compiled(tmp_path / "dynamic.pt2")


@pytest.mark.parametrize(
    ("parts", "allow", "message"),
    [
        (("_run_on_acc_0", "_run_on_gpu_1"), False, "1 parts on TensorRT and 1 in torch. Pass allow_partition=True"),
        (("_run_on_gpu_0",), True, "0 parts on TensorRT and 1 in torch. Nothing runs on TensorRT"),
        ((), False, "0 parts on TensorRT and 0 in torch. Nothing runs on TensorRT"),
    ],
)
def test_parts_that_stay_in_torch(head, monkeypatch, parts, allow, message):
    StandIn(monkeypatch, parts)
    with pytest.raises(errors.EngineDeserializeError, match=message):
        compiled(head, example=[X, SCALE], allow_partition=allow)


def test_parts_that_are_allowed_to(head, monkeypatch):
    stand_in = StandIn(monkeypatch, ("_run_on_acc_0", "_run_on_gpu_1", "_run_on_acc_2"))
    model = compiled(head, example=[X, SCALE], allow_partition=True)
    assert stand_in.asked[0].settings["require_full_compilation"] is False
    assert model.load_report["parts"] == {"tensorrt": 2, "torch": 1}


def test_what_it_cannot_compile(head, monkeypatch, tmp_path):
    StandIn(monkeypatch, fails="Conversion of aten.nonzero failed")
    with pytest.raises(
        errors.EngineDeserializeError, match=r"torch_tensorrt 2\.14\.0 refused it: Conversion of aten\.nonz"
    ):
        compiled(head, example=[X, SCALE])
    with pytest.raises(errors.EngineDeserializeError, match=r"a module says nothing about its inputs.*Pass example="):
        compiled(head)
    torch.jit.save(torch.jit.trace(head, (X, SCALE)), tmp_path / "head.pt")
    with pytest.raises(errors.EngineDeserializeError, match=r"this is TorchScript\. Export the module"):
        compiled(tmp_path / "head.pt")

    class Branches(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(errors.EngineDeserializeError, match=r"Branches: torch\.export refused the module"):
        compiled(Branches().eval(), example=[X])


def test_six_methods(head, monkeypatch, tmp_path):
    StandIn(monkeypatch)
    monkeypatch.setattr(adapter.TorchTensorrtRuntime, "missing", classmethod(lambda cls, options=None, deep=True: []))
    torch.export.save(torch.export.export(head, (X, SCALE)), tmp_path / "head.pt2")
    runtime = jetrt.get_runtime("torch_tensorrt", device="cpu")
    entry = runtime.compile_engine(tmp_path / "head.pt2", jetrt.BuildConfig("bf16"))
    assert entry.path == tmp_path / "head.torch_tensorrt_bf16.pt2"
    assert entry.build_config.precision == "bf16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.pt2", "head.torch_tensorrt_bf16.pt2"]
    # What the stand-in saved holds no engine; a real one does, and is loaded without compiling.
    monkeypatch.setattr(adapter, "_engines", lambda graph: 3)
    handle = runtime.deserialize_engine(entry)
    assert handle.model.load_report["compile_seconds"] is None
    assert handle.model.load_report["parts"] == {"tensorrt": 3, "torch": 0}
    with torch.no_grad():
        torch.testing.assert_close(runtime.infer(handle, {"x": X, "scale": SCALE})["output"], head(X, SCALE))
    runtime.release_engine(handle)
    with pytest.raises(
        errors.EngineBuildError, match="precision 'int8' was asked for, and torch_tensorrt has fp32, fp16"
    ):
        runtime.compile_engine(tmp_path / "head.pt2", jetrt.BuildConfig("int8"))
