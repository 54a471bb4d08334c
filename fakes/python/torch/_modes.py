"""Grad mode and inference mode (of each thread), and deterministic algorithms (of the process)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class _Thread(threading.local):
    grad = True
    inference = False


_thread = _Thread()
deterministic = False
warn_only = False
fill_uninitialized_memory = True


def reset() -> None:
    global deterministic, warn_only, fill_uninitialized_memory
    deterministic, warn_only, fill_uninitialized_memory = False, False, True
    _thread.grad, _thread.inference = True, False


def is_grad_enabled() -> bool:
    return _thread.grad


def is_inference_mode_enabled() -> bool:
    return _thread.inference


class _Mode:
    """A context manager that is a decorator, too."""

    def __init__(self) -> None:
        self._before: list[tuple[bool, bool]] = []

    def _wanted(self) -> tuple[bool, bool]:
        raise NotImplementedError

    def __enter__(self) -> None:
        self._before.append((_thread.grad, _thread.inference))
        _thread.grad, _thread.inference = self._wanted()

    def __exit__(self, *exception: object) -> None:
        _thread.grad, _thread.inference = self._before.pop()

    def __call__(self, function: F) -> F:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.clone():
                return function(*args, **kwargs)

        return wrapped  # type: ignore[return-value]

    def clone(self) -> _Mode:
        return type(self)()


def _decorating(mode: type[_Mode], function: Any) -> Any:
    """`@torch.no_grad` without brackets."""
    made = object.__new__(mode)
    if callable(function):
        mode.__init__(made)
        return made(function)
    return made


class no_grad(_Mode):  # noqa: N801 - torch's name
    def __new__(cls, function: Any = None) -> Any:
        return _decorating(cls, function)

    def __init__(self, function: Any = None) -> None:  # noqa: ARG002 - taken by __new__
        super().__init__()

    def _wanted(self) -> tuple[bool, bool]:
        return False, _thread.inference


class enable_grad(no_grad):  # noqa: N801 - torch's name
    def _wanted(self) -> tuple[bool, bool]:
        return True, _thread.inference


class inference_mode(_Mode):  # noqa: N801 - torch's name
    def __new__(cls, mode: Any = True) -> Any:
        return _decorating(cls, mode)

    def __init__(self, mode: Any = True) -> None:
        super().__init__()
        self.mode = bool(mode)

    def clone(self) -> _Mode:
        return inference_mode(self.mode)

    def _wanted(self) -> tuple[bool, bool]:
        # Leaving inference mode inside of it brings gradients back.
        return (False, True) if self.mode else (True, False)


class set_grad_enabled(_Mode):  # noqa: N801 - torch's name
    """Takes effect at once; as a context manager, until its end."""

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self.mode, self._first = mode, _thread.grad
        _thread.grad = mode

    def clone(self) -> _Mode:
        return set_grad_enabled(self.mode)

    def __enter__(self) -> None:
        self._before.append((self._first, _thread.inference))
        _thread.grad = self.mode

    def _wanted(self) -> tuple[bool, bool]:
        return self.mode, _thread.inference


def use_deterministic_algorithms(mode: bool, *, warn_only: bool = False) -> None:
    global deterministic
    deterministic = bool(mode)
    globals()["warn_only"] = bool(warn_only)


def are_deterministic_algorithms_enabled() -> bool:
    return deterministic


def is_deterministic_algorithms_warn_only_enabled() -> bool:
    return warn_only
