"""What a model of any runtime has beside its computation: the call shape of `jetrt.Engine`, descriptions, counters."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import InputError, InputNameError

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._host_model import HostTensorInfo

_InputErrorT = TypeVar("_InputErrorT", bound=InputError)


@dataclass(frozen=True)
class Given:
    """Where a value was given; what an error about it names."""

    engine: str
    kind: str
    tensor: str

    def refused(self, error: type[_InputErrorT], found: str, allowed: str, next_step: str) -> _InputErrorT:
        return error(
            f"{self.kind} {self.tensor!r}: found {found}; allowed: {allowed}. {next_step}",
            engine=self.engine,
            tensor=self.tensor,
            found=found,
            allowed=allowed,
        )


class CallableModel(ABC):
    """``model(x=array)["y"]``, by name or in the model's order."""

    _inputs: dict[str, HostTensorInfo]
    _outputs: dict[str, HostTensorInfo]
    _load_report: dict[str, Any]
    _stats: dict[str, int]
    _lock: threading.Lock

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def input_names(self) -> tuple[str, ...]:
        """Names that a call may give, in order; known from the start."""

    @abstractmethod
    def run(
        self,
        inputs: Mapping[str, Any] | Sequence[Any],
        *,
        stream: Any = None,
        out: Mapping[str, Any] | None = None,
        synchronize: bool = False,
        timeout: float | None = None,
    ) -> dict[str, Any]: ...

    @abstractmethod
    def close(self) -> None: ...

    @property
    def inputs(self) -> dict[str, HostTensorInfo]:
        return dict(self._inputs)

    @property
    def outputs(self) -> dict[str, HostTensorInfo]:
        return dict(self._outputs)

    @property
    def load_report(self) -> dict[str, Any]:
        return dict(self._load_report)

    @property
    def stats(self) -> dict[str, Any]:
        """Calls, and the copies and casts that were made."""
        with self._lock:
            return dict(self._stats)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------- calling

    def __call__(
        self,
        *args: Any,
        stream: Any = None,
        out: Mapping[str, Any] | None = None,
        synchronize: bool = False,
        timeout: float | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        named = self._by_position(args) if args else {}
        for name in inputs:
            if name in named:
                raise self._given(name).refused(
                    InputNameError, "the input twice (by position and by name)", "once", "Remove one of the two."
                )
        return self.run({**named, **inputs}, stream=stream, out=out, synchronize=synchronize, timeout=timeout)

    def _given(self, name: str, kind: str = "input") -> Given:
        return Given(self.name, kind, name)

    def _by_position(self, values: Sequence[Any]) -> dict[str, Any]:
        count = len(self.input_names)
        if len(values) > count:
            raise self._given(f"#{count}").refused(
                InputNameError,
                f"{len(values)} positional inputs",
                f"{count}: {', '.join(self.input_names)}",
                "Pass one array per input, in this order or by name.",
            )
        return dict(zip(self.input_names, values, strict=False))
