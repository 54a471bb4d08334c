"""Host time of one engine call: bare C, NVIDIA's binding, the scripts' wrappers, torch, jetrt.

    python benches/host_cost.py --engines FOLDER            # writes benches/results/host_cost.json

Every row of a table runs once a round, in blocks of calls timed one by one, rounds in a new order each time; the
GPU is drained before each block and a block is shorter than the launch queue, so that the time is the host's.
A row that waits for the GPU (`Engine` of the script, host arrays) says so in its name.

Same work is compared with same work: a row of jetrt with stable shapes and addresses with the bare enqueue
(there is nothing to set), one with changing addresses with addresses + enqueue, and so on.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    Block,
    Floor,
    clocks,
    compile_floor,
    engines_folder,
    interleave,
    machine,
    markdown,
    nvinfer_path,
    plain,
    print_targets,
    python_block,
    summary,
    target,
    write,
)

import jetrt

sys.path.append(str(Path(__file__).resolve().parent / "groot"))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
SHAPES = (122, 64)  # S of dit5: the profile's optimum, and one more
WARMUP = 40  # calls per set of inputs before anything is timed: graphs are captured by then
drain = torch.cuda.synchronize


def dit5_inputs(s: int) -> dict[str, torch.Tensor]:
    def mask() -> torch.Tensor:
        return torch.rand(1, s, device="cuda") < 0.9

    return {
        "sa_embs": torch.randn(1, 41, 64, device="cuda", dtype=torch.bfloat16),
        "vl_embs": torch.randn(1, s, 64, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.tensor([7], device="cuda"),
        "image_mask": mask(),
        "backbone_attention_mask": mask(),
    }


class Table:
    """Rows to be timed together, and the engines to ask for their counters afterwards."""

    def __init__(self) -> None:
        self.rows: dict[str, Block] = {}
        self.engines: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}

    def add(self, name: str, call: Callable[[], Any], sets: int = 1, keep_last: bool = False) -> None:
        held = None
        for _ in range(WARMUP * sets if sets <= 8 else 3 * sets):
            held = call()
        del held
        drain()
        self.rows[name] = python_block(call, drain, keep_last)

    def run(self, rounds: int, block: int) -> dict[str, Any]:
        gc.collect()
        gc.freeze()  # what exists now is not walked again in the middle of a call
        before = clocks()
        samples = interleave(self.rows, rounds, block)
        return {
            "unit": "ns of host time per call",
            "rows": {name: summary(s) for name, s in samples.items()},
            "skipped": self.skipped,
            "engine_stats": {name: plain(engine.stats) for name, engine in self.engines.items()},
            "clocks": {"before": before, "after": clocks()},
        }


def jetrt_rows(table: Table, plan: Path, sets: dict[str, list[dict[str, torch.Tensor]]]) -> None:
    for case, inputs in sets.items():
        for mode, graphs in (("eager", "off"), ("graph", "auto")):
            name = f"jetrt {mode}, {case}"
            engine = table.engines[name] = jetrt.Engine(plan, graphs=graphs)
            table.add(name, keyword_call(engine, inputs), sets=len(inputs))
    for mode, graphs in (("eager", "off"), ("graph", "auto")):
        name = f"jetrt {mode}, stable, last output still held"
        engine = table.engines[name] = jetrt.Engine(plan, graphs=graphs)
        table.add(name, keyword_call(engine, sets["stable"]), keep_last=True)


def keyword_call(engine: Any, sets: list[dict[str, torch.Tensor]]) -> Callable[[], Any]:
    """The call as a user writes it: five keyword arguments, no dict taken apart."""
    names = ("sa_embs", "vl_embs", "timestep", "image_mask", "backbone_attention_mask")
    rows = [tuple(s[name] for name in names) for s in sets]
    if len(rows) == 1:
        a, b, t, m, k = rows[0]
        return lambda: engine(sa_embs=a, vl_embs=b, timestep=t, image_mask=m, backbone_attention_mask=k)
    following = itertools.cycle(rows).__next__  # goes on from block to block, so that every set has its turn

    def call() -> Any:
        a, b, t, m, k = following()
        return engine(sa_embs=a, vl_embs=b, timestep=t, image_mask=m, backbone_attention_mask=k)

    return call


def binding_rows(table: Table, plan: Path, sets: dict[str, list[dict[str, torch.Tensor]]], stream: int) -> None:
    try:
        import script_paths
        from script import TensorRTDiTWrapper
    except ImportError as error:
        for name in ("binding", "TensorRTDiTWrapper", "Engine of trt_torch.py"):
            table.skipped[name] = str(error)
        return

    handle = script_paths.load(str(plan))
    context = handle.create_execution_context()
    outputs = [torch.empty(1, 41, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

    def bind(inputs: dict[str, torch.Tensor], output: torch.Tensor) -> None:
        for name, tensor in inputs.items():
            context.set_input_shape(name, tensor.shape)
            context.set_tensor_address(name, tensor.data_ptr())
        context.set_tensor_address("output", output.data_ptr())

    stable = sets["stable"][0]

    def enqueue_only() -> None:
        context.execute_async_v3(stream)

    def full(inputs: list[dict[str, torch.Tensor]]) -> Callable[[], Any]:
        following = itertools.cycle(zip(inputs, outputs, strict=False)).__next__

        def call() -> None:
            bind(*following())
            context.execute_async_v3(stream)

        return call

    bind(stable, outputs[0])
    table.add("binding, enqueue only", enqueue_only)
    inner = table.rows["binding, enqueue only"]

    def rebound(n: int) -> Any:  # another row of this context may have left another shape
        bind(stable, outputs[0])
        return inner(n)

    table.rows["binding, enqueue only"] = rebound
    table.add("binding, shapes + addresses + enqueue", full(sets["stable"]))
    table.add("binding, changing shapes + addresses + enqueue", full(sets["2 shapes"]), sets=2)

    wrapper = TensorRTDiTWrapper(str(plan))
    table.add("TensorRTDiTWrapper", keyword_call(wrapper, sets["stable"]))
    changing = TensorRTDiTWrapper(str(plan))
    table.add("TensorRTDiTWrapper, 2 shapes", keyword_call(changing, sets["2 shapes"]), sets=2)

    for name, wait in (
        ("Engine of trt_torch.py, with its wait", True),
        ("Engine of trt_torch.py, wait left out", False),
    ):
        script = script_paths.Engine(str(plan), synchronize=wait)
        shapes = {key: tuple(value.shape) for key, value in stable.items()}
        values = tuple(stable.values())

        def call(script: Any = script, shapes: Any = shapes, values: Any = values) -> Any:
            for key, shape in shapes.items():
                script.set_runtime_tensor_shape(key, shape)
            return script(*values)

        table.add(name, call)


def main_table(plan: Path, library: Any, on_default: bool, rounds: int, block: int) -> dict[str, Any]:
    stream = torch.cuda.default_stream() if on_default else torch.cuda.Stream()
    first, second = (dit5_inputs(s) for s in SHAPES)
    sets = {
        "stable": [first],
        "2 addresses": [first, dit5_inputs(SHAPES[0])],
        "1000 addresses": [dit5_inputs(SHAPES[0]) for _ in range(1000)],
        "2 shapes": [first, second],
    }
    drain()
    table = Table()
    shapes = [{name: tuple(t.shape) for name, t in inputs.items()} for inputs in (first, second)]
    floor = Floor(library, plan, shapes, stream.cuda_stream)
    table.rows |= {
        "C, enqueueV3 only": floor.block(Floor.ENQUEUE),
        "C, 6 addresses + enqueueV3": floor.block(Floor.ADDRESSES),
        "C, 5 shapes + 6 addresses + enqueueV3": floor.block(Floor.SHAPES),
        "C, 6 changing addresses + enqueueV3": floor.block(Floor.OTHER_ADDRESSES),
        "C, 5 changing shapes + 6 addresses + enqueueV3": floor.block(Floor.OTHER_SHAPES),
        "C, cuGraphLaunch": floor.block(Floor.GRAPH),
    }
    with torch.cuda.stream(stream):
        table.add("the Python timer around nothing", lambda: None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # captures on a stream of its own; replayed on the current one
            floor.enqueue(torch.cuda.current_stream().cuda_stream)
        table.add("torch.cuda.CUDAGraph.replay()", graph.replay)
        binding_rows(table, plan, sets, stream.cuda_stream)
        jetrt_rows(table, plan, sets)
        result = table.run(rounds, block)
    result["stream"] = "legacy default stream" if on_default else "side stream"
    result["graph_nodes"] = floor.graph_nodes
    drain()
    floor.close()
    for engine in table.engines.values():
        engine.close()
    return result


def framework_table(plan: Path, library: Any, rounds: int, block: int) -> dict[str, Any]:
    """mlp.engine, one float32 input of [8, 64] and one output: what numpy, CuPy and JAX can hold too."""
    table = Table()
    side = torch.cuda.Stream()
    host = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    floor = Floor(library, plan, [{"x": (8, 64)}, {"x": (4, 64)}], side.cuda_stream)
    table.rows["C, enqueueV3 only (side stream)"] = floor.block(Floor.ENQUEUE)
    table.rows["C, cuGraphLaunch (side stream)"] = floor.block(Floor.GRAPH)

    def torch_input() -> tuple[Any, str, Any]:
        return torch.from_numpy(host).cuda(), "side stream", lambda: torch.cuda.stream(side)

    def numpy_input() -> tuple[Any, str, Any]:
        return host, "the engine's own stream; copies in and out, waits", contextlib.nullcontext

    def cupy_input() -> tuple[Any, str, Any]:
        import cupy

        return cupy.asarray(host), "side stream", lambda: cupy.cuda.ExternalStream(side.cuda_stream)

    def jax_input() -> tuple[Any, str, Any]:
        import jax

        device = jax.devices()[0]
        if device.platform not in ("gpu", "cuda"):
            raise ImportError(f"this JAX has no GPU backend ({device.platform})")
        return jax.device_put(host, device), "the stream JAX is told of", contextlib.nullcontext

    for framework, make in {
        "torch": torch_input,
        "numpy": numpy_input,
        "cupy": cupy_input,
        "jax": jax_input,
    }.items():
        try:
            x, stream, context = make()
        except Exception as error:  # a framework that is absent or broken here is a line in the result
            table.skipped[framework] = f"{type(error).__name__}: {error}"
            continue
        for mode, graphs in (("eager", "off"), ("graph", "auto")):
            name = f"jetrt {mode}, {framework} ({stream})"
            engine = table.engines[name] = jetrt.Engine(plan, graphs=graphs)

            def call(engine: Any = engine, x: Any = x) -> Any:
                return engine(x=x)

            with context():
                table.add(name, call)
            inner = table.rows[name]

            def in_context(n: int, inner: Block = inner, context: Any = context) -> Any:
                with context():
                    return inner(n)

            table.rows[name] = in_context
    result = table.run(rounds, block)
    result["stream"] = "named per row"
    drain()
    floor.close()
    for engine in table.engines.values():
        engine.close()
    return result


def calls_per_second(threads: int, calls: int, work: Callable[[int], Callable[[], Any]]) -> float:
    """`work(k)` makes thread k's call; the clock stops when the GPU has done it all."""
    ready = threading.Barrier(threads + 1)
    done = threading.Barrier(threads + 1)
    failures: list[BaseException] = []

    def loop(k: int) -> None:
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                call = work(k)
                for _ in range(WARMUP):
                    call()
                stream.synchronize()
                ready.wait()
                for i in range(calls):
                    call()
                    if i % 64 == 63:
                        stream.synchronize()  # no launch queue is full while others wait for the host
                stream.synchronize()
                done.wait()
        except BaseException as error:
            failures.append(error)
            ready.abort()
            done.abort()

    pool = [threading.Thread(target=loop, args=(k,)) for k in range(threads)]
    for thread in pool:
        thread.start()
    try:
        ready.wait()
        start = time.perf_counter()
        done.wait()
        seconds = time.perf_counter() - start
    except threading.BrokenBarrierError:
        raise failures[0] from None
    for thread in pool:
        thread.join()
    return threads * calls / seconds


def thread_table(plan: Path, repeats: int, calls: int) -> dict[str, Any]:
    works: dict[str, Callable[[int], Callable[[], Any]]] = {}
    skipped: dict[str, str] = {}
    sets = [dit5_inputs(SHAPES[0]) for _ in range(8)]
    engines = {
        f"jetrt {mode}, max_contexts=8": jetrt.Engine(plan, graphs=graphs, max_contexts=8)
        for mode, graphs in (("eager", "off"), ("graph", "auto"))
    }
    for name, engine in engines.items():

        def work(k: int, engine: Any = engine) -> Callable[[], Any]:
            return keyword_call(engine, [sets[k]])

        works[name] = work
    try:
        import script_paths

        handle = script_paths.load(str(plan))
        contexts = [handle.create_execution_context() for _ in range(8)]

        def binding(k: int) -> Callable[[], Any]:
            context, inputs = contexts[k], sets[k]
            output = torch.empty(1, 41, 64, device="cuda", dtype=torch.bfloat16)
            stream = torch.cuda.current_stream().cuda_stream

            def call() -> None:
                for name, tensor in inputs.items():
                    context.set_input_shape(name, tensor.shape)
                    context.set_tensor_address(name, tensor.data_ptr())
                context.set_tensor_address("output", output.data_ptr())
                context.execute_async_v3(stream)

            return call

        works["binding, shapes + addresses + enqueue, a context a thread"] = binding
    except ImportError as error:
        skipped["binding"] = str(error)
    drain()
    samples: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, work in works.items():
            for threads in (1, 8):
                rate = calls_per_second(threads, calls, work)
                samples.setdefault(f"{name}; threads: {threads}", []).append(rate)
    return {
        "unit": "calls per second, all threads together, GPU done",
        "stream": "a side stream a thread",
        "rows": {
            name: {"min": min(s), "median": sorted(s)[len(s) // 2], "max": max(s), "samples": len(s)}
            for name, s in samples.items()
        },
        "skipped": skipped,
        "engine_stats": {name: plain(engine.stats) for name, engine in engines.items()},
    }


def judge(side: dict[str, Any], default: dict[str, Any]) -> list[dict[str, Any]]:
    targets = []
    for label, table in (("side stream", side), ("default stream", default)):
        us = {name: row["median"] / 1000 for name, row in table["rows"].items()}
        for case, floor in {
            "stable": "C, enqueueV3 only",
            "stable, last output still held": "C, enqueueV3 only",
            "2 addresses": "C, 6 changing addresses + enqueueV3",
            "1000 addresses": "C, 6 changing addresses + enqueueV3",
            "2 shapes": "C, 5 changing shapes + 6 addresses + enqueueV3",
        }.items():
            name = f"eager, {case}, {label}: within 3 us of «{floor}»"
            targets.append(target(name, us[f"jetrt eager, {case}"], us[floor] + 3.0, "us"))
        for case in ("stable", "stable, last output still held", "2 addresses", "2 shapes"):
            name = f"graph, {case}, {label}: within 1.1 x the bare launch + 2 us"
            limit = 1.1 * us["C, cuGraphLaunch"] + 2.0
            targets.append(target(name, us[f"jetrt graph, {case}"], limit, "us"))
        if "TensorRTDiTWrapper" in us:
            name = f"graph, stable, {label}: 12 x below the script's wrapper"
            targets.append(target(name, us["jetrt graph, stable"], us["TensorRTDiTWrapper"] / 12, "us"))
        name = f"graph, 1000 addresses, {label}: no slower than eager (5 % and 0.5 us of noise)"
        limit = us["jetrt eager, 1000 addresses"] * 1.05 + 0.5
        targets.append(target(name, us["jetrt graph, 1000 addresses"], limit, "us"))
    return targets


def show(title: str, table: dict[str, Any]) -> None:
    print(f"\n### {title} ({table['stream']})\n")
    if table["unit"].startswith("ns"):
        header, text = ["host µs per call", "min", "median", "p99"], lambda ns: f"{ns / 1000:.2f}"
    else:
        header, text = ["calls per second", "min", "median", "max"], lambda rate: f"{rate:,.0f}"
    rows = [[name, *(text(row[key]) for key in header[1:])] for name, row in table["rows"].items()]
    print(markdown(header, rows))
    for name, reason in table["skipped"].items():
        print(f"\nnot run: {name}: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", help="folder with dit5.engine and mlp.engine (default: $JETRT_TEST_ENGINES)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--block", type=int, default=50, help="calls per row and round")
    parser.add_argument("--out", default="host_cost")
    args = parser.parse_args()
    folder = engines_folder(args.engines)
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: these figures need one")
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": machine(), "rounds": args.rounds, "block": args.block}
    nvinfer_path()
    library = compile_floor()
    with torch.inference_mode():
        dit5 = folder / "dit5.engine"
        tables = {
            "side_stream": main_table(dit5, library, False, args.rounds, args.block),
            "default_stream": main_table(dit5, library, True, args.rounds, args.block),
            "frameworks": framework_table(folder / "mlp.engine", library, args.rounds, args.block),
            "threads": thread_table(dit5, 5, 2000),
        }
    result["tables"] = tables
    result["targets"] = judge(tables["side_stream"], tables["default_stream"])
    path = write(args.out, result)
    show("dit5: 5 inputs, 1 output, torch", tables["side_stream"])
    show("dit5: 5 inputs, 1 output, torch", tables["default_stream"])
    show("mlp: 1 input, 1 output", tables["frameworks"])
    show("dit5, several threads", tables["threads"])
    print_targets(result["targets"])
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
