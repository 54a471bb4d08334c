"""Ways in which an interpreter may end while the drop-ins are in use: {way: program}, for each drop-in.

The stand-in torch must survive them (tests/drop_in), and so must the real one (tests/gpu). Each program takes a plan:
"dit5" where it is about `jetrt.groot`, else "mlp".
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent


def run(program: str, plan: Path, **environment: str) -> None:
    """Runs one in a process of its own, which must get to its last line and end in silence."""
    # No tables of inputs; the stand-ins tell on standard error what was done wrong.
    settings = {"LOCAL_RANK": "1", "FAKE_CUDA_TRACE": "1", "FAKE_TRT_TRACE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", program, str(plan)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout[-5:], done.stderr) == (0, "done\n", "")


def programs(start: str, ends: Mapping[str, str]) -> dict[str, str]:
    """{way: program}: the same beginning, then one of these ends."""
    return {way: f"{dedent(start)}{dedent(end)}\nprint('done', flush=True)\n" for way, end in ends.items()}


TRT_TORCH = programs(
    """
    import atexit, sys, threading, time
    import torch
    from jetrt.trt_torch import GraphSafeEngine

    engine = GraphSafeEngine(sys.argv[1])
    engine.set_runtime_tensor_shape("x", (2, 64))
    x = torch.randn(2, 64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    y = engine(x)["y"]
    with torch.cuda.graph(graph):
        z = engine(x)["y"] * 2
    graph.replay()
    """,
    {
        "nothing closed": "",
        "closed": "engine.close()",
        "kept by a module": "sys.keep = engine",
        "a result outlives it": "del engine",
        "in a cycle": "engine.me = engine; del engine",
        "a graph outlives it": "sys.keep = graph",
        "a thread holds it": "threading.Thread(target=lambda e: time.sleep(0.1), args=(engine,)).start()",
        "closed at exit": "atexit.register(engine.close)",
        "work under way": "torch.cuda._sleep(10**9); engine(x)",
    },
)

GRAPH = programs(
    """
    import atexit, sys, threading, time
    import torch
    import jetrt
    from jetrt.graph import graph

    engine = jetrt.Engine(sys.argv[1], graphs="off")
    x = torch.ones(8, 64, device="cuda")
    def fn(x):
        return engine(x=x)["y"] + torch.randn(8, 10, device="cuda")
    captured = graph(fn, (x,))
    result = captured(x)
    """,
    {
        "all alive": "",
        "the engine first": "del engine, fn",
        "the engine closed": "engine.close()",
        "the graph closed": "captured.close()",
        "only the result": "del captured, engine, fn",
        "in a cycle": "holder = [captured, engine]; holder.append(holder); del captured, engine, holder",
        "an atexit callback calls": "atexit.register(lambda: captured(x))",
        "work under way": "torch.cuda._sleep(10**9); results = [captured(x) for _ in range(50)]",
        "after a capture that failed": "graph(lambda x: x * x.sum().item(), (x,))(x); torch.randn(1, device='cuda')",
        "a daemon thread calls": """
            def loop():
                try:
                    while True:
                        captured(x)
                except jetrt.errors.ClosedEngineError:
                    pass
            threading.Thread(target=loop, daemon=True).start()
            time.sleep(0.1)
        """,
        "closed in a finaliser": """
            class Holder:
                def __del__(self):
                    captured.close()
            holder = Holder()
        """,
    },
)

_CAPTURED = """
    w = TensorRTDiTWrapper(plan)
    w(*given)
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        y = w(*given)
    g.replay()
"""

GROOT = programs(
    """
    import os, sys, threading, time
    from types import ModuleType, SimpleNamespace
    import torch
    import jetrt
    from jetrt.groot import TensorRTDiTWrapper, install, preload, replace_dit_with_tensorrt
    from jetrt.groot.engine import Engine

    plan, bf16 = sys.argv[1], torch.bfloat16
    given = [torch.ones(1, n, 64, device="cuda", dtype=bf16) for n in (41, 122)]
    given += [torch.ones(1, device="cuda", dtype=torch.int64)]
    given += [torch.ones(1, 122, device="cuda", dtype=torch.bool) for _ in range(2)]
    """,
    {
        "wrapper and result alive": "w = TensorRTDiTWrapper(plan); y = w(*given)",
        "result outlives its wrapper": "y = TensorRTDiTWrapper(plan)(*given)",
        "ring": "w = TensorRTDiTWrapper(plan, ring=2); y = [w(*given) for _ in range(9)]",
        "side stream": """
            w = TensorRTDiTWrapper(plan)
            s = torch.cuda.Stream()
            with torch.cuda.stream(s):
                y = w(*given)
        """,
        "captured by torch": _CAPTURED,
        "captured by torch, wrapper gone": _CAPTURED + "    torch.cuda.synchronize(); del w",
        "graphs of its own": """
            os.environ["JETRT_GRAPHS"] = "auto"
            w = TensorRTDiTWrapper(plan)
            y = [w(*given) for _ in range(9)]
        """,
        "in a cycle": "a = [TensorRTDiTWrapper(plan)]; a.append(a); a[0](*given); del a",
        "policy": """
            head = SimpleNamespace(model=torch.nn.Linear(64, 64, device="cuda", dtype=bf16))
            replace_dit_with_tensorrt(SimpleNamespace(model=SimpleNamespace(action_head=head)), plan)
            y = head.model(*given[:3], None, False, *given[3:])
        """,
        "installed": "install(ModuleType('script'))",
        "preloaded, never asked for": "preload(plan)",
        "work under way": """
            w = TensorRTDiTWrapper(plan)
            torch.cuda._sleep(10**9)
            y = [w(*given) for _ in range(50)]
        """,
        "closed twice": "w = TensorRTDiTWrapper(plan); y = w(*given); w.close(); w.close()",
        "engine of seam B": """
            e = Engine(plan)
            for (name, *_), x in zip(e.in_meta, given):
                e.set_runtime_tensor_shape(name, x.shape)
            y = e(*given)
        """,
        "a daemon thread calls": """
            w = TensorRTDiTWrapper(plan)
            def loop():
                try:
                    while True:
                        w(*given)
                except jetrt.errors.ClosedEngineError:
                    pass
            threading.Thread(target=loop, daemon=True).start()
            time.sleep(0.1)
        """,
    },
)

#: After `act()` has called a `policy` whose head has a `handle` of `optimize`, over a plan of its own.
LOOP = {
    "all alive": "",
    "undone": "handle.undo()",
    "the policy first": "del policy",
    "only the actions": "del handle, policy, act",
    "an engine closed": "close()",
    "in a cycle": "holder = [handle, policy]; holder.append(holder); del handle, policy, act, holder",
    "work under way": "torch.cuda._sleep(10**9); more = [act() for _ in range(20)]",
    "called at exit": "import atexit; atexit.register(act)",
}
