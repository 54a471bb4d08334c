"""The runtime "pytorch_fp16" on torch's CPU. What only a GPU shows is in tests/gpu/test_runtimes.py."""

from __future__ import annotations

import logging
import re
import threading
import zipfile
from typing import NamedTuple

import numpy as np
import pytest

import jetrt
from jetrt import errors
from jetrt.cli import main
from jetrt.runtimes.pytorch_fp16 import TorchModel  # imports no torch

torch = pytest.importorskip("torch", reason="torch is not installed")

# torch warns of its own plans with both of these.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:CUDA initialization.*:UserWarning"),
]

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x, scale=None):
        y = self.dropout(self.linear(x))
        return {"y": y if scale is None else y * scale, "total": y.sum(-1)}


@pytest.fixture
def head():
    torch.manual_seed(0)
    return Head().eval()


@pytest.fixture
def program(head, tmp_path):
    dynamic = {"x": {0: torch.export.Dim("n", min=1, max=8)}}
    torch.export.save(torch.export.export(head, (X,), dynamic_shapes=dynamic), tmp_path / "head.pt2")
    return tmp_path / "head.pt2"


@pytest.fixture
def script(head, tmp_path):
    torch.jit.save(torch.jit.trace(head, (X,), strict=False), tmp_path / "head.pt")
    return tmp_path / "head.pt"


def on_cpu(source, **options):
    return jetrt.load(source, runtime="pytorch_fp16", device="cpu", **options)


def expected(head, dtype=None):
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype or torch.float16, enabled=dtype is not None):
        return head(X)


# ------------------------------------------------------------------------------------------------ the three kinds


@pytest.mark.parametrize("kind", ["module", "script", "program"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_kind_in_every_type(head, request, kind, dtype):
    source = head if kind == "module" else request.getfixturevalue(kind)
    model = on_cpu(source, autocast_dtype=dtype)
    wanted = expected(head, None if dtype == "float32" else getattr(torch, dtype))
    found = model(X)
    assert list(found) == ["y", "total"]
    for name in found:
        # TorchScript adds up in float32 under autocast.
        assert found[name].dtype == (torch.float32 if (kind, name) == ("script", "total") else getattr(torch, dtype))
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-2, atol=1e-2, check_dtype=False)
        assert not found[name].requires_grad
    assert model.load_report["autocast_dtype"] == dtype
    assert model.load_report["kind"] == {"script": "TorchScript", "program": "torch.export program"}.get(kind, "module")
    assert model.outputs["y"].shape == (2, 3)


def test_autocast_is_float16_unless_something_else_is_asked_for(head):
    assert on_cpu(head)(X)["y"].dtype == torch.float16


def test_autocast_of_the_caller_does_not_reach_in(head):
    model = on_cpu(head, autocast_dtype="float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(X)["y"].dtype == torch.float32


def test_training_mode_of_a_file(head, tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x):
            return self.dropout(x)

    torch.jit.save(torch.jit.script(Plain().train()), tmp_path / "script.pt")
    assert torch.equal(on_cpu(tmp_path / "script.pt", autocast_dtype="float32")(X)["output"], X)
    # A trace has the mode of its making in it.
    torch.jit.save(torch.jit.trace(head.train(), (X,), strict=False, check_trace=False), tmp_path / "trace.pt")
    with pytest.raises(
        errors.EngineDeserializeError, match=r"traced in training mode \(aten::dropout is fixed to it\)"
    ):
        on_cpu(tmp_path / "trace.pt")


def test_call_shapes(head):
    model = on_cpu(head, autocast_dtype="float32")
    assert model.input_names == ("x", "scale")
    wanted = expected(head)["y"]
    scaled = wanted * 2
    for call in (lambda: model(X), lambda: model(x=X), lambda: model.run({"x": X}), lambda: model.run([X])):
        torch.testing.assert_close(call()["y"], wanted)
    torch.testing.assert_close(model(X, scale=2.0)["y"], scaled)  # a number goes in as it is
    torch.testing.assert_close(model(X, torch.tensor(2.0), synchronize=True, timeout=1)["y"], scaled)
    torch.testing.assert_close(model(X, None)["y"], wanted)


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (lambda x: x, ["output"]),
        (lambda x: (x, None, x), ["output_0", "output_2"]),
        (lambda x: [x], ["output_0"]),
        (lambda x: {"a": x, "b": None}, ["a"]),
        (lambda x: Pair(x, x), ["left", "right"]),
        (lambda x: torch.max(x, -1), ["output_0", "output_1"]),
    ],
)
def test_names_of_results(result, names):
    class Made(torch.nn.Module):
        def forward(self, x):
            return result(x)

    assert list(on_cpu(Made().eval())(X)) == names


def test_output_names(head):
    model = on_cpu(head, output_names=("left", "right"))
    assert list(model(X)) == ["left", "right"]
    with pytest.raises(errors.InferenceError, match=r"output_names has 1 names \(one\) and the model gave 2 results"):
        on_cpu(head, output_names=("one",))(X)


def test_numpy_in_and_out(head):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    model = on_cpu(head, autocast_dtype="float32")
    found = model(X.numpy())["y"]
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, expected(head)["y"].numpy(), rtol=1e-6)
    frozen = X.numpy().copy()
    frozen.flags.writeable = False  # torch cannot share it
    np.testing.assert_array_equal(model(frozen)["y"], found)
    assert on_cpu(head, autocast_dtype="bfloat16")(X.numpy())["y"].dtype == ml_dtypes.bfloat16
    half = on_cpu(head.to(torch.bfloat16), autocast_dtype="float32")
    assert half(X.numpy().astype(ml_dtypes.bfloat16))["y"].dtype == ml_dtypes.bfloat16
    assert model.stats == {"calls": 2, "host_copies": 0}


def test_out(head):
    model = on_cpu(head, autocast_dtype="float32")
    targets = {"y": torch.empty(2, 3), "total": np.empty(2, np.float32)}
    answer = model(X, out=targets)
    assert answer["y"] is targets["y"]
    torch.testing.assert_close(targets["y"], expected(head)["y"])
    np.testing.assert_allclose(targets["total"], expected(head)["total"].numpy(), rtol=1e-5)
    for bad, error, message in (
        ({"y": targets["y"]}, errors.InputNameError, "output 'total': found nothing in out="),
        ({**targets, "z": X}, errors.InputNameError, "output 'z': found no output of that name in out="),
        ({**targets, "y": torch.empty(3, 3)}, errors.ShapeError, "output 'y': found [3, 3]; allowed: [2, 3]"),
        ({**targets, "y": torch.empty(2, 3).double()}, errors.DTypeError, "output 'y': found torch.float64; allowed:"),
        ({**targets, "y": [1]}, errors.DTypeError, "output 'y': found a list; allowed: a tensor or array"),
    ):
        with pytest.raises(error, match="^" + re.escape(message)):
            model(X, out=bad)


@pytest.mark.parametrize("kind", ["script", "program"])
def test_jetrt_run(kind, head, request, tmp_path, monkeypatch, capsys):
    """Outputs are written although nothing says their names before the first call."""
    model = str(request.getfixturevalue(kind))
    monkeypatch.setattr("jetrt.commands.run.load", lambda path, runtime: on_cpu(path, autocast_dtype="float32"))
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X.numpy())
    words = ["run", model, "--runtime", "pytorch_fp16"]
    assert main([*words, "--input", "x=x.npy", "--output-dir", "out", "--output", "total=t.npy"]) == 0
    np.testing.assert_allclose(np.load("out/y.npy"), expected(head)["y"].numpy(), rtol=1e-6)
    np.testing.assert_allclose(np.load("t.npy"), expected(head)["total"].numpy(), rtol=1e-6)
    capsys.readouterr()
    assert main([*words, "--input", "x=x.npy", "--output", "z=z.npy"]) == 2
    assert capsys.readouterr().err == "jetrt: --output z=z.npy: the outputs are y, total\n"
    assert main([*words, "--random-inputs", "1", "--shape", "x=2x4"]) == (2 if kind == "script" else 0)
    if kind == "script":
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"jetrt: {model} does not say what its inputs are: give each of them with --input NAME=FILE.npy"


def test_what_is_known_before_the_first_call(head, program, script):
    model = on_cpu(program)
    assert (model.inputs["x"].dtype, model.inputs["x"].shape) == ("float32", (-1, 4))
    for source in (head, script):
        model = on_cpu(source)
        assert model.inputs == model.outputs == {}
        assert model.input_names[0] == "x"
        model(X)
        assert (model.inputs["x"].dtype, model.inputs["x"].shape) == ("float32", (2, 4))
        assert (model.outputs["y"].dtype, model.outputs["y"].location) == ("float16", "host")
    for example in ({"x": X}, [X.numpy()]):
        model = on_cpu(head, example=example)
        assert model.inputs["x"].shape == (2, 4)
        assert model.outputs["total"].shape == (2,)


def test_constants_of_a_program(head, tmp_path):
    exported = torch.export.export(head, (X,), {"scale": None})
    torch.export.save(exported, tmp_path / "constant.pt2")
    model = on_cpu(tmp_path / "constant.pt2", autocast_dtype="float32")
    assert model.input_names == ("x",)
    torch.testing.assert_close(model(x=X)["y"], expected(head)["y"])
    exported = torch.export.export(head, (), {"x": X, "scale": torch.tensor(2.0)})  # by name
    model = on_cpu(exported, autocast_dtype="float32")
    torch.testing.assert_close(model(scale=torch.tensor(3.0), x=X)["y"], expected(head)["y"] * 3)


# --------------------------------------------------------------------------------------------------- six methods


@pytest.mark.parametrize("kind", ["script", "program"])
def test_six_methods(head, request, kind, tmp_path):
    path = request.getfixturevalue(kind)
    runtime = jetrt.get_runtime("pytorch_fp16", device="cpu")
    assert runtime.current_runtime_label() == "pytorch_fp16"
    entry = runtime.compile_engine(path, jetrt.BuildConfig("bf16"))
    assert set(entry.versions) == {"torch", "jetrt"}
    entry.save(tmp_path / "head.json")
    handle = runtime.deserialize_engine(jetrt.EngineCacheEntry.load(tmp_path / "head.json"))
    found = runtime.infer(handle, {"x": X})["y"]
    torch.testing.assert_close(found, expected(head, torch.bfloat16)["y"])
    assert found.dtype == torch.bfloat16  # what the entry says
    assert isinstance(runtime.thermal_state(), jetrt.ThermalState)
    runtime.release_engine(handle)
    with pytest.raises(errors.ClosedEngineError, match="head: the model is closed"):
        runtime.infer(handle, {"x": X})


def test_six_methods_with_a_module(head, tmp_path, caplog):
    caplog.set_level(logging.INFO, "jetrt")
    runtime = jetrt.get_runtime("pytorch_fp16", device="cpu")
    entries = [runtime.compile_engine(head, config) for config in (jetrt.BuildConfig("bf16"), None)]
    handles = [runtime.deserialize_engine(entry) for entry in entries]
    assert [runtime.infer(handle, {"x": X})["y"].dtype for handle in handles] == [torch.bfloat16, torch.float16]
    ready = [record.fields["engines"] for record in caplog.records if getattr(record, "event", None) == "ready"]
    assert ready[-1] == ["Head 0@bf16", "Head 1"]
    for handle in handles:
        runtime.release_engine(handle)
    with pytest.raises(errors.ClosedEngineError):
        runtime.infer(handles[0], {"x": X})
    runtime.deserialize_engine(entries[0])  # the module is still there
    with pytest.raises(errors.EngineBuildError, match="made from a module in this process; there is no file"):
        entries[0].save(tmp_path / "head.json")
    with pytest.raises(errors.EngineDeserializeError, match="made from a module by another runtime object"):
        jetrt.get_runtime("pytorch_fp16", device="cpu").deserialize_engine(entries[0])
    with pytest.raises(errors.EngineBuildError, match="Head: the module is in training mode"):
        runtime.compile_engine(head.train())
    with pytest.raises(errors.EngineBuildError, match=r"pytorch_fp16 takes a torch\.nn\.Module, .*not a int"):
        runtime.compile_engine(3)


def test_precision_of_the_configuration(program):
    plain = jetrt.get_runtime("pytorch_fp16", device="cpu")
    assert plain.compile_engine(program).build_config is None
    for config, dtype in ((None, torch.float16), (jetrt.BuildConfig("fp32"), torch.float32)):
        handle = plain.deserialize_engine(plain.compile_engine(program, config))
        assert plain.infer(handle, {"x": X})["y"].dtype == dtype
    for precision in ("int8", "fp8", "mixed"):
        with pytest.raises(
            errors.EngineBuildError, match=f"precision '{precision}' was asked for, and pytorch_fp16 has"
        ):
            plain.compile_engine(program, jetrt.BuildConfig(precision))
    fixed = jetrt.get_runtime("pytorch_fp16", device="cpu", autocast_dtype="float16")
    with pytest.raises(
        errors.EngineBuildError, match="says precision 'bf16' and the runtime's options say autocast_dtype"
    ):
        fixed.compile_engine(program, jetrt.BuildConfig("bf16"))
    with pytest.raises(errors.EngineBuildError, match=r"names input 'z' of rank 1; the model has x float32\[-1, 4\]"):
        plain.compile_engine(program, jetrt.BuildConfig(optimization_profiles=[("z", (1,), (1,), (1,))]))


def test_from_a_configuration(program):
    config = {"name": "pytorch_fp16", "precision": "bf16", "pytorch_fp16": {"device": "cpu"}}
    from jetrt.runtime import from_config

    runtime = from_config(config)
    handle = runtime.deserialize_engine(runtime.compile_engine(program))
    assert runtime.infer(handle, {"x": X})["y"].dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------- bad input


def test_without_cuda_the_cpu_is_not_taken_in_silence(program, no_variables, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(errors.RuntimeNotAvailableError) as caught:
        jetrt.load(program, runtime="pytorch_fp16")
    (missing,) = caught.value.missing
    assert missing.startswith(f"a CUDA device for torch (torch {torch.__version__} ")
    assert missing.endswith('device="cpu" must be asked for')
    assert "pytorch_fp16" not in caught.value.available
    with pytest.raises(errors.RuntimeNotAvailableError, match="a CUDA device for torch"):
        TorchModel(program, device="cuda:3")


@pytest.fixture
def no_variables(monkeypatch):
    monkeypatch.delenv("BUILD_PYTORCH_FP16_RUNTIME", raising=False)


def test_a_device_that_is_none(head):
    with pytest.raises(errors.RuntimeNotAvailableError, match="a device 'gpu'"):
        jetrt.load(head, runtime="pytorch_fp16", device="gpu")
    with pytest.raises(ValueError, match="device is 'gpu'; allowed: "):
        TorchModel(head, device="gpu")
    with pytest.raises(ValueError, match="autocast_dtype is 'half'; allowed: float16, bfloat16, float32"):
        on_cpu(head, autocast_dtype="half")


def test_a_module_is_never_changed(head):
    head.train()
    with pytest.raises(
        errors.EngineDeserializeError, match=r"Head: the module is in training mode, .*module\.eval\(\)"
    ):
        on_cpu(head)
    assert head.training
    with pytest.raises(
        errors.EngineDeserializeError, match=r"Head: its weights lie on meta and pytorch_fp16 .*module\.to\('cpu'\)"
    ):
        on_cpu(head.eval().to("meta"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: torch.save(Head().state_dict(), p),
            "it is a pickle of torch.save (weights, or a module that only its",
        ),
        (lambda p: torch.save(Head(), p), "it is a pickle of torch.save (weights, or a module that only its"),
        (lambda p: p.write_bytes(b"ftrt" + bytes(60)), "it is a TensorRT plan; pytorch_fp16 takes TorchScript"),
        (lambda p: p.write_bytes(b"noise" * 20), "it is no torch archive; pytorch_fp16 takes TorchScript"),
        (lambda p: p.write_bytes(b""), "it is no torch archive"),
        (lambda p: archive(p, "m/other.txt"), "it is an archive of another kind"),
        (lambda p: archive(p, "m/data/aotinductor/model/x.so"), "it is a package of AOTInductor"),
        (lambda p: archive(p, "m/code/__torch__.py", "m/constants.pkl"), f"torch {torch.__version__} refused it as a"),
        (
            lambda p: archive(p, "m/models/model.json"),
            f"torch {torch.__version__} refused it as a torch.export program",
        ),
    ],
)
def test_a_file_that_it_cannot_take(tmp_path, make, message):
    path = tmp_path / "model.pt"
    make(path)
    with pytest.raises(errors.EngineDeserializeError, match=re.escape(message)) as caught:
        on_cpu(path)
    assert caught.value.path == str(path)
    with pytest.raises(errors.EngineBuildError, match=re.escape(message)):
        jetrt.get_runtime("pytorch_fp16", device="cpu").compile_engine(path)


def archive(path, *names):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "x")


def test_an_object_that_it_cannot_take(tmp_path):
    with pytest.raises(
        errors.EngineDeserializeError, match=r"function: pytorch_fp16 takes a torch\.nn\.Module, .*not a func"
    ):
        on_cpu(archive)
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        on_cpu(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(), errors.InputNameError, "input 'x': found nothing (the input is missing); allowed: an array."),
        (lambda m: m(X, z=X), errors.InputNameError, "input 'z': found no input of that name; allowed: x, scale."),
        (lambda m: m(X, x=X), errors.InputNameError, "input 'x': found the input twice (by position and by name);"),
        (lambda m: m(X, X, X), errors.InputNameError, "input '#2': found 3 positional inputs; allowed: 2: x, scale."),
        (lambda m: m([1.0]), errors.DTypeError, "input 'x': found an object of type list; allowed: an array of torch"),
        (lambda m: m(X.numpy()[::-1]), errors.LayoutError, "input 'x': found dtype <f4, strides (-16, 4) (bytes);"),
        (lambda m: m(X.numpy().astype(">f4")), errors.LayoutError, "input 'x': found dtype >f4"),
        (lambda m: m(np.ma.masked_array(X.numpy(), X.numpy() > 0)), errors.LayoutError, "input 'x': found dtype <f4"),
        (lambda m: m(X.clone().requires_grad_()), errors.GradError, "input 'x': found a tensor that requires grad"),
        (lambda m: m(X.to("meta")), errors.DeviceError, "input 'x': found meta; allowed: cpu or cpu."),
        (lambda m: m(X, stream=1), errors.InferenceError, "Head: device 'cpu' has no streams, so it cannot wait for"),
        (lambda m: m(X[:, :3]), errors.InferenceError, "Head: torch failed: RuntimeError: "),
    ],
)
def test_bad_input(head, call, error, message):
    model = on_cpu(head)
    with pytest.raises(error, match="^" + re.escape(message)):
        call(model)
    assert model.stats["calls"] == 0
    assert model(X)["y"].shape == (2, 3)  # and the next call works


def test_a_program_holds_its_callers_to_its_inputs(program):
    model = on_cpu(program)
    with pytest.raises(errors.ShapeError, match=r"^input 'x': found \[2, 3\]; allowed: \[any, 4\]\."):
        model(X[:, :3])
    with pytest.raises(errors.DTypeError, match=r"^input 'x': found float64; allowed: float32\."):
        model(X.double())
    with pytest.raises(errors.InferenceError, match=r"head: torch failed: .*Bound: x float32\[9, 4\]"):
        model(torch.zeros(9, 4))  # its own guard


def test_a_module_that_raises_or_returns_what_is_no_tensor():
    class Bad(torch.nn.Module):
        def forward(self, x, how="raise"):
            if how == "raise":
                raise KeyError("no such head")
            if how == "memory":
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return {"y": x, "text": "hello"}

    model = on_cpu(Bad().eval())
    with pytest.raises(errors.InferenceError, match=r"Bad: torch failed: KeyError: 'no such head'\. Bound: x float32"):
        model(X)
    with pytest.raises(errors.OutOfMemoryError, match=r"Bad: CUDA out of memory\. Tried .*Bound: x float32\[2, 4\]"):
        model(X, "memory")
    with pytest.raises(errors.InferenceError, match="result 'text' is a str, not a tensor"):
        model(X, "text")


def test_signatures_of_modules():
    class Open(torch.nn.Module):
        def forward(self, x, **more):
            return x * more.get("factor", 1)

    class ByPosition(torch.nn.Module):
        def forward(self, x, /):
            return x

    torch.testing.assert_close(on_cpu(Open().eval())(X, factor=3.0)["output"], X * 3)
    with pytest.raises(errors.EngineDeserializeError, match="ByPosition: forward takes 'x' by position alone"):
        on_cpu(ByPosition().eval())


def test_closed(head):
    model = on_cpu(head)
    with model:
        assert "on cpu" in repr(model)
    assert model.closed
    assert "closed" in repr(model)
    with pytest.raises(errors.ClosedEngineError):
        model(X)


def test_threads(head, caplog):
    caplog.set_level(logging.INFO, "jetrt")
    runtime = jetrt.get_runtime("pytorch_fp16", device="cpu", autocast_dtype="float32")
    model = runtime.open(head)
    failures = []

    def work(seed):
        for i in range(30):
            x = torch.full((2, 4), float(seed * 100 + i))
            with torch.no_grad():
                if not torch.allclose(model(x)["y"], head(x)["y"]):
                    failures.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert model.stats["calls"] == 120
