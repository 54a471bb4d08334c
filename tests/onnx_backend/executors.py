"""Two ways to run a case on TensorRT: NVIDIA's Python binding, and jetrt. Same parser, same flags, same shapes.

Both build with optimisation level 1 (time), TF32 off (the suite's tolerances are those of fp32), and one optimisation
profile that has exactly the shapes, and the values of shape tensors, of the case's data.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case, difference
from pool import Result, Stage

Arrays = dict[str, np.ndarray]
LEVEL = 1


class Refused(Exception):
    """The case ended in `stage`."""

    def __init__(self, stage: str, reason: str, error: str = "") -> None:
        super().__init__(reason)
        self.stage, self.reason, self.error = stage, reason, error


def first_line(text: object) -> str:
    return next(iter(str(text).strip().splitlines()), "")


def data_types() -> dict[str, np.dtype]:
    """TensorRT's name of each element type that a tensor of a byte or more can have, and numpy's."""
    import ml_dtypes

    names = {
        "FLOAT": np.float32,
        "HALF": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "FP8": ml_dtypes.float8_e4m3fn,
        "INT8": np.int8,
        "UINT8": np.uint8,
        "INT32": np.int32,
        "INT64": np.int64,
        "BOOL": np.bool_,
    }
    return {name: np.dtype(kind) for name, kind in names.items()}


def arrays_of(case: Case, types: Mapping[str, np.dtype]) -> list[Arrays]:
    """The inputs of every run by name."""
    runs = []
    for inputs, _ in case.data:
        for name, value in zip(case.inputs, inputs, strict=True):
            if not isinstance(value, np.ndarray):
                raise Refused("type", f"input {name!r} is no tensor ({type(value).__name__})")
            if value.dtype not in types.values():
                raise Refused("type", f"input {name!r} is {value.dtype.name}, which no TensorRT tensor can be")
        runs.append(
            {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in zip(case.inputs, inputs, strict=True)}
        )
    return runs


def ranges(found: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """min, opt, max of shapes, or of the values of a shape tensor; opt is the first run's."""
    columns = list(zip(*found, strict=True))
    return tuple(map(min, columns)), tuple(found[0]), tuple(map(max, columns))


def of_every_run(runs: Sequence[Arrays], name: str) -> list[np.ndarray]:
    """The parser makes an input of the network of what the body of a Loop takes; the model has none of that name."""
    if any(name not in run for run in runs):
        raise Refused("shape", f"the network has an input {name!r} that the model has not")
    return [run[name] for run in runs]


class TensorRT:
    """What both have in common: how a case ends."""

    def run(self, case: Case, stage: Stage) -> Result:
        at = "parser"

        def enter(name: str) -> None:
            nonlocal at
            at = name
            stage(name)

        try:
            results = self.execute(case, enter)
        except Refused as error:
            return Result(error.stage, first_line(error), error.error)
        except Exception as error:  # an error of the library's: a result, whatever it is
            log = getattr(error, "log", None) or [""]
            reason = f"{first_line(error)}; {log[-1]}" if log[-1] else first_line(error)
            return Result(self.stage_of(error, at), reason, type(error).__name__)
        for (inputs, expected), found in zip(case.data, results, strict=True):
            complaint = difference(expected, found, case.rtol, case.atol)
            if complaint:
                return Result("wrong", complaint, gate=self.gate(case, inputs, expected, found))
        return Result("pass")

    def execute(self, case: Case, stage: Stage) -> list[list[np.ndarray]]:
        """The outputs of each run, in the order of the case's names."""
        raise NotImplementedError

    def stage_of(self, error: Exception, at: str) -> str:
        return at

    def gate(self, case: Case, inputs: Any, expected: Any, found: Any) -> str:
        """What the parity gate says of a wrong result: its refusal, or "passed"; "" where there is none."""
        return ""


class Binding(TensorRT):
    """NVIDIA's Python binding (`tensorrt_bindings`, or `tensorrt`), and the driver through ctypes."""

    def __init__(self, folder: Path) -> None:
        try:
            import tensorrt_bindings as trt
        except ImportError:
            import tensorrt as trt
        self.trt = trt
        self.types = data_types()
        self.log: list[str] = []

        class Logger(trt.ILogger):
            def __init__(logger) -> None:
                trt.ILogger.__init__(logger)

            def log(logger, severity: Any, text: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    self.log.append(text)

        self.logger = Logger()
        trt.init_libnvinfer_plugins(self.logger, "")
        self.cuda = Cuda()
        self.builder = trt.Builder(self.logger)
        self.runtime = trt.Runtime(self.logger)

    def versions(self) -> dict[str, str]:
        return {"executor": "binding", "tensorrt": self.trt.__version__}

    def execute(self, case: Case, stage: Stage) -> list[list[np.ndarray]]:
        self.log.clear()
        try:
            plan, runs = self.build(case, stage)
            stage("run")
            return self.infer(case, plan, runs)
        finally:
            self.cuda.free()

    def refused(self, stage: str, otherwise: str) -> Refused:
        return Refused(stage, self.log[-1] if self.log else otherwise)

    def build(self, case: Case, stage: Stage) -> tuple[Any, list[Arrays]]:
        trt = self.trt
        stage("parser")
        network = self.builder.create_network(0)
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse(case.model):
            if not parser.num_errors:
                raise self.refused("parser", "refused without an error")
            error = parser.get_error(0)
            raise Refused("parser", f"{error.node_operator()}: {error.desc()}", str(error.code()))

        runs = arrays_of(case, self.types)
        stage("shape")
        config = self.builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        config.builder_optimization_level = LEVEL
        profile = self.builder.create_optimization_profile()
        needed = False
        try:
            for tensor in (network.get_input(i) for i in range(network.num_inputs)):
                found = of_every_run(runs, tensor.name)
                if tensor.is_shape_tensor:
                    profile.set_shape_input(tensor.name, *ranges([a.ravel().tolist() for a in found]))
                    needed = True
                if -1 in tensor.shape:
                    profile.set_shape(tensor.name, *ranges([a.shape for a in found]))
                    needed = True
        except (TypeError, ValueError) as error:
            raise Refused("shape", first_line(error), type(error).__name__) from error
        if needed and config.add_optimization_profile(profile) < 0:
            raise self.refused("shape", "the profile was not taken")

        stage("builder")
        plan = self.builder.build_serialized_network(network, config)
        if plan is None:
            raise self.refused("builder", "no plan, and no error was logged")
        return plan, runs

    def infer(self, case: Case, plan: Any, runs: list[Arrays]) -> list[list[np.ndarray]]:
        trt, cuda = self.trt, self.cuda
        engine = self.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self.refused("run", "the plan cannot be loaded")
        context = engine.create_execution_context()
        if context is None:
            raise self.refused("run", "no execution context")
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        mode = {name: engine.get_tensor_mode(name) for name in names}
        on_host = {name: engine.get_tensor_location(name) == trt.TensorLocation.HOST for name in names}
        types = {name: self.types.get(engine.get_tensor_dtype(name).name) for name in names}

        class Output(trt.IOutputAllocator):
            """Where TensorRT itself says how large an output is."""

            def __init__(output) -> None:
                trt.IOutputAllocator.__init__(output)
                output.address, output.shape = cuda.alloc(1), ()

            def reallocate_output(output, name: str, memory: int, size: int, alignment: int) -> int:
                output.address = cuda.alloc(size)
                return output.address

            def reallocate_output_async(output, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
                return output.reallocate_output(name, memory, size, alignment)

            def notify_shape(output, name: str, shape: Any) -> None:
                output.shape = tuple(shape)

        results = []
        for run in runs:
            bound: dict[str, Any] = {}
            for name in names:
                if mode[name] != trt.TensorIOMode.INPUT:
                    continue
                array = run[name]
                if array.dtype != types[name]:
                    raise Refused("type", f"input {name!r} is {types[name]}; the case has {array.dtype}")
                if not context.set_input_shape(name, array.shape):
                    raise self.refused("shape", f"input {name!r}: {list(array.shape)} was not taken")
                bound[name] = np.append(array.ravel(), array.dtype.type(0)) if on_host[name] else cuda.put(array)
                context.set_tensor_address(name, bound[name].ctypes.data if on_host[name] else bound[name])
            try:
                unknown = context.infer_shapes()
            except RuntimeError as error:
                raise self.refused("shape", first_line(error)) from error
            if unknown:
                raise Refused("shape", f"no shape for {', '.join(unknown)}")
            for name in names:
                if mode[name] == trt.TensorIOMode.INPUT:
                    continue
                shape = tuple(context.get_tensor_shape(name))
                if types[name] is None:
                    raise Refused("type", f"output {name!r} is {engine.get_tensor_dtype(name).name}")
                if on_host[name]:
                    bound[name] = np.zeros(max(int(np.prod(shape)), 1), types[name])
                    context.set_tensor_address(name, bound[name].ctypes.data)
                elif -1 in shape:
                    bound[name] = Output()
                    context.set_output_allocator(name, bound[name])
                else:
                    bound[name] = cuda.alloc(int(np.prod(shape)) * types[name].itemsize)
                    context.set_tensor_address(name, bound[name])
            done = context.execute_async_v3(cuda.stream)
            cuda.synchronize()
            if not done:
                raise self.refused("run", "execute_async_v3 returned false")
            outputs = {}
            for name in names:
                if mode[name] == trt.TensorIOMode.INPUT:
                    continue
                shape, at = tuple(context.get_tensor_shape(name)), bound[name]
                if isinstance(at, Output):
                    shape, at = at.shape, at.address
                count = int(np.prod(shape))
                outputs[name] = (at[:count] if on_host[name] else cuda.get(at, count, types[name])).reshape(shape)
            missing = [name for name in case.outputs if name not in outputs]
            if missing:
                raise Refused("run", f"the engine has no output {', '.join(missing)}")
            results.append([outputs[name] for name in case.outputs])
        return results


class Jetrt(TensorRT):
    """jetrt's parser, builder and engine, in one process: what `jetrt build` does in a child."""

    def __init__(self, folder: Path) -> None:
        import jetrt
        from jetrt import _core

        self.jetrt, self.network = jetrt, _core._Network
        self.folder = folder
        self.types = data_types()
        _core._Network()  # opens the libraries now: their absence is no property of a case

    def versions(self) -> dict[str, str]:
        return {"executor": f"jetrt {self.jetrt.__version__}", "tensorrt": str(self.jetrt.library_info()["tensorrt"])}

    def stage_of(self, error: Exception, at: str) -> str:
        errors = self.jetrt.errors
        return {errors.ShapeError: "shape", errors.DTypeError: "type"}.get(type(error), at)

    def execute(self, case: Case, stage: Stage) -> list[list[np.ndarray]]:
        stage("parser")
        model, plan = self.folder / "model.onnx", self.folder / "model.engine"
        model.write_bytes(case.model)
        network = self.network()
        problems = network.parse(str(model))
        if problems:
            first = problems[0]
            raise self.jetrt.errors.ModelError(f"{first['operator']}: {first['reason']}", problems=problems)

        runs = arrays_of(case, self.types)
        stage("shape")
        network.set_flag("TF32", False)
        network.set_option("builder_optimization_level", LEVEL)
        shapes, values = {}, {}
        for info in network.inputs:
            found = of_every_run(runs, info["name"])
            if info["shape_tensor"]:
                values[info["name"]] = ranges([a.ravel().tolist() for a in found])
            if -1 in info["shape"]:
                shapes[info["name"]] = ranges([a.shape for a in found])
        if shapes or values:
            network.add_profile(shapes, values)

        stage("builder")
        plan.unlink(missing_ok=True)
        network.build(str(plan))
        stage("run")
        results = []
        with self.jetrt.Engine(plan, graphs="off", verify="off") as engine:
            for run in runs:
                outputs = engine.run({name: run[name] for name in engine.inputs}, synchronize=True)
                # Without inputs to follow, an output is jetrt's own tensor, on the device.
                host = {n: v.numpy() if isinstance(v, self.jetrt.Tensor) else v for n, v in outputs.items()}
                results.append([np.asarray(host[name]) for name in case.outputs])
        return results

    def gate(self, case: Case, inputs: Any, expected: Any, found: Any) -> str:
        from jetrt.builder import parity
        from jetrt.builder.reference import Reference

        tried = parity.Case(0, "opt", dict(zip(case.inputs, inputs, strict=True)))
        reference = Reference("npz", dict(zip(case.outputs, expected, strict=True)), {}, 0.0)
        outputs = dict(zip(case.outputs, found, strict=True))
        try:
            parity.gate(parity.judge([tried], [outputs], [reference], parity.Thresholds.of("fp32")))
        except self.jetrt.errors.ParityError as error:
            return f"ParityError: {first_line(error)}"
        return "passed"


class Cuda:
    """Device memory of the primary context of GPU 0; what was allocated lives until `free`."""

    def __init__(self) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.memory: list[int] = []
        self.call("cuInit", 0)
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxSetCurrent", context)
        stream = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(stream), 1)
        self.stream = int(stream.value or 0)

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.driver, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"CUDA: {name} failed with {code}")

    def alloc(self, size: int) -> int:
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        self.memory.append(address.value)
        return address.value

    def put(self, array: np.ndarray) -> int:
        address = self.alloc(array.nbytes)
        if array.nbytes:
            self.call("cuMemcpyHtoD_v2", *map(ctypes.c_uint64, (address, array.ctypes.data, array.nbytes)))
            # It may return before the last bytes have arrived, and the engine's stream does not wait for this one.
            self.call("cuStreamSynchronize", ctypes.c_void_p(0))
        return address

    def get(self, address: int, count: int, dtype: np.dtype) -> np.ndarray:
        array = np.zeros(count, dtype)
        if array.nbytes:
            self.call("cuMemcpyDtoH_v2", *map(ctypes.c_uint64, (array.ctypes.data, address, array.nbytes)))
        return array

    def synchronize(self) -> None:
        self.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def free(self) -> None:
        memory, self.memory = self.memory, []
        for address in memory:
            self.driver.cuMemFree_v2(ctypes.c_uint64(address))


EXECUTORS = {"binding": Binding, "jetrt": Jetrt}
