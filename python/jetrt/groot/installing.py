"""`install()` and `undo()`: the scripts' names, wherever they are looked up, lead to jetrt; and back."""

from __future__ import annotations

import ast
import functools
import importlib.abc
import importlib.util
import inspect
import logging
import sys
import threading
import warnings
from collections.abc import Callable, MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import trt_torch
from . import engine, replace, wrappers
from .bundle import N1_5, REQUIRED, Bundle, check_bundle
from .preloading import discard
from .repair import StrictLogger, repair

__all__ = ["install", "undo"]

_log = logging.getLogger("jetrt.groot")

#: Names of seam A. The script's functions look the classes up among its globals at each call.
CLASSES: dict[str, Any] = {
    "TensorRTDiTWrapper": wrappers.TensorRTDiTWrapper,
    "TensorRTBackboneWrapper": wrappers.TensorRTBackboneWrapper,
}
FUNCTIONS: dict[str, Callable[..., None]] = {
    "replace_dit_with_tensorrt": replace.replace_dit_with_tensorrt,
    "replace_backbone_with_tensorrt": replace.replace_backbone_with_tensorrt,
}
SEAM_A = frozenset((*CLASSES, *FUNCTIONS))
#: Modules of the scripts that others import, perhaps later.
WATCHED = ("standalone_inference_script", "trt_model_forward")

_ABSENT = object()
_lock = threading.RLock()
#: (namespace, name, what was there, what is there now), in order.
_swapped: list[tuple[MutableMapping[str, Any], str, Any, Any]] = []
_options: dict[str, bool] = {"free_torch": False, "optimize": False}
#: Policies, and what `optimize` returned for each.
handles: list[tuple[Any, Any]] = []
#: Calls of a policy that may stop to capture the sequence lengths that they bring, since nobody else prepares them.
WARMUP_CALLS = 16


def install(module: ModuleType | str | None = None, *, free_torch: bool = False, optimize: bool = False) -> list[str]:
    """Makes the GR00T scripts use jetrt's engines. Returns what was replaced, as "module.name".

        import jetrt.groot; jetrt.groot.install()  # one line, below the classes of the script

    module: the script, as a module or its name in `sys.modules`; None: `__main__`. Of the names TensorRTDiTWrapper,
        TensorRTBackboneWrapper, replace_dit_with_tensorrt, replace_backbone_with_tensorrt, setup_tensorrt_engines and
        trt_torch's Engine it gets ours where it has them.
    free_torch: `replace_*` frees the torch module that the engine stands in for.
    optimize: `jetrt.groot.optimize` is called for a policy whose action head got an engine; its first calls capture the
        graphs for the sequence lengths that they bring. A head that it does not know stays as it is, with a warning.

    Also, whether the modules are imported already or later: `trt_torch` (registered in `sys.modules`) and
    `trt_model_forward` get `jetrt.trt_torch.Engine`, `standalone_inference_script` the names above. Calling it again
    adds what is new. A name that the script binds later than this call warns: nothing can be done about it from here.
    `python -m jetrt.groot SCRIPT` needs no line in the script.
    """
    main = sys.modules["__main__"] if module is None else sys.modules[module] if isinstance(module, str) else module
    with _lock:
        _options.update(free_torch=free_torch, optimize=optimize)
        first = len(_swapped)
        _register()
        for known in (main, *(sys.modules.get(name) for name in WATCHED)):
            if known is not None:
                adopt(known)
        done = [f"{_name_of(namespace)}.{name}" for namespace, name, _, _ in _swapped[first:]]
    late = sorted(SEAM_A & _defined_in(main) - set(vars(main)))
    if late:
        warnings.warn(
            f"{main.__name__} binds {', '.join(late)} after this call of install(), and will use its own. Call "
            "install() below the classes, or run the script by `python -m jetrt.groot`.",
            RuntimeWarning,
            stacklevel=2,
        )
    return done


def undo() -> None:
    """Puts back what `install` replaced. Policies that have engines keep them. Safe to call again."""
    with _lock:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterImport)]
        while _swapped:
            namespace, name, before, ours = _swapped.pop()
            if namespace.get(name) is not ours:
                continue  # somebody has bound it anew since
            if before is _ABSENT:
                del namespace[name]
            else:
                namespace[name] = before
        _options.update(free_torch=False, optimize=False)


def adopt(module: ModuleType) -> None:
    """Swaps the names that this module has."""
    names = vars(module)
    for name, ours in CLASSES.items():
        if name in names:
            _swap(names, name, ours)
    for name, function in FUNCTIONS.items():
        if name in names:
            _swap(names, name, _with_options(function))
    setup = names.get("setup_tensorrt_engines")
    if "Engine" in names and (setup is not None or getattr(names["Engine"], "__module__", None) == "trt_torch"):
        _swap(names, "Engine", engine.Engine)
    if setup is None:
        return
    if callable(setup) and not hasattr(setup, "jetrt_original"):
        _swap(names, "setup_tensorrt_engines", _checked(setup))
    if hasattr(names.get("logger"), "warning") and not isinstance(names["logger"], StrictLogger):
        _swap(names, "logger", StrictLogger(names["logger"]))


# Names ----------------------------------------------------------------------------------------------------------------


def _swap(namespace: MutableMapping[str, Any], name: str, ours: Any) -> None:
    before = namespace.get(name, _ABSENT)
    if before is not ours:
        namespace[name] = ours
        _swapped.append((namespace, name, before, ours))


def _name_of(namespace: MutableMapping[str, Any]) -> str:
    return "sys.modules" if namespace is sys.modules else str(namespace.get("__name__", "?"))


def _register() -> None:
    loaded = sys.modules.get("trt_torch")
    if loaded is None:
        ours = ModuleType("trt_torch", "jetrt.trt_torch, under the name that the GR00T scripts import.")
        vars(ours).update({name: getattr(trt_torch, name) for name in trt_torch.__all__})
        vars(ours)["Engine"] = engine.Engine
        _swap(sys.modules, "trt_torch", ours)
    else:
        _swap(vars(loaded), "Engine", engine.Engine)
        _swap(vars(loaded), "torch_type", trt_torch.torch_type)
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the scripts' modules as always, and swaps their names once they have been executed."""

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:  # noqa: ARG002 - importlib's
        if name not in WATCHED or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking.now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def create_module(self, spec: Any) -> ModuleType | None:
        made: ModuleType | None = self._inner.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._inner  # as if nobody had been there
        self._inner.exec_module(module)
        with _lock:
            adopt(module)


def _defined_in(module: ModuleType) -> set[str]:
    """The classes and functions at the top of the module's file."""
    try:
        tree = ast.parse(Path(str(module.__file__)).read_bytes())
    except (AttributeError, OSError, SyntaxError, ValueError):
        return set()  # interactive, or no Python file
    return {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


# Functions ------------------------------------------------------------------------------------------------------------


@functools.cache
def _with_options(function: Callable[..., None]) -> Callable[..., None]:
    """The same function, with the options of `install` as defaults."""

    @functools.wraps(function)
    def replacing(policy: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("free_torch", _options["free_torch"])
        function(policy, *args, **kwargs)
        if function is replace.replace_dit_with_tensorrt:
            _optimize(policy)

    return replacing


def _checked(setup: Callable[..., Any]) -> Callable[..., Any]:
    """`setup_tensorrt_engines` behind a check of the whole bundle: what is wrong is said before a module is deleted."""
    signature = inspect.signature(setup)

    @functools.wraps(setup)
    def setup_tensorrt_engines(policy: Any, trt_engine_path: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(policy, trt_engine_path, *args, **kwargs)
        call.apply_defaults()
        chosen = _chosen(call.arguments)
        device = torch.cuda.current_device()
        bundle = None
        if chosen is not None:
            mode, precisions = chosen
            bundle = check_bundle(
                trt_engine_path, mode, policy, device=device, precisions=precisions, keep_engines=True
            )
        with engine.made() as engines:
            try:
                result = setup(policy, trt_engine_path, *args, **kwargs)
            except BaseException:
                for one in engines:
                    one.close()
                raise
        if bundle is not None:
            _warn_of_unused(bundle, engines, device)
        repair(policy)
        _optimize(policy)
        return result

    vars(setup_tensorrt_engines)["jetrt_original"] = setup
    return setup_tensorrt_engines


def _warn_of_unused(bundle: Bundle, engines: list[Any], device: int) -> None:
    """A script that looks for another name than the file has computes that part in torch without a word."""
    taken = {Path(one.file).resolve() for one in engines}
    for role, path in bundle.plans.items():
        if path.resolve() not in taken:
            discard(path, device, "engine")
            warnings.warn(
                f"{path} is there, and the script did not load it (it may look for another name): torch computes the "
                f"{role}. Rename or link the file to the name that the script prints.",
                RuntimeWarning,
                stacklevel=4,
            )


def _chosen(arguments: dict[str, Any]) -> tuple[str, dict[str, str] | None] | None:
    """Mode and precisions of a call; None for a mode that the check has no table for (the set-up may refuse it)."""
    if "mode" in arguments:
        mode = str(getattr(arguments["mode"], "value", arguments["mode"]))
        if mode in REQUIRED:
            return mode, None
        _log.warning("setup_tensorrt_engines: the files of mode %r are not known and not checked", mode)
        return None
    return N1_5, {
        part: str(arguments[f"{part}_dtype"]) for part in ("vit", "llm", "dit") if f"{part}_dtype" in arguments
    }


def _optimize(policy: Any) -> None:
    if not _options["optimize"]:
        return
    from .loop import optimize

    for entry in [entry for entry in handles if entry[0] is policy]:
        entry[1].undo()  # over the engine that was there before
        handles.remove(entry)
    try:
        handles.append((policy, optimize(policy, warmup_calls=WARMUP_CALLS)))
    except TypeError as error:
        warnings.warn(f"the denoising loop stays as it is: {error}", RuntimeWarning, stacklevel=4)


def statistics() -> list[dict[str, Any]]:
    """The stats of the loops that `optimize` made."""
    return [handle.stats for _, handle in handles]
