"""Names beside and of a plan: `<model>__sm<SM>_jp<JP>_trt<TRT>_<precision>.engine` and the `.sha256` beside it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BuildOptionError, PlanError

if TYPE_CHECKING:
    from typing_extensions import Self

    from .manifest import Machine

_FORM = "<model>__sm<SM>_jp<JP>_trt<TRT>_<precision>.engine"
_NAME = re.compile(
    r"(?P<model>.+)__sm(?P<sm>[1-9]\d{0,3})_jp(?P<jetpack>none|r?\d[0-9A-Za-z.-]*)"
    r"_trt(?P<tensorrt>\d+(?:\.\d+){1,3})_(?P<precision>[a-z][a-z0-9]*)\.engine",
    re.ASCII,
)
#: Bytes. Linux allows 255; temporary files put up to 20 around the name.
LONGEST_NAME = 230


@dataclass(frozen=True)
class EngineFilenameSchema:
    """A plan's file name that says what it was built for. `str` gives the name, `parse` reads one back.

    Raises `BuildOptionError` for a part that cannot stand in such a name.
    """

    model: str
    #: 87 for compute capability 8.7.
    sm: int
    #: "6.2.1"; "r36.4.9" (the L4T release) on a Jetson whose JetPack is not known; ``None``, written "none", elsewhere.
    jetpack: str | None
    #: "10.3.0.30", with at least two numbers.
    tensorrt: str
    precision: str

    def __post_init__(self) -> None:
        model = self.model
        problem = (
            "is empty"
            if not model
            else "holds two underscores in a row, which end the model's part of the name"
            if "__" in model
            else "holds a path separator"
            if "/" in model or "\\" in model
            else "begins with a dot, which hides the file"
            if model.startswith(".")
            else "holds a character that cannot be printed"
            if not model.isprintable()
            else None
        )
        if problem is None and len(str(self).encode()) > LONGEST_NAME:
            problem = f"makes a file name of {len(str(self).encode())} bytes; at most {LONGEST_NAME} are allowed"
        if problem is not None:
            raise BuildOptionError(
                f"model name {model!r} {problem}. Give the model another name, or name the plan with --engine.",
                option="model",
                found=model,
                allowed="a plain file name without '__'",
            )
        if _fields(str(self)) != (model, self.sm, self.jetpack, self.tensorrt, self.precision):
            raise BuildOptionError(
                f"{str(self)!r} does not have the form {_FORM}: one of sm={self.sm!r}, jetpack={self.jetpack!r}, "
                f"tensorrt={self.tensorrt!r}, precision={self.precision!r} cannot stand in it.",
                option="engine",
                found=str(self),
                allowed=_FORM,
            )

    def __str__(self) -> str:
        jetpack = "none" if self.jetpack is None else self.jetpack
        return f"{self.model}__sm{self.sm}_jp{jetpack}_trt{self.tensorrt}_{self.precision}.engine"

    @classmethod
    def parse(cls, name: str) -> Self:
        """Reads a file name (no folder). Raises `BuildOptionError` when it has another form."""
        fields = _fields(name)
        if fields is None:
            raise BuildOptionError(
                f"{name!r} does not have the form {_FORM}.", option="engine", found=name, allowed=_FORM
            )
        return cls(*fields)

    @classmethod
    def for_machine(cls, model: str, machine: Machine, precision: str) -> Self:
        """The name of a plan of `model` that is built here."""
        jetpack = machine.jetpack or (machine.l4t and f"r{machine.l4t}")
        return cls(model, machine.sm, jetpack, machine.tensorrt, precision)


def _fields(name: str) -> tuple[str, int, str | None, str, str] | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    jetpack = None if match["jetpack"] == "none" else match["jetpack"]
    return match["model"], int(match["sm"]), jetpack, match["tensorrt"], match["precision"]


@dataclass(frozen=True)
class Sha256Sidecar:
    """The file `<plan>.sha256`: one line as `sha256sum` writes it, so that `sha256sum --check` works on it too.

    Loading hashes the plan in native code and compares it with this file; only `verify` hashes in Python.
    """

    #: 64 lower-case hex digits.
    sha256: str
    #: The name behind the digest. It is not compared: a plan may be renamed together with its sidecar.
    name: str

    @staticmethod
    def path_for(engine: str | os.PathLike[str]) -> Path:
        return Path(f"{os.fspath(engine)}.sha256")

    @classmethod
    def of(cls, engine: str | os.PathLike[str]) -> Self:
        """Hashes the plan."""
        return cls(sha256_of(engine), Path(engine).name)

    @classmethod
    def read(cls, engine: str | os.PathLike[str]) -> Self | None:
        """The sidecar of a plan, ``None`` when there is none. Raises `PlanError` when it holds no digest."""
        path = cls.path_for(engine)
        try:
            data = read_regular(path, 8192)
        except OSError as error:
            raise PlanError(
                f"{path}: cannot read the checksum beside the plan: {error.strerror}.", path=str(path)
            ) from error
        if data is None:
            return None
        words = data.decode(errors="replace").split(maxsplit=1)
        digest = words[0].lower() if words else ""
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise PlanError(
                f"{path}: no SHA-256 digest in this file. Write one with sha256sum, or remove the file.", path=str(path)
            )
        # sha256sum puts "*" before the name of a file that it read in binary mode.
        return cls(digest, words[1].rstrip("\r\n").removeprefix("*") if len(words) > 1 else "")

    def __str__(self) -> str:
        return f"{self.sha256}  {self.name}\n"

    def write(self, engine: str | os.PathLike[str]) -> None:
        """Writes it beside `engine`, in one step."""
        from .publish import replace_text

        replace_text(self.path_for(engine), str(self))

    def verify(self, engine: str | os.PathLike[str]) -> None:
        """Hashes the plan and raises `PlanError` when it is another one."""
        found = sha256_of(engine)
        if found != self.sha256:
            raise PlanError(
                f"{os.fspath(engine)}: its SHA-256 is {found}, and {self.path_for(engine)} (written for {self.name!r}) "
                f"says {self.sha256}: the plan is damaged or was replaced. Copy or build it again.",
                path=os.fspath(engine),
                found=found,
                allowed=self.sha256,
            )


def read_regular(path: Path, limit: int) -> bytes | None:
    """At most `limit` bytes of a file, ``None`` when there is none.

    Raises `OSError`, also for a named pipe (which nobody may ever write to) and for a device (which may never end).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return file.read(limit)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file as 64 lower-case hex digits."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(1 << 20))
    with Path(path).open("rb", buffering=0) as file:
        while length := file.readinto(block):
            digest.update(block[:length])
    return digest.hexdigest()
