"""What torch can run, brought into one form: a callable, the names that it takes, and what is known of its tensors."""

from __future__ import annotations

import inspect
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from ..errors import EngineDeserializeError
from ._host_model import HostTensorInfo

Kind = Literal["module", "TorchScript", "torch.export program"]


@dataclass(frozen=True)
class TorchSource:
    """A torch model that can be called with named inputs."""

    kind: Kind
    name: str
    #: ``None`` for an object that came from no file.
    path: Path | None
    #: The module, script module or `ExportedProgram` itself.
    model: Any
    call: Callable[[Mapping[str, Any]], Any]
    #: Inputs in order; those that must be given, and whether others are taken too.
    names: tuple[str, ...]
    required: frozenset[str]
    open_ended: bool = False
    #: Known before the first call only of a torch.export program, which holds its callers to them.
    inputs: Mapping[str, HostTensorInfo] = field(default_factory=dict)
    #: Of such a program: its flat inputs (a name, or a constant that it was exported with) and how they are nested.
    structure: Any = None
    #: What torch warned of while it read the file.
    warnings: tuple[str, ...] = ()


def open_source(source: Any, device: Any, runtime: str) -> TorchSource:
    """Opens a file for the device, or takes an object as it is. Raises `EngineDeserializeError`."""
    import torch

    if isinstance(source, (str, os.PathLike)):
        return _from_file(Path(source), device, runtime)
    if isinstance(source, torch.export.ExportedProgram):
        _on_device([*source.state_dict.values()], device, "the program", runtime)
        return program_source(source, None, source.__class__.__name__, device)
    if isinstance(source, torch.nn.Module):  # a script module is one
        name = type(source).__name__
        if source.training:
            _refuse(
                name,
                f"the module is in training mode, in which dropout and batch normalisation compute something else; "
                f"{runtime} changes no module of yours. Call module.eval() first",
            )
        _on_device([*source.parameters(), *source.buffers()], device, name, runtime)
        return _script(source, None, name) if isinstance(source, torch.jit.ScriptModule) else _module(source, name)
    return _refuse(
        type(source).__name__,
        f"{runtime} takes a torch.nn.Module, a TorchScript file or a torch.export program, not a "
        f"{type(source).__name__}",
    )


def _refuse(what: str, why: str, cause: Exception | None = None) -> NoReturn:
    raise EngineDeserializeError(
        f"{what}: {why}.", path=what, log=str(cause).splitlines() if cause else None
    ) from cause


def _on_device(tensors: Sequence[Any], device: Any, what: str, runtime: str) -> None:
    elsewhere = {str(t.device) for t in tensors if hasattr(t, "device") and not _same(t.device, device)}
    if elsewhere:
        _refuse(
            what,
            f"its weights lie on {', '.join(sorted(elsewhere))} and {runtime} was asked for device {str(device)!r}; it "
            f"moves no module of yours. Call module.to({str(device)!r}) first, or pass device=",
        )


def _same(found: Any, wanted: Any) -> bool:
    return bool(found.type == wanted.type and (wanted.index is None or found.index in (None, wanted.index)))


# --------------------------------------------------------------------------------------------------------- files


def _from_file(path: Path, device: Any, runtime: str) -> TorchSource:
    import torch

    kind = _kind(path, runtime)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if kind == "TorchScript":
                opened = _script(torch.jit.load(str(path), map_location=device).eval(), path, path.stem)
            else:
                opened = program_source(torch.export.load(str(path)), path, path.stem, device)
        return replace(opened, warnings=tuple(str(warning.message) for warning in said))
    except EngineDeserializeError:
        raise
    except Exception as error:  # whatever torch meets in a damaged or foreign file
        _refuse(str(path), f"torch {torch.__version__} refused it as a {kind}: {str(error).strip().rstrip('.')}", error)


def _kind(path: Path, runtime: str) -> Literal["TorchScript", "torch.export program"]:
    """By what is in the archive; the suffixes .pt and .pth say nothing."""
    wanted = f"{runtime} takes TorchScript (torch.jit.save) and torch.export programs (torch.export.save)"
    with path.open("rb") as file:  # a missing file is a FileNotFoundError, as it is for `jetrt.Engine`
        head = file.read(4)
    if head == b"ftrt":
        _refuse(str(path), f'it is a TensorRT plan; {wanted}. Load it with runtime="tensorrt"')
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.split("/", 1)[-1] for entry in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError):
        _refuse(str(path), f"it is no torch archive; {wanted}")
    if any(entry.startswith("data/aotinductor/") for entry in entries):
        _refuse(str(path), f"it is a package of AOTInductor; {wanted}")
    if "models/model.json" in entries or "serialized_exported_program.json" in entries:
        return "torch.export program"
    if any(entry.startswith("code/") for entry in entries) and "constants.pkl" in entries:
        return "TorchScript"
    if "data.pkl" in entries:
        _refuse(
            str(path),
            f"it is a pickle of torch.save (weights, or a module that only its own Python code can make); {wanted}. "
            "Make the module in Python, load the weights into it, and pass the module itself",
        )
    _refuse(str(path), f"it is an archive of another kind; {wanted}")


# --------------------------------------------------------------------------------------------------------- kinds


def _module(module: Any, name: str) -> TorchSource:
    kinds = inspect.Parameter
    names, required, open_ended = [], set(), False
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL):
            open_ended |= parameter.kind == kinds.VAR_KEYWORD
            continue
        if parameter.kind == kinds.POSITIONAL_ONLY:
            _refuse(name, f"forward takes {parameter.name!r} by position alone; inputs are given by name. Name it")
        names.append(parameter.name)
        if parameter.default is kinds.empty:
            required.add(parameter.name)
    return TorchSource(
        "module", name, None, module, lambda named: module(**named), tuple(names), frozenset(required), open_ended
    )


#: Operators that compute something else in training, and which of their arguments says so.
_TRAINING = {"aten::dropout": 2, "aten::feature_dropout": 2, "aten::batch_norm": 5}


def _script(module: Any, path: Path | None, name: str) -> TorchSource:
    for node in module.inlined_graph.nodes():
        place = _TRAINING.get(node.kind())
        # A constant: a trace made in training mode, which eval() does not change.
        if place is not None and list(node.inputs())[place].toIValue() is True:
            _refuse(
                str(path or name),
                f"it was traced in training mode ({node.kind()} is fixed to it). Call module.eval() before tracing",
            )
    arguments = [argument for argument in module.forward.schema.arguments if argument.name != "self"]
    return TorchSource(
        "TorchScript",
        name,
        path,
        module,
        lambda named: module(**named),
        tuple(argument.name for argument in arguments),
        frozenset(argument.name for argument in arguments if not argument.has_default_value()),
    )


def program_source(program: Any, path: Path | None, name: str, device: Any) -> TorchSource:
    """A torch.export program; it is moved to the device where it was exported on another one."""
    if not all(_same(t.device, device) for t in program.state_dict.values() if hasattr(t, "device")):
        program = _moved(program, path, device)
    module = program.module()
    flat = tuple(program.graph_signature.user_inputs)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    tensors = {each: values[each] for each in flat if isinstance(each, str) and hasattr(values.get(each), "shape")}
    location: Literal["device", "host"] = "host" if device.type == "cpu" else "device"
    inputs = {
        each: HostTensorInfo(
            each,
            str(value.dtype).removeprefix("torch."),
            tuple(size if isinstance(size, int) else -1 for size in value.shape),
            "input",
            location,
        )
        for each, value in tensors.items()
    }
    structure = (tuple((each, each in tensors) for each in flat), program.call_spec.in_spec)

    def call(named: Mapping[str, Any]) -> Any:
        positional, keywords = _filled(structure, named)
        return module(*positional, **keywords)

    names = tuple(tensors)
    return TorchSource(
        "torch.export program", name, path, program, call, names, frozenset(names), False, inputs, structure
    )


def arguments_of(source: TorchSource, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Named values as a torch.export program takes them, by position and by name."""
    return _filled(source.structure, named)


def _filled(structure: Any, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    from torch.utils import _pytree as pytree

    flat, spec = structure
    positional, keywords = pytree.tree_unflatten([named[each] if given else each for each, given in flat], spec)
    return positional, keywords


def _moved(program: Any, path: Path | None, device: Any) -> Any:
    try:
        from torch.export.passes import move_to_device_pass
    except ImportError as error:  # before torch 2.6
        _refuse(str(path), f"it was exported for another device than {str(device)!r}; export it there", error)
    return move_to_device_pass(program, str(device))
