"""The files of a bench: CSV after every row, JSON and Markdown, one picture at the end.

They are called latency_comparative_<size>: the size of the inputs where all rows have one, "mixed" where they differ.
Each is replaced in one step, so that what is there is whole; an earlier bench's files of the same name are replaced.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tempfile
import time
from pathlib import Path

from ..errors import BenchOptionError, JetrtError
from .markdown import markdown
from .results import COLUMNS, BenchReport

__all__ = ["Files"]

#: Seconds between two writes of all files while rows come in; a bench may have a thousand of them.
_INTERVAL = 1.0


class Files:
    """Raises `BenchOptionError` where the folder cannot be written to."""

    def __init__(self, folder: str | os.PathLike[str], *, picture: bool = True) -> None:
        self.folder = Path(folder)
        self._picture = picture
        self._stem = ""
        self._written = 0.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise BenchOptionError(
                f"--out {self.folder}: nothing can be written there ({error.strerror or error}). Give another folder; "
                "nothing was measured.",
                option="--out",
                found=str(self.folder),
            ) from error

    def keep(self, report: BenchReport) -> None:
        """After a row, and at the end."""
        over = report.complete or report.interrupted
        if not over and time.monotonic() - self._written < _INTERVAL and self._stem:
            return
        stem = f"latency_comparative_{_plain(report.size)}" if report.size else "latency_comparative"
        if self._stem and stem != self._stem:  # the second row told another size
            for suffix in (".csv", ".json", ".md"):
                (self.folder / f"{self._stem}{suffix}").unlink(missing_ok=True)
        if stem != self._stem:
            (self.folder / f"{stem}.png").unlink(missing_ok=True)  # of an earlier bench; the new one comes last
        self._stem = stem
        report.files = {
            "csv": str(self.folder / f"{stem}.csv"),
            "json": str(self.folder / f"{stem}.json"),
            "markdown": str(self.folder / f"{stem}.md"),
        }
        if over and self._picture:
            self._draw(report, self.folder / f"{stem}.png")
        _replace(Path(report.files["csv"]), csv_text(report))
        _replace(Path(report.files["json"]), json.dumps(report.to_mapping(), indent=1, allow_nan=False) + "\n")
        _replace(Path(report.files["markdown"]), markdown(report))
        self._written = time.monotonic()

    def _draw(self, report: BenchReport, path: Path) -> None:
        """A picture that cannot be drawn is said, and ends nothing."""
        from .picture import picture

        try:
            picture(report, path)
            report.files["picture"] = str(path)
        except (JetrtError, OSError) as error:
            report.notes.append(f"no picture: {error}")


def csv_text(report: BenchReport) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.cells() for row in report.rows)
    return text.getvalue()


def _plain(size: str) -> str:
    return re.sub(r"[^0-9A-Za-z._-]", "_", size)


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        # Names of files and messages need not be UTF-8.
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
