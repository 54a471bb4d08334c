"""What needs a process of its own: interpreter exit, environment variables, read-only homes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.gpu

START = """
import sys
import numpy as np
import jetrt
plan = sys.argv[1]
x = np.ones((8, 64), np.float32)
"""

EXITS = {
    "engine alive": "engine = jetrt.Engine(plan); engine(x=x)",
    "output alive": "y = jetrt.Engine(plan)(x=x)",
    "torch imported first": """
        import torch
        t = torch.ones(8, 64, device="cuda")
        engine = jetrt.Engine(plan)
        y = [engine(x=t) for _ in range(8)]
    """,
    "torch imported later": """
        engine = jetrt.Engine(plan)
        engine(x=x)
        import torch
        t = torch.ones(8, 64, device="cuda")
        y = [engine(x=t) for _ in range(8)]
    """,
    "engine dies before its output": """
        import torch
        engine = jetrt.Engine(plan)
        y = engine(x=torch.ones(8, 64, device="cuda"))["y"]
        del engine
    """,
    "closed by hand": "engine = jetrt.Engine(plan); y = engine(x=x); engine.close()",
    "in a cycle": """
        class Holder: pass
        holder = Holder()
        holder.self = holder
        holder.engine = jetrt.Engine(plan)
        holder.y = holder.engine(x=x)
        del holder
    """,
    "work still running": """
        import torch
        engine = jetrt.Engine(plan, graphs="off")
        t = torch.ones(8, 64, device="cuda")
        torch.cuda._sleep(500_000_000)
        y = [engine(x=t) for _ in range(50)]
    """,
    "graph captured, outputs held": """
        import torch
        engine = jetrt.Engine(plan, graphs="require")
        t = torch.ones(8, 64, device="cuda")
        y = [engine(x=t) for _ in range(20)]
    """,
    "daemon thread calling": """
        import threading, time
        engine = jetrt.Engine(plan)
        def loop():
            try:
                while True:
                    engine(x=x)
            except jetrt.errors.ClosedEngineError:
                pass  # jetrt closes the engines that are left at exit
        threading.Thread(target=loop, daemon=True).start()
        time.sleep(0.2)
    """,
    "atexit callback calls": """
        import atexit
        engine = jetrt.Engine(plan)
        atexit.register(lambda: engine(x=x))
    """,
    "sys.exit inside with": """
        with jetrt.Engine(plan) as engine:
            engine(x=x)
            sys.exit(0)
    """,
    "two engines, shared memory": """
        size = max(jetrt.Engine(plan).device_memory_size, 1)
        memory = jetrt.DeviceMemory(size)
        a, b = (jetrt.Engine(plan, device_memory=memory) for _ in range(2))
        a(x=x); b(x=x)
        del memory
    """,
}


def run(engines, code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", START + textwrap.dedent(code), str(engines / "mlp.engine")],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONWARNINGS": "ignore"} | environment,
    )


@pytest.mark.parametrize("order", EXITS)
def test_interpreter_exit(engines, order) -> None:
    done = run(engines, EXITS[order])
    assert (done.returncode, done.stderr) == (0, "")


EQUALITY = """
import hashlib
engine = jetrt.Engine(plan, host=sys.argv[2] if len(sys.argv) > 2 else "auto")
digest = hashlib.sha256()
pinned = jetrt.pinned_empty((8, 64), "float32")
for seed in range(20):
    n = 1 + seed % 8
    x = np.random.default_rng(seed).standard_normal((n, 64)).astype(np.float32)
    digest.update(engine(x=x)["y"].tobytes())
    pinned[:n] = x
    digest.update(engine(x=pinned[:n])["y"].tobytes())
held = [engine(x=np.full((8, 64), k, np.float32))["y"] for k in range(6)]
for y in held:
    digest.update(y.tobytes())
import torch
for k in range(6):
    digest.update(engine(x=torch.full((8, 64), float(k), device="cuda"))["y"].cpu().numpy().tobytes())
print(digest.hexdigest())
"""


def test_integrated_path_gives_the_same_bits(engines) -> None:
    """The path of an integrated GPU, forced on this discrete one."""
    plain, forced = run(engines, EQUALITY), run(engines, EQUALITY, JETRT_FORCE_INTEGRATED="1")
    for done in (plain, forced):
        assert done.returncode == 0, done.stderr
    assert plain.stdout == forced.stdout != ""


def test_nothing_is_written_beside_the_plan_or_at_home(engines, tmp_path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    before = {p.name for p in engines.iterdir()}
    done = run(engines, "jetrt.Engine(plan)(x=x)", HOME=str(home), XDG_CACHE_HOME=str(home / "cache"))
    assert done.returncode == 0, done.stderr
    assert {p.name for p in engines.iterdir()} == before
    # .nv is where CUDA's driver keeps what it compiled from PTX.
    assert {p.name for p in home.iterdir()} <= {".nv"}
