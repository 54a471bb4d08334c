"""Writes what `collect` found for people."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ManifestError
from ..report import dims, table
from ._collect import Data

MIB = 1 << 20


def text(data: Data, *, layers: int = 20) -> str:
    """`layers`: how many of the slowest layers are listed; 0: all."""
    manifest, device = data["manifest"], data["device"]
    sections = [_heading(data)]
    if manifest is not None:
        sections += [_provenance(manifest), *_differences(data["differences"])]
    if device is not None:
        sections.append(f"Inputs and outputs\n{_tensors(device['inputs'], device['outputs'])}")
    if manifest is not None:
        if device is None:
            sections.append(_record("inputs and outputs", lambda: _stored_tensors(manifest)))
        sections += _stored(manifest, short=device is not None)
    if device is not None:
        sections += _on_device(device, layers)
    else:
        sections.append(f"Not looked at on a GPU: {data['device_problem']}")
    # Names come from files of others, and a terminal obeys what it is sent.
    whole = "\n\n".join(filter(None, sections))
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in whole)


def _bounds(entry: Data) -> list[Any]:
    return [entry[bound] for bound in ("min", "opt", "max")]


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / MIB:,.1f} MiB" if count >= MIB // 10 else f"{count} bytes"


def _heading(data: Data) -> str:
    file, plan = data["file"], data["plan"]
    rows = [
        [Path(file["path"]).name, f"plan of TensorRT {plan['tensorrt']}, {_size(file['bytes'])}"],
        ["sha256", f"{file['sha256']} (.sha256 beside it: {file['sidecar']})"],
    ]
    if plan.get("metadata"):
        rows.append(["metadata", ", ".join(f"{k}={v}" for k, v in plan["metadata"].items())])
    if data["manifest"] is None:
        rows.append(["manifest", data.get("manifest_problem", "none, so nothing says where it came from")])
    elif "manifest_problem" in data:
        rows.append(["manifest", f"NOT OF THIS PLAN: {data['manifest_problem']}"])
    return table(rows[0], rows[1:])


def _provenance(manifest: Data) -> str:
    machine, build, model = manifest["machine"], manifest["build"], manifest["model"]
    made = f"{manifest['created']} by jetrt {manifest['jetrt']}"
    if manifest["origin"] == "stamp":
        made += ", stamped: it was built by something else"
    if build is not None:
        level = "" if build["level"] is None else f", optimisation level {build['level']}"
        made += f", in {build['seconds']:.0f} s{level}, peak host memory {_size(build['peak_host_bytes'])}"
    rows = [["made", made]]
    if model is not None:
        more = [f"opset {model['opset']}" if model["opset"] is not None else "", model["producer"] or ""]
        rows.append(["from", ", ".join([model["file"], *filter(None, more), f"sha256 {model['sha256']}"])])
    if manifest["command"]:
        rows.append(["command", shlex.join(manifest["command"])])
    known = {
        "sm": "SM {}",
        "sm_count": "{} multiprocessors",
        "tensorrt": "TensorRT {}",
        "cuda": "CUDA {}",
        "driver": "driver {}",
        "l4t": "L4T {}",
        "jetpack": "JetPack {}",
        "power_mode": "power mode {}",
    }
    words = [form.format(machine[key]) for key, form in known.items() if machine[key] is not None]
    rows.append(["for", ", ".join([machine["gpu"], machine["arch"], *words])])
    rows.append(["runs on", _portability(manifest)])
    options = {k: v for k, v in (manifest["options"] or {}).items() if v not in (None, False, [], {}, "")}
    if options:
        words = [k if v is True else f"{k}={v}" for k, v in options.items()]
        rows.append(["options", " ".join(", ".join(words).split())])
    return f"Provenance\n{table(rows[0], rows[1:])}"


def _differences(differences: Sequence[Data]) -> Iterator[str]:
    if differences:
        found = [[d["field"], str(d["manifest"]), str(d["here"]), "refused" * d["refused"]] for d in differences]
        yield table(["differs here", "in the manifest", "here", ""], found)


def _portability(manifest: Data) -> str:
    where = {
        "none": "this GPU model alone",
        "same_compute_capability": "every GPU of this SM",
        "ampere_plus": "Ampere and newer GPUs",
    }[manifest["hardware_compatibility"]]
    version = "this and newer TensorRT" if manifest["version_compatible"] else "this TensorRT"
    notes = [where, version]
    if manifest["driver_floor"]:
        notes.append(f"driver {manifest['driver_floor']} or newer")
    if manifest["stripped"]:
        notes.append("WITHOUT WEIGHTS: only after a refit from its ONNX")
    elif manifest["refittable"]:
        notes.append("refittable")
    return ", ".join(notes)


def _tensors(inputs: Sequence[Data], outputs: Sequence[Data]) -> str:
    rows = []
    for mode, tensors in (("input", inputs), ("output", outputs)):
        for t in tensors:
            ranges = "; ".join(" / ".join(map(dims, bounds)) for bounds in t.get("profiles", ()))
            rows.append([mode, t["name"], t["dtype"], dims(t["shape"]), t["location"], t["format"], ranges])
    return table(["", "name", "dtype", "shape", "memory", "format", "min / opt / max"], rows)


def _stored_tensors(manifest: Data) -> str:
    ranges = [profile.get("shapes", {}) for profile in manifest["profiles"]]
    inputs = [
        {**tensor, "profiles": [_bounds(r[tensor["name"]]) for r in ranges if tensor["name"] in r]}
        for tensor in manifest["inputs"]
    ]
    return f"Inputs and outputs\n{_tensors(inputs, manifest['outputs'])}"


def _values(manifest: Data) -> str:
    """Values that shape tensors may have."""
    rows = [
        [str(number), name, *map(dims, _bounds(bounds))]
        for number, profile in enumerate(manifest["profiles"])
        for name, bounds in (profile.get("values") or {}).items()
    ]
    return table(["profile", "values of", "min", "opt", "max"], rows) if rows else ""


def _stored(manifest: Data, *, short: bool) -> Iterator[str]:
    """What the build found out. `short`: the layers themselves are shown from the GPU."""
    from ..builder.levels import LevelTable
    from ..builder.parity import ParityReport

    yield _record("profiles", lambda: _values(manifest))
    findings = (manifest["build"] or {}).get("findings") or []
    if findings:
        yield "\n".join(["Findings of the build", *(f"- {_finding(f)}" for f in findings)])
    if manifest["calibration"]:
        yield f"Calibration\n{_pairs(manifest['calibration'])}"
    if manifest["levels"]:
        levels = _record("levels", lambda: LevelTable.from_mapping(manifest["levels"]).table())
        yield f"Optimisation levels\n{levels}"
    if manifest["audit"] and not short:
        audit = manifest["audit"]
        yield _record("audit", lambda: _audit(audit, audit["layers"], "when it was built"))
    yield _record("parity", lambda: ParityReport.from_mapping(manifest["parity"]).table())


def _finding(found: Any) -> str:
    """A line of TensorRT's log that is known with its cause, a sentence of the audit, or whatever else stands there."""
    if not isinstance(found, dict):
        return _pairs(found)
    if "text" in found:
        return " ".join(str(found["text"]).split())
    if not {"kind", "cause", "next_step", "line"} <= found.keys():
        return _pairs(found)
    times = f", {found['count']} times" if found.get("count", 1) != 1 else ""
    source = f" ({found['source']})" if found.get("source") else ""
    line = f"{found['kind']}: {found['cause']} {found['next_step']}{source} TensorRT said{times}: {found['line']}"
    return " ".join(line.split())


def _pairs(found: Any) -> str:
    line = ", ".join(f"{k}: {v}" for k, v in found.items()) if isinstance(found, dict) else str(found)
    return " ".join(line.split())


def _record(name: str, write: Callable[[], str]) -> str:
    """A part of the manifest that its schema leaves open, and that may therefore hold anything."""
    try:
        return write()
    except (ManifestError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return f"The manifest's record of {name} cannot be shown ({type(error).__name__}: {error})"


def _audit(found: Data, layers: Sequence[Data], when: str, most: int = 8) -> str:
    """The verdict on precision, in the audit's own words, and the layers that fell back."""
    lines = [f"Precision, {when}", *map(str, found.get("findings") or ())]
    if found["requested"] is None:
        shares = ", ".join(f"{100 * part:.3g} % {name}" for name, part in found["shares"].items())
        lines.append(f"GEMM and convolution time: {shares or 'none'}; what was asked for is not known")
    names = found.get("fallbacks") or []
    of = {layer["name"]: layer for layer in layers}
    for name in names[:most]:
        layer = of.get(name, {})
        time = "" if layer.get("ms") is None else f", {layer['ms']:.4f} ms"
        lines.append(f"  {layer.get('precision', 'not in ' + found['requested'])}{time}: {short(name)}")
    if len(names) > most:
        lines.append(f"  … and {len(names) - most} more that are not in {found['requested']}")
    return "\n".join(lines)


def _on_device(device: Data, limit: int) -> Iterator[str]:
    memory, timing = device["memory"], device["timing"]
    at = ", ".join(f"{name} {dims(shape)}" for name, shape in device["shapes"].items())
    rows = [
        ["loaded by", f"TensorRT {device['tensorrt']} on GPU {device['gpu']}"],
        ["memory of a context", _size(memory["context_bytes"])],
        ["host memory while loading", _size(memory["load_peak_host_bytes"])],
        ["looked at", f"profile {device['profile']} of {device['profiles']}, {at or 'no inputs'}"],
    ]
    if timing is not None:
        ordered = sorted(timing["run_ms"])
        whole = f"{ordered[len(ordered) // 2]:.4f} ms (median of {timing['runs']} runs, layer by layer)"
        rows.append(["all layers", whole])
    else:
        rows.append(["no layer times", device["timing_problem"]])
    yield f"On this machine\n{table(rows[0], rows[1:])}"
    if device["warnings"]:
        yield "\n".join(["Warnings while loading", *(f"- {line}" for line in device["warnings"])])
    yield _layers(device["layers"], limit)
    yield _audit(device["audit"], device["layers"], "now")


def _layers(layers: Sequence[Data], limit: int) -> str:
    ordered = sorted(layers, key=lambda layer: -(layer["ms"] or 0))
    total = sum(layer["ms"] or 0 for layer in layers)
    rows = []
    for layer in ordered[: limit or None]:
        ms = layer["ms"]
        rows.append(
            [
                "" if ms is None else f"{ms:.4f}",
                "" if ms is None or not total else f"{100 * ms / total:.1f} %",
                layer["precision"] if layer["possible"] or layer["matrix"] else "-",
                layer["edges"],
                layer["type"] or "?",
                short(layer["name"]),
            ]
        )
    rest = f"\n… and {len(layers) - len(rows)} more layers" if len(layers) > len(rows) else ""
    return table(["ms", "share", "precision", "in -> out", "type", f"layer ({len(layers)})"], rows) + rest


def short(name: str, width: int = 70) -> str:
    name = " ".join(name.split())
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[-(width // 2) :]}"
