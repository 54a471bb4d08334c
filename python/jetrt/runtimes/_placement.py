"""On which of onnxruntime's providers the nodes of a session run."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineDeserializeError
from ._host_model import TYPES, HostTensorInfo
from ._trt_provider import PROVIDER


@dataclass(frozen=True)
class Placement:
    nodes: Mapping[str, int]
    #: Name and operator of those that TensorRT did not take.
    elsewhere: tuple[str, ...]
    #: "onnxruntime's record", "a profiled call", or why it is not known.
    source: str

    def __str__(self) -> str:
        counted = ", ".join(f"{provider} {count}" for provider, count in sorted(self.nodes.items()))
        return f"nodes by provider: {counted or 'unknown'} ({self.source})"


def count_nodes(session: Any, inputs: Mapping[str, HostTensorInfo], usual: Mapping[str, Sequence[int]]) -> Placement:
    """Nodes for each provider; `usual` are shapes that the model takes, for inputs with dynamic dimensions.

    From 1.24 a session keeps a record of the original nodes. Before that its profile is read, in which a fused subgraph
    is one node. The optimised graph is no way: onnxruntime does not save one that holds compiled nodes.
    """
    if hasattr(session, "get_provider_graph_assignment_info"):
        nodes: Counter[str] = Counter()
        elsewhere = []
        for subgraph in session.get_provider_graph_assignment_info():
            for node in subgraph.get_nodes():
                nodes[subgraph.ep_name] += 1
                if subgraph.ep_name != PROVIDER:
                    elsewhere.append(f"{node.name or '(no name)'} ({node.op_type}) on {subgraph.ep_name}")
        return Placement(nodes, tuple(elsewhere), "onnxruntime's record")
    return _profiled(session, inputs, usual)


def _profiled(session: Any, inputs: Mapping[str, HostTensorInfo], usual: Mapping[str, Sequence[int]]) -> Placement:
    """One call on zeros of the profiles' usual shapes, with onnxruntime's profile."""
    feed = {
        name: np.zeros(
            tuple(usual.get(name, [1 if size < 0 else size for size in info.shape])), TYPES[info.dtype].storage
        )
        for name, info in inputs.items()
        if TYPES[info.dtype].native
    }
    failure = None
    if len(feed) < len(inputs):
        failure = "numpy has no bfloat16 for the profiled call"
    else:
        try:
            session.run(None, feed)
        except Exception as error:  # a model may take no zeros; onnxruntime's classes have no common base
            failure = f"the profiled call failed: {error}"
    profile = Path(session.end_profiling())
    try:
        events = json.loads(profile.read_text())
    except (OSError, ValueError) as error:
        failure, events = failure or f"the profile cannot be read: {error}", []
    finally:
        shutil.rmtree(profile.parent, ignore_errors=True)
    if failure is not None:
        return Placement({}, (), failure)
    nodes: Counter[str] = Counter()
    elsewhere = []
    for event in events:
        if event.get("cat") != "Node" or not str(event.get("name", "")).endswith("_kernel_time"):
            continue
        provider = str(event["args"].get("provider"))
        nodes[provider] += 1
        if provider != PROVIDER:
            elsewhere.append(
                f"{event['name'].removesuffix('_kernel_time')} ({event['args'].get('op_name')}) on {provider}"
            )
    return Placement(nodes, tuple(elsewhere), "a profiled call")


def refuse_partition(path: Path, placement: Placement) -> None:
    if not placement.nodes:
        raise EngineDeserializeError(
            f"{path}: where the nodes run is not known ({placement.source}), so it cannot be said that TensorRT "
            "runs them all. Give profiles= with shapes that the model takes, or pass allow_partition=True.",
            path=str(path),
        )
    if set(placement.nodes) != {PROVIDER}:
        shown = "; ".join(placement.elsewhere[:8]) + ("; …" if len(placement.elsewhere) > 8 else "")
        raise EngineDeserializeError(
            f"{path}: {len(placement.elsewhere)} of {sum(placement.nodes.values())} nodes do not run on TensorRT: "
            f"{shown}. Pass allow_partition=True to run them elsewhere, which costs copies, or change the model.",
            path=str(path),
            log=list(placement.elsewhere),
        )
