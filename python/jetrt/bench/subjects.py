"""What is measured: an ONNX file, a plan, a torch module, or a Python callable, as a command line or a caller names it.

    model.onnx                  an ONNX file
    model.engine                a plan
    model.ts, model.pt2         TorchScript, a torch.export program
    file.py:attribute           something of a Python file (its folder is on sys.path while it is imported)
    package.module:attribute    something of an importable module
    NAME=…                      any of these, called NAME in the tables

An attribute that is a class is made (without arguments). What then is a torch.nn.Module is a torch module; anything
else that can be called is a callable. `example_inputs` of the attribute, or beside it in the same file, gives inputs: a
mapping or a sequence of arrays, or a function that returns one, which is given the batch size if it takes an argument.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import BenchOptionError

if TYPE_CHECKING:
    import os

__all__ = ["Kind", "Subject", "named", "subject"]

Kind = Literal["onnx", "plan", "torch", "callable"]

_SUFFIXES: dict[str, Kind] = {
    ".onnx": "onnx",
    ".engine": "plan",
    ".plan": "plan",
    ".trt": "plan",
    ".pt": "torch",
    ".pth": "torch",
    ".ts": "torch",
    ".pt2": "torch",
}
_FORMS = "model.onnx, model.engine, model.ts, model.pt2, file.py:attribute, module:attribute"


@dataclass(frozen=True, eq=False)
class Subject:
    name: str
    kind: Kind
    #: As it was given; for an object, its type.
    text: str
    #: The file, or the object.
    target: Any
    #: Inputs that came with it, see above.
    example: Any = None
    #: Whether it was loaded here, so that a torch module may be moved to the device and set to eval mode.
    own: bool = False

    @property
    def path(self) -> Path | None:
        return self.target if isinstance(self.target, Path) else None

    def example_inputs(self, batch: int) -> Any:
        """What `example` gives for that batch size; ``None`` without one. What its code raises goes through."""
        example = self.example
        if not callable(example) or isinstance(example, (Mapping, Sequence)):
            return example
        return example(batch) if self.takes_batch else example()

    @property
    def takes_batch(self) -> bool:
        """Whether `example` is a function that is told the batch size."""
        if not callable(self.example) or isinstance(self.example, (Mapping, Sequence)):
            return False
        try:
            return len(inspect.signature(self.example).parameters) > 0
        except (TypeError, ValueError):
            return False


def subject(what: str | os.PathLike[str] | Callable[..., Any], name: str | None = None) -> Subject:
    """Raises `BenchOptionError` for a text of none of the forms, or a file or attribute that is not there; an error of
    the code that is imported goes through."""
    if callable(what) and not isinstance(what, (str, Path)):
        return _of_object(what, name or _name_of(what), f"an object of type {type(what).__name__}", None, own=False)
    name, text = named(what) if name is None else (name, str(what))
    path = Path(text)
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None and path.is_file():
        with path.open("rb") as file:
            kind = "plan" if file.read(4) == b"ftrt" else None
    if kind is not None:
        if not path.is_file():
            raise BenchOptionError(f"{text}: there is no such file.", option="SUBJECT", found=text)
        return Subject(name or path.stem, kind, text, path)
    module, separator, attribute = text.rpartition(":")
    if not (separator and module and attribute):
        hint = f" For something in a Python file write {text}:function." if path.suffix == ".py" else ""
        raise BenchOptionError(f"{text!r} is no subject; allowed: {_FORMS}.{hint}", option="SUBJECT", found=text)
    loaded = _file(Path(module)) if module.endswith(".py") else _module(module)
    found: Any = loaded
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            names = ", ".join(n for n, v in vars(loaded).items() if callable(v) and not n.startswith("_")) or "none"
            raise BenchOptionError(
                f"{text}: {module} has no {attribute!r}; what can be called in it: {names}.",
                option="SUBJECT",
                found=attribute,
                allowed=names,
            ) from None
    return _of_object(found, name or attribute, text, getattr(loaded, "example_inputs", None), own=True)


def named(what: str | os.PathLike[str]) -> tuple[str | None, str]:
    """The name that was put before it, and the rest."""
    text = str(what)
    head, separator, rest = text.partition("=")
    if isinstance(what, str) and separator and head and rest and not {"/", ":"} & {*head} and not Path(text).exists():
        return head, rest
    return None, text


def _of_object(found: Any, name: str, text: str, beside: Any, *, own: bool) -> Subject:
    if isinstance(found, type):
        found = found()
    example = getattr(found, "example_inputs", None)
    if example is None:
        example = beside
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "nn") and isinstance(found, torch.nn.Module):
        return Subject(name, "torch", text, found, example, own)
    if not callable(found):
        raise BenchOptionError(
            f"{text} is a {type(found).__name__}, which cannot be called; allowed: a torch.nn.Module, a function, or "
            "an object with __call__.",
            option="SUBJECT",
            found=type(found).__name__,
        )
    return Subject(name, "callable", text, found, example, own)


def _name_of(found: Any) -> str:
    return str(getattr(found, "__name__", None) or type(found).__name__)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # one that it imports
        raise BenchOptionError(
            f"there is no module {error.name!r} on sys.path (asked for by {name}:…). "
            "For a file write path/file.py:name.",
            option="SUBJECT",
            found=name,
        ) from None


def _file(path: Path) -> Any:
    if not path.is_file():
        raise BenchOptionError(f"{path}: there is no such file.", option="SUBJECT", found=str(path))
    name = f"jetrt_bench_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.modules[name] = module  # dataclasses and pickle look a module up
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
    return module
