"""An onnxruntime with a TensorRT provider, for machines without one: the installed onnxruntime computes on the CPU, and
where its nodes would be is made up by rules that a test sets. It answers in the classes and ways that were seen in
onnxruntime-gpu 1.31 where TensorRT was absent, and as its documentation says otherwise."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import onnx
import onnxruntime as real

TRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"


class Fail(Exception):
    pass


class Rules:
    """What the stand-in does."""

    def __init__(self) -> None:
        self.version = "1.24.0"
        #: Providers that the package was built with.
        self.providers = [TRT, CUDA, CPU]
        #: Whether the provider's library can be loaded when a session is made.
        self.loads = True
        #: Operators that TensorRT does not take.
        self.refused: set[str] = set()
        #: Where those are then; ``None``: on CUDA where the session has it, else on the CPU.
        self.elsewhere: str | None = None
        #: Whether sessions keep a record of the assignment (from 1.24 on).
        self.record = True
        #: Whether a call of a session fails.
        self.run_fails = False
        #: Arguments of every session that was asked for.
        self.sessions: list[types.SimpleNamespace] = []


class SessionOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.log_severity_level = 2
        self.enable_profiling = False
        self.profile_file_prefix = "onnxruntime_profile_"

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class _Node:
    def __init__(self, node) -> None:
        self.name, self.op_type, self.domain = node.name, node.op_type, node.domain


class _Subgraph:
    def __init__(self, ep_name: str, nodes) -> None:
        self.ep_name, self._nodes = ep_name, nodes

    def get_nodes(self):
        return self._nodes


def make(rules: Rules, folder: Path) -> types.ModuleType:
    """The module, to be put into `sys.modules`; its package folder has the provider's library."""
    library = folder / "onnxruntime" / "capi" / "libonnxruntime_providers_tensorrt.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"\x7fELF\0libnvinfer.so.10\0libnvonnxparser.so.10\0libm.so.6\0")

    class InferenceSession:
        def __init__(self, path, options, providers, enable_fallback=1) -> None:
            names = [p if isinstance(p, str) else p[0] for p in providers]
            given = dict(p for p in providers if not isinstance(p, str))
            rules.sessions.append(
                types.SimpleNamespace(
                    path=path, names=names, given=given, entries=dict(options.entries), enable_fallback=enable_fallback
                )
            )
            nodes = list(onnx.load(path, load_external_data=False).graph.node)
            if not rules.loads:
                names = [name for name in names if name != TRT] or [CPU]
            elsewhere = rules.elsewhere or (CUDA if CUDA in names else CPU)
            self._where = [
                (elsewhere if node.op_type in rules.refused or TRT not in names else TRT, _Node(node)) for node in nodes
            ]
            if rules.loads and options.entries.get("session.disable_cpu_ep_fallback") == "1":
                if CPU in names:
                    raise Fail("Conflicting session configuration: explicitly added the CPU EP to the session")
                if any(where == CPU for where, _ in self._where):
                    raise Fail(
                        "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the "
                        "default CPU EP, but fallback to CPU EP has been explicitly disabled by the user."
                    )
            self._names, self._options = names, options
            self._recorded = options.entries.get("session.record_ep_graph_assignment_info") == "1"
            self._session = real.InferenceSession(path, providers=[CPU])

        def get_providers(self):
            return [*self._names, *([] if CPU in self._names else [CPU])]

        def get_inputs(self):
            return self._session.get_inputs()

        def get_outputs(self):
            return self._session.get_outputs()

        def io_binding(self):
            return self._session.io_binding()

        def run_with_iobinding(self, binding):
            if rules.run_fails:
                raise Fail("CUDA error 700")
            self._session.run_with_iobinding(binding)

        def run(self, names, feed):
            if rules.run_fails:
                raise Fail("zeros are refused")
            return self._session.run(names, feed)

        def end_profiling(self):
            events = [{"cat": "Session", "name": "model_run", "args": {}}]
            fused = sum(where == TRT for where, _ in self._where)
            if fused:  # a fused subgraph is one node
                name = "TensorrtExecutionProvider_TRTKernel_graph_test_1_0"
                events.append(
                    {"cat": "Node", "name": f"{name}_kernel_time", "args": {"provider": TRT, "op_name": name}}
                )
            for where, node in self._where:
                if where != TRT:
                    args = {"provider": where, "op_name": node.op_type}
                    events.append({"cat": "Node", "name": f"{node.op_type}_0_fence_before", "args": {}})
                    events.append({"cat": "Node", "name": f"{node.op_type}_0_kernel_time", "args": args})
            path = Path(self._options.profile_file_prefix + "_1.json")
            path.write_text(json.dumps(events))
            return str(path)

    if rules.record:

        def get_provider_graph_assignment_info(self):
            if not self._recorded:
                raise Fail("session.record_ep_graph_assignment_info is not set")
            fused = [node for where, node in self._where if where == TRT]
            rest = [_Subgraph(where, [node]) for where, node in self._where if where != TRT]
            return [_Subgraph(TRT, fused), *rest] if fused else rest

        InferenceSession.get_provider_graph_assignment_info = get_provider_graph_assignment_info

    module = types.ModuleType("onnxruntime")
    module.__file__ = str(folder / "onnxruntime" / "__init__.py")
    module.__version__ = rules.version
    module.get_available_providers = lambda: list(rules.providers)
    module.SessionOptions = SessionOptions
    module.InferenceSession = InferenceSession
    module.OrtValue = real.OrtValue
    assert re.match(r"\d+\.\d+", rules.version)
    return module
