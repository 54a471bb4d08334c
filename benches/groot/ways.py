"""The ways to run an action head, by the names that tables and pictures have."""

from __future__ import annotations

SCRIPT = "script: Engine, with its waits and zero fills"
BARE = "bare binding, asynchronous"
BARE_GRAPH = "bare binding, one graph"
BARE_GRAPH_COPIED = "bare binding, one graph, inputs copied in"
BARE_GRAPH_HOISTED = "bare binding, one graph, constants made beforehand"
JETRT = "jetrt: Engine in the unchanged script"
JETRT_LOOP = "jetrt: groot.optimize, one graph"
JETRT_GRAPH = "jetrt: graph() around the unchanged head"
SCRIPT_DIT = "script: TensorRTDiTWrapper, the rest in torch"
JETRT_DIT = "jetrt: TensorRTDiTWrapper, the rest in torch"
JETRT_DIT_LOOP = "jetrt: TensorRTDiTWrapper, groot.optimize, one graph"
TORCH = "torch eager"
COMPILED = "torch.compile of the DiT"

#: Variants of one group must give the same bits from the same seed.
GROUPS = {
    "engines": (SCRIPT, BARE, BARE_GRAPH, BARE_GRAPH_COPIED, BARE_GRAPH_HOISTED, JETRT, JETRT_LOOP, JETRT_GRAPH),
    "DiT only": (SCRIPT_DIT, JETRT_DIT, JETRT_DIT_LOOP),
    "torch": (TORCH,),
    "compiled": (COMPILED,),
}
NAMES = tuple(name for group in GROUPS.values() for name in group)

#: What a robot's loop is looked at with, and whose stages are shown.
CONTROL = (SCRIPT, BARE_GRAPH, JETRT, JETRT_LOOP)
STAGED = (SCRIPT, BARE, BARE_GRAPH, JETRT, JETRT_LOOP, SCRIPT_DIT, JETRT_DIT, TORCH)
