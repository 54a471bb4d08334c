"""Tensors in and out: every protocol, every trap that has been seen, and who releases what when.

Nothing here touches a GPU: `_describe` reads metadata only, so a made-up device address does.
"""

from __future__ import annotations

import ctypes
import gc
import os
import runpy
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jetrt import _core, errors

# As the stand-in torch has it, which must not be imported here.
dlpack = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).resolve().parents[1] / "fakes/python/torch/utils/_dlpack.py"))
)
CPU, CUDA, CUDA_HOST, ROCM, CUDA_MANAGED = dlpack.CPU, dlpack.CUDA, dlpack.CUDA_HOST, 10, 13
FLOAT32, COMPLEX64, INT4, BFLOAT16 = (2, 32, 1), (5, 64, 1), (0, 4, 1), (4, 16, 1)


def describe(obj: Any, **options: Any) -> dict[str, Any]:
    return _core._describe(obj, **options)


def settle() -> None:
    """Collects cycles, and lets the extension drop what other threads left to it."""
    gc.collect()
    describe(np.zeros(1))


# ---------------------------------------------------------------------------------------------------------- numpy


@pytest.mark.parametrize(
    ("array", "shape", "strides", "contiguous"),
    [
        (np.array(3.0), (), (), True),
        (np.zeros((0, 3)), (0, 3), (3, 1), True),
        (np.zeros((2, 3)), (2, 3), (3, 1), True),
        (np.zeros((3, 1, 2)), (3, 1, 2), (2, 2, 1), True),
        (np.zeros((2, 3), order="F"), (2, 3), (1, 2), False),
        (np.zeros(6)[::-2], (3,), (-2,), False),
        (np.zeros((4, 4))[1:3, ::-1], (2, 4), (4, -1), False),
        (np.broadcast_to(np.zeros(3), (2, 3)), (2, 3), (0, 1), False),
    ],
)
def test_numpy_layouts(array: np.ndarray, shape: tuple, strides: tuple, contiguous: bool) -> None:
    found = describe(array)
    assert (found["shape"], found["strides"], found["contiguous"]) == (shape, strides, contiguous)
    assert (found["library"], found["device"], found["dtype"]) == ("numpy", "cpu", "float64")
    assert found["ptr"] == array.__array_interface__["data"][0]
    assert not found["kept"], "the caller's own reference is enough"


@pytest.mark.parametrize(
    "name",
    [
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
        "longlong",
        "ulonglong",
    ],
)
def test_numpy_dtypes(name: str) -> None:
    assert describe(np.zeros(2, name))["dtype"] == np.dtype(name).name


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e8m0fnu"])
def test_numpy_extension_dtypes(name: str) -> None:
    array = np.arange(4).astype(getattr(pytest.importorskip("ml_dtypes"), name))
    assert describe(array)["dtype"] == name
    back = _core._roundtrip(array)
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


def test_numpy_says_whether_it_is_read_only() -> None:
    array = np.zeros(3)
    assert not describe(array)["read_only"]
    array.flags.writeable = False
    assert describe(array)["read_only"]


def test_memory_maps_are_arrays(tmp_path: Any) -> None:
    array = np.memmap(tmp_path / "x", "f4", "w+", shape=(3,))
    assert describe(array)["ptr"] == array.ctypes.data


RECORDS = np.zeros(2, dtype=[("a", "i1"), ("b", "f4")])


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (np.zeros(2, ">f4"), errors.DTypeError, "other byte order (>f4)"),
        (np.zeros(2, object), errors.DTypeError, "found object"),
        (np.zeros(2, complex), errors.DTypeError, "real and imaginary part"),
        (np.zeros(2, "U3"), errors.DTypeError, "found str"),
        (np.zeros(2, "M8[s]"), errors.DTypeError, "found datetime64"),
        (RECORDS, errors.DTypeError, "found void"),
        (RECORDS["b"], errors.LayoutError, "stride of 5 bytes between elements of 4"),
        (np.zeros((1,) * 9), errors.ShapeError, "found 9 dimensions; allowed: 0 to 8"),
        (np.ma.zeros(3), errors.LayoutError, "x.filled(value)"),
        (np.float32(3), errors.DTypeError, "numpy.asarray(x)"),
        ([1.0, 2.0], errors.DTypeError, "found a Python list"),
        ((1, 2), errors.DTypeError, "found a Python tuple"),
        (3.5, errors.DTypeError, "found a Python float"),
        (True, errors.DTypeError, "found a Python bool"),
        ("x", errors.DTypeError, "numpy.asarray(x, dtype=...)"),
        (None, errors.DTypeError, "found None"),
        (object(), errors.DTypeError, "found an object of type object"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_refused(value: Any, error: type[errors.InputError], said: str) -> None:
    with pytest.raises(error) as caught:
        describe(value)
    assert said in str(caught.value)
    assert str(caught.value).startswith("input 'obj': found ")
    assert caught.value.tensor == "obj"
    assert caught.value.found
    assert caught.value.allowed


def test_ml_dtypes_with_one_small_element_a_byte_are_not_taken_for_packed_ones() -> None:
    array = np.zeros(4, pytest.importorskip("ml_dtypes").int4)
    with pytest.raises(errors.DTypeError, match="one element a byte"):
        describe(array)


def test_array_likes_are_not_converted_in_silence() -> None:
    class Series:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            raise AssertionError("converted")

    with pytest.raises(errors.DTypeError, match=r"numpy\.asarray\(x\)"):
        describe(Series())


# --------------------------------------------------------------------------------------------- a producer of capsules


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", dlpack.Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", dlpack.DLTensor),
    ]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Producer:
    """An array of a library that nobody knows. `accepts`: the keywords that its `__dlpack__` has."""

    def __init__(
        self,
        shape: tuple[int, ...] = (2, 3),
        strides: tuple[int, ...] | None = None,
        *,
        dtype: tuple[int, int, int] = FLOAT32,
        device: tuple[int, int] = (CPU, 0),
        data: int = 0x1000,
        byte_offset: int = 0,
        accepts: tuple[str, ...] = ("stream", "max_version"),
        flags: int = 0,
        major: int = 1,
    ) -> None:
        self.device, self.accepts, self.flags, self.major = device, accepts, flags, major
        self.calls: list[dict[str, Any]] = []
        self.released = 0
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = (ctypes.c_int64 * len(shape))(*strides) if strides is not None else None
        self._deleter = dlpack.Deleter(self._release)
        self._tensor = dlpack.DLTensor(data, *device, len(shape), *dtype, self._shape, self._strides, byte_offset)
        self._alive: list[Any] = []

    def _release(self, _: int) -> None:
        self.released += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **keywords: Any) -> Any:
        self.calls.append(keywords)
        for keyword in keywords:
            if keyword not in self.accepts:
                raise TypeError(f"__dlpack__() got an unexpected keyword argument '{keyword}'")
        if keywords.get("max_version") is not None:
            managed: Any = _Versioned(self.major, 0, None, self._deleter, self.flags, self._tensor)
            name = b"dltensor_versioned"
        else:
            managed, name = dlpack.Managed(self._tensor, None, self._deleter), b"dltensor"
        self._alive += [managed, name]
        return _new_capsule(ctypes.addressof(managed), name, None)


@pytest.mark.parametrize(
    ("accepts", "calls"),
    [
        (("max_version", "stream"), [{"max_version": (1, 0)}]),
        (("stream",), [{"max_version": (1, 0)}, {}]),
        ((), [{"max_version": (1, 0)}, {}]),
    ],
    ids=["versioned", "legacy", "no keywords"],
)
def test_dlpack_old_and_new(accepts: tuple[str, ...], calls: list[dict[str, Any]]) -> None:
    producer = Producer((2, 3), (1, 2), accepts=accepts)
    found = describe(producer)
    assert (found["library"], found["device"], found["dtype"]) == ("other", "cpu", "float32")
    assert (found["shape"], found["strides"], found["contiguous"]) == ((2, 3), (1, 2), False)
    assert found["kept"]
    assert producer.calls == calls
    assert producer.released == 1


def test_dlpack_without_strides_is_row_major() -> None:
    found = describe(Producer((2, 3), accepts=()))
    assert (found["strides"], found["contiguous"]) == ((3, 1), True)


def test_dlpack_without_dimensions() -> None:
    assert describe(Producer((), ()))["shape"] == ()


@pytest.mark.parametrize(
    ("stream", "said"), [(None, -1), (0, 1), (1, 1), (2, 2), (0x7F00, 0x7F00)], ids=lambda v: str(v)
)
def test_dlpack_stream_numbers(stream: int | None, said: int) -> None:
    producer = Producer(device=(CUDA, 3))
    found = describe(producer, stream=stream)
    assert producer.calls == [{"max_version": (1, 0), "stream": said}]
    assert found["device"] == "cuda:3"
    assert found["producer_stream"] is None, "the producer ordered itself before our stream"


def test_dlpack_producer_that_takes_a_stream_only() -> None:
    producer = Producer(device=(CUDA, 0), accepts=("stream",))
    found = describe(producer, stream=5)
    assert producer.calls == [{"max_version": (1, 0), "stream": 5}, {"stream": 5}]
    assert found["producer_stream"] is None


def test_dlpack_producer_that_takes_no_stream_is_waited_for_on_the_legacy_stream() -> None:
    assert describe(Producer(device=(CUDA, 0), accepts=()), stream=5)["producer_stream"] == 1


def test_dlpack_host_producer_gets_no_stream() -> None:
    producer = Producer()
    describe(producer, stream=5)
    assert producer.calls == [{"max_version": (1, 0)}]


@pytest.mark.parametrize(
    ("device", "place"),
    [((CPU, 0), "cpu"), ((CUDA, 1), "cuda:1"), ((CUDA_HOST, 0), "cpu"), ((CUDA_MANAGED, 0), "cuda:4")],
)
def test_dlpack_devices(device: tuple[int, int], place: str) -> None:
    assert describe(Producer(device=device), device=4)["device"] == place


@pytest.mark.parametrize(
    ("producer", "error", "said"),
    [
        (Producer(device=(ROCM, 1)), errors.DeviceError, "ROCm device 1"),
        (Producer(device=(99, 0)), errors.DeviceError, "DLPack type 99"),
        (Producer(dtype=COMPLEX64), errors.DTypeError, "complex64"),
        (Producer(dtype=(2, 32, 4)), errors.DTypeError, "vectors of 4"),
        (Producer(dtype=INT4, flags=4), errors.DTypeError, "padded to one byte"),
        (Producer((1,) * 9), errors.ShapeError, "9 dimensions"),
        (Producer((-1, 2)), errors.ShapeError, "[-1, 2]"),
        (Producer(data=0), errors.DeviceError, "null pointer"),
        (Producer(major=2), errors.LayoutError, "DLPack 2.0"),
    ],
    ids=lambda v: None if isinstance(v, type) else getattr(v, "device", v) and str(v)[:24],
)
def test_dlpack_refused(producer: Producer, error: type[errors.InputError], said: str) -> None:
    with pytest.raises(error) as caught:
        describe(producer)
    assert said in str(caught.value)
    # A tensor of an unknown version stays in its capsule, which alone may release it.
    assert producer.released == (1 if producer.major == 1 else 0)


def test_dlpack_details() -> None:
    assert describe(Producer(byte_offset=16))["ptr"] == 0x1010
    assert describe(Producer(flags=1))["read_only"]
    assert describe(Producer(dtype=BFLOAT16))["dtype"] == "bfloat16"
    assert describe(Producer(dtype=INT4))["dtype"] == "int4"
    assert describe(Producer((0, 3), data=0))["shape"] == (0, 3)


def test_a_capsule_is_taken_once() -> None:
    producer = Producer()
    capsule = producer.__dlpack__(max_version=(1, 0))
    assert describe(capsule)["shape"] == (2, 3)
    assert producer.released == 1
    with pytest.raises(errors.LayoutError, match="used_dltensor_versioned"):
        describe(capsule)
    assert producer.released == 1


def test_a_producer_that_fails_is_named_and_kept_as_the_cause() -> None:
    class Broken(Producer):
        def __dlpack__(self, **keywords: Any) -> Any:
            raise BufferError("not today")

    with pytest.raises(errors.LayoutError, match="BufferError: not today") as caught:
        describe(Broken())
    assert isinstance(caught.value.__cause__, BufferError)


def test_a_type_error_within_the_producer_is_not_swallowed() -> None:
    class Broken(Producer):
        def __dlpack__(self, **keywords: Any) -> Any:
            raise TypeError("deep inside")

    with pytest.raises(errors.LayoutError, match="TypeError: deep inside"):
        describe(Broken())


def test_an_interrupt_within_the_producer_is_not_a_refusal() -> None:
    class Interrupted(Producer):
        def __dlpack__(self, **keywords: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        describe(Interrupted())


def test_something_else_than_a_capsule() -> None:
    class Odd(Producer):
        def __dlpack__(self, **keywords: Any) -> Any:
            return "capsule"

    with pytest.raises(errors.LayoutError, match="object of type str"):
        describe(Odd())


def test_the_producer_is_released_once_by_whichever_thread_drops_the_last_tensor() -> None:
    buffer = (ctypes.c_float * 6)(*range(6))
    producer = Producer(data=ctypes.addressof(buffer))
    held = [_core._roundtrip(producer, to="numpy")]
    held.append(held[0][1:])
    del held[0]
    settle()
    assert producer.released == 0
    assert held[0].tolist() == [[3.0, 4.0, 5.0]]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    settle()
    assert producer.released == 1


# ------------------------------------------------------------------------------------------- __cuda_array_interface__


class Interface:
    """A device array that speaks nothing but the CUDA array interface."""

    def __init__(self, **changes: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": (2, 3),
            "typestr": "<f4",
            "data": (0x1000, False),
            "version": 3,
            **changes,
        }
        for key in [k for k, v in changes.items() if v is ...]:
            del self.__cuda_array_interface__[key]


def test_a_pitched_camera_frame() -> None:
    # 1080 rows of 1920 RGB pixels, each row padded to 6144 bytes.
    frame = Interface(shape=(1080, 1920, 3), typestr="|u1", strides=(6144, 3, 1), data=(0x7000, True))
    found = describe(frame, device=1)
    assert found["strides"] == (6144, 3, 1)
    assert not found["contiguous"]
    assert (found["dtype"], found["device"], found["ptr"]) == ("uint8", "cuda:1", 0x7000)
    assert found["read_only"]


def test_strides_in_bytes_become_strides_in_elements() -> None:
    found = describe(Interface(strides=(32, 4)))
    assert (found["strides"], found["contiguous"]) == ((8, 1), False)
    assert describe(Interface(strides=(12, 4)))["contiguous"]
    assert describe(Interface(strides=None))["contiguous"]
    assert describe(Interface(version=2))["contiguous"]


@pytest.mark.parametrize("stream", [None, 1, 2, 0x7F00])
def test_the_stream_to_order_after(stream: int | None) -> None:
    assert describe(Interface(stream=stream))["producer_stream"] == stream


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"strides": (30, 4)}, errors.LayoutError, "stride of 30 bytes between elements of 4"),
        ({"strides": (4,)}, errors.LayoutError, "another number of strides"),
        ({"mask": Interface()}, errors.LayoutError, "masked array"),
        ({"version": 1}, errors.LayoutError, "of version 1"),
        ({"version": ...}, errors.LayoutError, "without 'version'"),
        ({"shape": ...}, errors.LayoutError, "without 'shape'"),
        ({"stream": 0}, errors.LayoutError, "stream 0"),
        ({"typestr": ">f4"}, errors.DTypeError, "'>f4'"),
        ({"typestr": "<c8"}, errors.DTypeError, "'<c8'"),
        ({"data": (0, False)}, errors.DeviceError, "null pointer"),
        ({"data": 5}, errors.LayoutError, "pair"),
        ({"shape": (1,) * 9}, errors.ShapeError, "9 dimensions"),
        ({"shape": (-1, 2)}, errors.ShapeError, "[-1, 2]"),
    ],
    ids=str,
)
def test_interface_refused(changes: dict[str, Any], error: type[errors.InputError], said: str) -> None:
    with pytest.raises(error) as caught:
        describe(Interface(**changes))
    assert said in str(caught.value)


def test_dlpack_is_preferred_because_it_orders_the_streams() -> None:
    class Both(Producer):
        @property
        def __cuda_array_interface__(self) -> Any:
            raise AssertionError("read")

    assert describe(Both(device=(CUDA, 0)))["kept"]


# -------------------------------------------------------------------------------------------------------- jetrt.Tensor


def tensor(array: np.ndarray) -> Any:
    return _core._roundtrip(array, to="jetrt")


def device_tensor(**options: Any) -> Any:
    return _core._roundtrip(Producer(device=(CUDA, 0), **options), to="jetrt")


def test_tensor_describes_itself() -> None:
    t = tensor(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert (t.shape, t.dtype, t.device, t.nbytes, len(t)) == ((2, 3), "float32", "cpu", 24, 2)
    assert repr(t) == "jetrt.Tensor(float32[2, 3], device='cpu')"
    assert t.__dlpack_device__() == (CPU, 0)
    with pytest.raises(TypeError, match="0-d"):
        len(tensor(np.array(1.0)))
    with pytest.raises(AttributeError, match="host memory"):
        t.__cuda_array_interface__  # noqa: B018


def test_tensor_of_the_host_becomes_numpy_on_the_same_memory() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    t = tensor(array)
    for view in (np.asarray(t), t.numpy(), t.__array__(), t.__array__(copy=False)):
        assert np.shares_memory(view, array)
        assert view.tolist() == array.tolist()
    assert not np.shares_memory(t.__array__(copy=True), array)
    assert np.asarray(t, dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="copy=False"):
        t.__array__(np.float64, copy=False)


@pytest.mark.skipif(not hasattr(np, "from_dlpack"), reason="numpy < 1.22")
def test_tensor_is_exported_many_times() -> None:
    array = np.arange(4.0)
    t = tensor(array)
    views = [np.from_dlpack(t) for _ in range(3)]
    del t
    settle()
    assert all(np.shares_memory(v, array) for v in views)


@pytest.mark.parametrize(
    "array",
    [np.array(2.5), np.zeros((0, 2)), np.arange(8.0)[::-2], np.arange(6).reshape(2, 3).T, np.array([True, False])],
    ids=["0-d", "empty", "reversed", "transposed", "bool"],
)
@pytest.mark.parametrize("max_version", [None, (1, 0), (1, 3), (0, 8)])
def test_capsules_of_ours_come_back_as_they_went(array: np.ndarray, max_version: tuple[int, int] | None) -> None:
    capsule = tensor(array).__dlpack__(max_version=max_version)
    versioned = max_version is not None and max_version[0] >= 1
    assert ('"dltensor_versioned"' in repr(capsule)) == versioned
    found, expected = describe(capsule), describe(array)
    for key in ("dtype", "shape", "strides", "contiguous", "device"):
        assert found[key] == expected[key]
    assert found["ptr"] == (expected["ptr"] if array.size else 0)


def test_owner_is_dropped_once_the_last_capsule_is_gone() -> None:
    array = np.arange(4.0)
    gone = weakref.ref(array)
    t = tensor(array)
    capsules = [t.__dlpack__(), t.__dlpack__(max_version=(1, 0))]
    del array, t
    settle()
    assert gone() is not None
    thread = threading.Thread(target=capsules.clear)  # never taken: their destructors release
    thread.start()
    thread.join()
    settle()
    assert gone() is None


def test_copies_are_made_only_when_asked_for() -> None:
    t = tensor(np.arange(4.0))
    same, other = describe(t.__dlpack__(copy=False)), describe(t.__dlpack__(copy=True, max_version=(1, 0)))
    assert same["ptr"] == t.data_ptr
    assert other["ptr"] != t.data_ptr
    assert other["shape"] == (4,)
    with pytest.raises(BufferError, match="not contiguous"):
        tensor(np.zeros((2, 2)).T).__dlpack__(copy=True)


def test_device_tensor_speaks_both_protocols() -> None:
    t = device_tensor(data=0xABC000)
    assert (t.device, t.__dlpack_device__()) == ("cuda:0", (CUDA, 0))
    assert t.__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<f4",
        "data": (0xABC000, False),
        "version": 3,
        "strides": None,
        "stream": None,
    }
    for stream in (None, -1, 1, 2, 0x7F00):
        assert describe(t.__dlpack__(stream=stream))["ptr"] == 0xABC000
    assert device_tensor(strides=(1, 2)).__cuda_array_interface__["strides"] == (4, 8)
    with pytest.raises(AttributeError, match="bfloat16"):
        device_tensor(dtype=BFLOAT16).__cuda_array_interface__  # noqa: B018


def test_device_tensor_is_not_read_by_the_host_in_silence() -> None:
    t = device_tensor()
    with pytest.raises(errors.DeviceError, match=r"\.numpy\(\)"):
        np.asarray(t)
    with pytest.raises(errors.DeviceError, match="numpy cannot read"):
        _core._roundtrip(t, to="numpy")
    with pytest.raises(BufferError, match="without a copy"):
        t.__dlpack__(dl_device=(CPU, 0), copy=False)
    with pytest.raises(BufferError, match="consumer's to make"):
        t.__dlpack__(copy=True)
    with pytest.raises(BufferError, match=r"\(2, 1\)"):
        t.__dlpack__(dl_device=(CUDA, 1))


def test_a_type_that_numpy_lacks_needs_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    t = _core._roundtrip(Producer(dtype=BFLOAT16), to="jetrt")
    with pytest.raises(errors.DTypeError, match="pip install ml_dtypes"):
        t.numpy()


# --------------------------------------------------------------------------------------------------------------- torch

WITHOUT_TABLE = "JETRT_TEST_TORCH_WITHOUT_TABLE"


@pytest.fixture(scope="module")
def torch() -> Any:
    module = pytest.importorskip("torch")
    if os.environ.get(WITHOUT_TABLE) and hasattr(module.Tensor, "__dlpack_c_exchange_api__"):
        del module.Tensor.__dlpack_c_exchange_api__
    return module


def test_torch_before_the_exchange_table(torch: Any) -> None:
    """Runs the tests of this section again on a torch without it, as JetPack's wheels are."""
    if os.environ.get(WITHOUT_TABLE) or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no table")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "torch", __file__],
        env={**os.environ, WITHOUT_TABLE: "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_torch_layouts(torch: Any) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    cases = [
        (x, (2, 3), (3, 1), True),
        (x.T, (3, 2), (1, 3), False),
        (torch.ones(1).expand(4, 3), (4, 3), (0, 0), False),
        (torch.tensor(3.0), (), (), True),
        (torch.zeros(0, 3), (0, 3), (3, 1), True),
        (x[:, 1:], (2, 2), (3, 1), False),
    ]
    for value, shape, strides, contiguous in cases:
        found = describe(value)
        assert (found["shape"], found["strides"], found["contiguous"]) == (shape, strides, contiguous)
        assert (found["library"], found["device"], found["ptr"]) == ("torch", "cpu", value.data_ptr())
        assert not found["kept"]


@pytest.mark.parametrize(
    "name",
    ["bool", "int8", "int16", "int32", "int64", "uint8", "float16", "bfloat16", "float32", "float64", "float8_e4m3fn"],
)
def test_torch_dtypes_there_and_back(torch: Any, name: str) -> None:
    dtype = getattr(torch, name, None)
    if dtype is None:
        pytest.skip(f"this torch has no {name}")
    x = torch.arange(6).reshape(2, 3).to(dtype).T
    assert describe(x)["dtype"] == name
    back = _core._roundtrip(x)
    assert type(back) is torch.Tensor
    assert (back.dtype, back.shape, back.stride(), back.data_ptr()) == (x.dtype, x.shape, x.stride(), x.data_ptr())


def test_torch_parameters_and_gradients(torch: Any) -> None:
    assert describe(torch.nn.Parameter(torch.ones(2)))["requires_grad"]
    assert describe(torch.ones(2, requires_grad=True))["requires_grad"]
    assert not describe(torch.ones(2))["requires_grad"]
    assert not describe(np.ones(2))["requires_grad"]


def test_torch_subclasses_come_through_their_own_dlpack(torch: Any) -> None:
    class Mine(torch.Tensor):
        pass

    x = torch.ones(2).as_subclass(Mine)
    found = describe(x)
    assert (found["library"], found["ptr"], found["kept"]) == ("torch", x.data_ptr(), True)
    assert describe(torch.ones(2, requires_grad=True).as_subclass(Mine))["requires_grad"]


def test_torch_negative_bit(torch: Any) -> None:
    z = torch.tensor([1 + 2j, 3 + 4j])
    for lazy in (z.conj().imag, z[:1].conj().imag, torch.tensor(1 + 2j).conj().imag):
        assert lazy.is_neg()
        with pytest.raises(errors.LayoutError, match=r"resolve_neg\(\)"):
            describe(lazy)
        assert describe(lazy.resolve_neg())["dtype"] == "float32"
    assert describe(z.imag)["strides"] == (2,)
    with pytest.raises(errors.DTypeError, match="complex64"):
        describe(z.conj())


@pytest.mark.filterwarnings("ignore")
def test_torch_tensors_without_memory(torch: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(3)
        with pytest.raises(errors.InputError):
            describe(fake)
    for ghost in (torch.ones(2, device="meta"), torch.ones(2).to_sparse(), torch.ones(2, 2).to_sparse_csr()):
        with pytest.raises(errors.InputError):
            describe(ghost)
    seen = []

    def mapped(x: Any) -> Any:
        with pytest.raises(errors.InputError):
            describe(x)
        seen.append(type(x))
        return x

    torch.func.vmap(mapped)(torch.ones(2, 3))
    assert seen == [torch.Tensor], "an exact type all the same"


def test_torch_owner_lives_as_long_as_the_result(torch: Any) -> None:
    array = np.arange(4, dtype=np.float32)
    gone = weakref.ref(array)
    held = [_core._roundtrip(array, to="torch")]
    held.append(held[0][1:])
    del array, held[0]
    settle()
    assert gone() is not None
    assert held[0].tolist() == [1.0, 2.0, 3.0]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    settle()
    assert gone() is None


def test_torch_takes_our_tensor(torch: Any) -> None:
    array = np.arange(4, dtype=np.float32)
    x = torch.from_dlpack(tensor(array))
    assert x.data_ptr() == array.ctypes.data
    assert x.tolist() == array.tolist()


def test_torch_to_numpy_and_jetrt(torch: Any) -> None:
    x = torch.arange(4.0)
    assert _core._roundtrip(x, to="numpy").ctypes.data == x.data_ptr()
    assert _core._roundtrip(x, to="jetrt").data_ptr == x.data_ptr()


# ----------------------------------------------------------------------------------------------------------------- jax


def test_jax_there_and_back() -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.arange(6.0).reshape(2, 3)
    found = describe(x)
    assert (found["library"], found["shape"], found["dtype"], found["kept"]) == ("jax", (2, 3), "float32", True)
    back = _core._roundtrip(x)
    assert type(back) is type(x)
    assert back.tolist() == x.tolist()


def test_jax_tracers_have_no_values() -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(errors.InputError, match="traced"):
        jax.jit(describe)(jax.numpy.ones(2))


def test_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed: torch, numpy"):
        _core._roundtrip(np.zeros(1), to="tensorflow")
