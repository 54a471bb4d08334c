"""The exception classes: their tree, their fields, and that they survive pickling."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from jetrt import errors

CLASSES = [getattr(errors, name) for name in errors.__all__]

BASES = {
    "LibraryNotFoundError": (OSError,),
    "UnsupportedVersionError": (errors.JetrtError,),
    "EngineDeserializeError": (errors.JetrtError,),
    "PlanError": (errors.EngineDeserializeError,),
    "ManifestError": (errors.PlanError,),
    "EngineBuildError": (errors.JetrtError,),
    "BuildOptionError": (errors.EngineBuildError, ValueError),
    "ModelError": (errors.EngineBuildError,),
    "BuildCrashError": (errors.EngineBuildError,),
    "PrecisionError": (errors.EngineBuildError,),
    "ParityError": (errors.EngineBuildError,),
    "CalibrationCacheError": (errors.JetrtError,),
    "InferenceError": (errors.JetrtError,),
    "InputError": (errors.InferenceError,),
    "ShapeError": (errors.InputError, ValueError),
    "DTypeError": (errors.InputError, TypeError),
    "LayoutError": (errors.InputError, ValueError),
    "DeviceError": (errors.InputError, ValueError),
    "InputNameError": (errors.InputError, TypeError),
    "GradError": (errors.InputError, RuntimeError),
    "ContextTimeoutError": (errors.InferenceError, TimeoutError),
    "ClosedEngineError": (errors.InferenceError,),
    "GraphCaptureError": (errors.InferenceError,),
    "OutOfMemoryError": (MemoryError,),
    "CudaError": (RuntimeError,),
    "TelemetryUnavailableError": (errors.JetrtError,),
    "RuntimeConfigError": (errors.JetrtError, ValueError),
    "RuntimeNotAvailableError": (errors.JetrtError,),
    "BenchOptionError": (errors.JetrtError, ValueError),
}

# What each class adds; the Rust side gives these by name, so a rename here is a break there.
FIELDS = {
    "LibraryNotFoundError": ["library", "searched"],
    "UnsupportedVersionError": ["library", "found", "supported"],
    "EngineDeserializeError": ["path", "log"],
    "PlanError": ["path", "log", "found", "allowed"],
    "ManifestError": ["path", "log", "found", "allowed", "differences", "command"],
    "EngineBuildError": ["path", "log"],
    "BuildOptionError": ["path", "log", "option", "found", "allowed"],
    "ModelError": ["path", "log", "problems"],
    "BuildCrashError": ["path", "log", "how", "signal", "phase", "seconds"],
    "PrecisionError": ["path", "log", "found", "allowed"],
    "ParityError": ["path", "log", "failures"],
    "CalibrationCacheError": ["path", "found", "expected"],
    "InferenceError": ["engine", "bound", "log"],
    "InputError": ["engine", "bound", "log", "tensor", "found", "allowed"],
    "ContextTimeoutError": ["engine", "seconds", "max_contexts"],
    "ClosedEngineError": ["engine"],
    "GraphCaptureError": ["engine", "reason", "log"],
    "OutOfMemoryError": ["requested", "free", "total"],
    "CudaError": ["call", "code", "name"],
    "TelemetryUnavailableError": ["source", "reason"],
    "RuntimeConfigError": ["key", "found", "allowed"],
    "RuntimeNotAvailableError": ["runtime", "missing", "available", "consumers"],
    "BenchOptionError": ["option", "found", "allowed"],
}


def test_every_class_is_listed():
    defined = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__) == set(BASES) | {"JetrtError"}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_tree(cls):
    assert issubclass(cls, errors.JetrtError)
    for base in BASES.get(cls.__name__, ()):
        assert issubclass(cls, base)
    assert cls.__doc__ is not None
    assert cls.__doc__ != Exception.__doc__


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_fields_default_to_none(cls):
    error = cls("something failed")
    for field in FIELDS.get(cls.__name__, []):
        assert getattr(error, field) is None, field


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("duplicate", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_survives_pickling(cls, duplicate):
    values = {field: [field, 1] for field in FIELDS.get(cls.__name__, [])}
    error = cls("tensor 'x' is wrong\nnext step: mend it", **values)
    error.later = "set after the fact"
    twin = duplicate(error)
    assert type(twin) is cls
    assert str(twin) == str(error) == "tensor 'x' is wrong\nnext step: mend it"
    assert twin.args == error.args
    for field, value in values.items():
        assert getattr(twin, field) == value
    assert twin.later == "set after the fact"


def test_message_is_not_decorated():
    # OSError would write "[Errno None] …" in front of it.
    error = errors.LibraryNotFoundError("libnvinfer.so was not found", library="libnvinfer.so", searched=["/a", "/b"])
    assert str(error) == "libnvinfer.so was not found"
    assert (error.library, error.searched) == ("libnvinfer.so", ["/a", "/b"])
