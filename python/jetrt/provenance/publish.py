"""How a plan, its digest and its manifest get under their names, and who may do that at a time.

Order of a publication: all three are complete under temporary names and on the disk; then the manifest, the digest and,
last, the plan are renamed. A kill in between leaves either no plan, or the old plan beside a manifest and a digest that
do not fit it, which loading refuses; never a plan that goes with the wrong manifest, and never a plan without one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import BuildOptionError, EngineBuildError, ManifestError, PlanError
from ._json import InvalidError, reader
from .manifest import FileName, Manifest
from .names import LONGEST_NAME, Sha256Sidecar, sha256_of

if TYPE_CHECKING:
    from .manifest import Machine

log = logging.getLogger("jetrt.provenance")

_POLL = 0.05  # seconds between two tries for the lock


# ------------------------------------------------------------------------------------------------------------ lock


@contextlib.contextmanager
def engine_lock(
    path: str | os.PathLike[str], timeout: float | None = None, on_wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Holds the right to write the plan `path`; one process (and one thread in it) at a time.

    The lock belongs to an open file, so that the kernel frees it when its holder dies, however that was. `on_wait` is
    called once for each holder that is waited for, with a sentence that names it. Raises `EngineBuildError` when
    `timeout` seconds pass, and when the name or the folder cannot be used, which is better known before a long build.
    """
    path = Path(path)
    _check_name(path)
    lock = path.with_name(f".{path.name}.lock")
    until = None if timeout is None else time.monotonic() + timeout
    told = None
    while (fd := _try_lock(lock)) is None:
        holder = _holder(lock, path)
        if on_wait is not None and holder != told:
            on_wait(holder)
            told = holder
        if until is not None and time.monotonic() >= until:
            raise EngineBuildError(
                f"{holder} It did not end within {timeout:g} s. Wait longer, end that process, or give another name.",
                path=str(path),
            )
        time.sleep(_POLL)
    try:
        yield
    finally:
        # Removed while it is still held: whoever opened the old file before sees that it has lost its name.
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(fd)


def _check_name(path: Path) -> None:
    """Refuses a name that could not be published in the end."""
    allowed = f"a file name of at most {LONGEST_NAME} bytes"
    try:
        reader(FileName)(path.name)
        if len(path.name.encode()) > LONGEST_NAME:
            raise InvalidError(f"the name has {len(path.name.encode())} bytes and may have {LONGEST_NAME}")
    except InvalidError as error:
        raise BuildOptionError(
            f"{path}: {error}. Give another --engine.", option="engine", found=path.name, allowed=allowed
        ) from error


def _try_lock(lock: Path) -> int | None:
    """The open file that holds the lock, ``None`` when somebody else has it."""
    fd = None
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        here = os.fstat(fd)
        with contextlib.suppress(FileNotFoundError):
            there = lock.stat()
            if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                os.ftruncate(fd, 0)
                since = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
                try:
                    os.pwrite(fd, json.dumps({"pid": os.getpid(), "since": since}).encode(), 0)
                except OSError:
                    lock.unlink()  # held here, so it is ours to remove
                    raise
                held, fd = fd, None
                return held
    except BlockingIOError:
        pass
    except OSError as error:
        raise write_error(error, lock) from error
    finally:
        if fd is not None:
            os.close(fd)
    return None


def _holder(lock: Path, path: Path) -> str:
    who = "Another process"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(lock.read_text()[:200])
        who = f"Process {int(content['pid'])} (since {str(content['since'])[:20]})"
    return f"{who} is building {path}."


# ----------------------------------------------------------------------------------------------------- temporaries


def temporary_for(path: str | os.PathLike[str]) -> Path:
    """Where this process writes what is to become `path`: in the same folder, so that it can be renamed."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(path: str | os.PathLike[str]) -> list[Path]:
    """Removes the temporary files of dead processes for the plan `path`; to be called under its lock.

    Those of this process go too: under the lock nobody else writes them, and in containers the same few numbers come
    again and again.
    """
    path = Path(path)
    mine = re.compile(rf"\.{re.escape(path.name)}(?:\.sha256|\.json|\.level\d|\.reference)?\.(\d+)\.tmp", re.ASCII)
    removed = []
    for entry in path.parent.iterdir():
        match = mine.fullmatch(entry.name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            with contextlib.suppress(OSError):
                entry.unlink()
                removed.append(entry)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    except OverflowError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------- publication


def publish(temporary: Path | None, final: str | os.PathLike[str], manifest: Manifest) -> None:
    """Puts a plan with its sidecar and manifest under its name; to be called under `engine_lock`.

    `temporary` is the complete plan, in the same folder. With ``None`` the plan is there already and gets a sidecar and
    a manifest. Raises `EngineBuildError` (disk, permissions) and `ManifestError` (the manifest is not the one of this
    plan, or could not be read back); then nothing has changed.
    """
    final = Path(final)
    plan = final if temporary is None else temporary
    sidecar = Sha256Sidecar(manifest.engine.sha256, final.name)
    texts = {Manifest.path_for(final): manifest.to_json(), Sha256Sidecar.path_for(final): str(sidecar)}
    try:
        size = plan.stat().st_size
        if (manifest.engine.file, manifest.engine.bytes) != (final.name, size):
            raise ManifestError(
                f"{plan}: the manifest is for {manifest.engine.file!r} of {manifest.engine.bytes} bytes, and this is "
                f"to be {final.name!r} and has {size} bytes.",
                path=str(plan),
            )
        _sync(plan)
        for path, text in texts.items():
            _write(temporary_for(path), text)
        for path in texts:
            temporary_for(path).replace(path)
        # On the disk before the plan is: after a power cut a plan must not be there without its companions.
        _sync(final.parent)
        if temporary is not None:
            temporary.replace(final)
            _sync(final.parent)
    except OSError as error:
        raise write_error(error, plan, needed=manifest.engine.bytes) from error
    finally:
        for path in texts:
            _discard(temporary_for(path))


def replace_text(path: Path, text: str) -> None:
    """Writes a small file in one step. Raises `EngineBuildError`."""
    temporary = temporary_for(path)
    try:
        _write(temporary, text)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        _discard(temporary)


def _write(path: Path, text: str) -> None:
    data = text.encode()
    try:
        # Not through a link that somebody put there.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
    except OSError as error:
        raise write_error(error, path, needed=len(data)) from error


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def write_error(error: OSError, path: str | os.PathLike[str], *, needed: int | None = None) -> EngineBuildError:
    """What to raise for an `OSError` of writing `path`: the file, bytes needed and free, the next step.

    `needed` is the size in bytes of what was to be written, where it is known.
    """
    path = Path(path)
    size = "" if needed is None else f" {needed} bytes are needed;"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        problem = f"no room on the disk:{size} {_free(path.parent)} in {path.parent}. Make room, or give another folder"
    elif error.errno == errno.EFBIG:
        problem = f"larger than a file may be here:{size} see `ulimit -f` and the file system's own limit"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        problem = f"{path.parent} cannot be written ({error.strerror}). Change its rights, or give another folder"
    elif error.errno == errno.ENOENT:
        problem = f"the folder {path.parent} does not exist. Create it, or give another one"
    else:
        problem = f"cannot be written: {error.strerror or error}"
    return EngineBuildError(f"{path}: {problem}.", path=str(path))


def _free(folder: Path) -> str:
    try:
        status = os.statvfs(folder)
    except OSError:
        return "free space is unknown"
    return f"{status.f_bavail * status.f_frsize} bytes are free"


# --------------------------------------------------------------------------------------------------- what is there


def existing(
    final: str | os.PathLike[str],
    key: str,
    *,
    options: Mapping[str, Any] | None = None,
    model_sha256: str | None = None,
    machine: Machine | None = None,
    overwrite: bool = False,
) -> Literal["absent", "same"]:
    """Whether the plan with that key is there already; to be called under `engine_lock`.

    "same": key, size and hash are right, so that it can be used as it is. "absent": there is none, or a damaged one of
    the same key that a build may replace. Raises `EngineBuildError` with the differences when another configuration (or
    something without a manifest) has the name, unless `overwrite`. `options`, `model_sha256` and `machine` are those of
    the wanted plan, for that comparison.
    """
    final = Path(final)
    if not final.exists():
        return "absent"
    if not final.is_file():
        raise EngineBuildError(
            f"{final} is there already and is no file: nothing is put in its place. Give another --engine.",
            path=str(final),
        )
    advice = "Give another --engine, or replace it with --overwrite (overwrite=True)."
    try:
        manifest = Manifest.read(final)
        problem = "has no manifest, so that nothing says what it was built from"
    except ManifestError as error:
        manifest, problem = None, f"has a manifest that cannot be used ({error.found})"
    if manifest is None:
        if overwrite:
            return "absent"
        raise EngineBuildError(f"{final} is there already and {problem}. {advice}", path=str(final))
    if manifest.key != key:
        if overwrite:
            return "absent"
        rows = _differing(manifest, key, options, model_sha256, machine)
        raise EngineBuildError(
            f"{final} is there already and was built from something else:\n{aligned(['', 'there', 'wanted'], rows)}\n"
            f"{advice}",
            path=str(final),
        )
    if _intact(final, manifest):
        return "same"
    log.warning("%s does not fit its manifest (damaged, or its build was interrupted) and is built again", final)
    return "absent"


def _intact(final: Path, manifest: Manifest) -> bool:
    try:
        sidecar = Sha256Sidecar.read(final)
    except PlanError:
        return False
    if sidecar is not None and sidecar.sha256 != manifest.engine.sha256:
        return False
    return final.stat().st_size == manifest.engine.bytes and sha256_of(final) == manifest.engine.sha256


def _differing(
    manifest: Manifest, key: str, options: Mapping[str, Any] | None, model_sha256: str | None, machine: Machine | None
) -> list[list[str]]:
    """What two configurations differ in, as rows of name, there, wanted."""
    pairs: list[tuple[str, Any, Any]] = []
    if model_sha256 is not None:
        pairs.append(("model sha256", manifest.model and manifest.model.sha256, model_sha256))
    if options is not None:
        there, wanted = manifest.options or {}, json.loads(json.dumps(options))
        pairs += [(name, there.get(name), wanted.get(name)) for name in {**there, **wanted}]
    if machine is not None:
        names = ("tensorrt", "sm", "sm_count")
        pairs += [(name, getattr(manifest.machine, name), getattr(machine, name)) for name in names]
    rows = [[name, json.dumps(a), json.dumps(b)] for name, a, b in pairs if a != b]
    return rows or [["key", manifest.key, key]]


def aligned(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )


def build_once(
    final: str | os.PathLike[str],
    key: str,
    make: Callable[[Path], Manifest],
    *,
    options: Mapping[str, Any] | None = None,
    model_sha256: str | None = None,
    machine: Machine | None = None,
    overwrite: bool = False,
    rebuild: bool = False,
    timeout: float | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> tuple[Manifest, bool]:
    """The plan of that key under the name `final`, built by ``make(temporary)`` unless it is there already (or, with
    `rebuild`, even then).

    `make` writes the plan to the path that it gets and returns its manifest. The second value tells whether it was
    called. Of several processes that ask at once, one builds and the others wait. Nothing is left behind when `make`
    fails. Keywords as in `existing` and `engine_lock`.
    """
    final = Path(final)
    with engine_lock(final, timeout, on_wait):
        remove_leftovers(final)
        state = existing(final, key, options=options, model_sha256=model_sha256, machine=machine, overwrite=overwrite)
        if state == "same" and not rebuild:
            manifest = Manifest.read(final)
            assert manifest is not None
            return manifest, False
        temporary = temporary_for(final)
        try:
            manifest = make(temporary)
            publish(temporary, final, manifest)
        finally:
            _discard(temporary)
        return manifest, True
