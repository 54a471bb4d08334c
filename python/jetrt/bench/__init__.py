"""Measuring models: `jetrt bench` and `jetrt.bench`.

    report = jetrt.bench(["det.onnx"], precisions=["fp32", "fp16"], runtimes=["tensorrt", "onnx_cpu"], out="results")
    print(report.table())

What is measured is in `subjects`, what may be asked for in `options`; a row is a `session` that is warmed up and
measured (`timing`), judged (`verdict`, `accuracy`), and written (`results`, `files`).
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .results import BenchReport

__all__ = ["bench"]

Source = str | os.PathLike[str] | Callable[..., Any]


def bench(
    subjects: Source | Sequence[Source] | Mapping[str, Source],
    *,
    out: str | os.PathLike[str] | None = None,
    picture: bool = True,
    progress: Literal["auto", "terminal", "notebook", "plain", "none"] = "none",
    **options: Any,
) -> BenchReport:
    """Measures every subject on every runtime, precision, batch and number of threads that was asked for.

    `subjects`: paths and texts as `jetrt.bench.subjects` has them, torch modules or callables; a mapping names them.
    `out`: folder for the CSV, JSON, Markdown and picture; ``None`` writes nothing. Further keywords are those of
    `jetrt.bench.options.BenchOptions` (shapes: name -> (shape, dtype or None)); `timing` may be a mapping.

    A row that cannot be had, or fails, says so in its status and ends nothing. Raises `BenchOptionError` for what makes
    no sense, before anything is measured. Ctrl-C goes through as KeyboardInterrupt once what was measured is written;
    its `report` is the `BenchReport` so far.
    """
    from ..builder.progress import reporter
    from ..errors import BenchOptionError
    from .files import Files
    from .options import BenchOptions
    from .results import Row
    from .run import run
    from .subjects import Subject, named, subject
    from .timing import Plan

    timing = options.pop("timing", None)
    try:
        if timing is not None:
            options["timing"] = timing if isinstance(timing, Plan) else Plan(**timing)
        chosen = BenchOptions(**options)
    except TypeError as error:
        raise BenchOptionError(f"jetrt.bench: {error}. BenchOptions lists the options.") from error
    files = Files(out, picture=picture) if out is not None else None
    sources: list[tuple[str | None, Source]]
    if isinstance(subjects, Mapping):
        sources = list(subjects.items())
    elif isinstance(subjects, Sequence) and not isinstance(subjects, str):
        sources = [(None, each) for each in subjects]
    else:
        sources = [(None, subjects)]
    found: list[Subject] = []
    failed: list[Row] = []
    for name, source in sources:
        try:
            found.append(subject(source, name))
        except (BenchOptionError, KeyboardInterrupt):
            raise
        except Exception as error:  # of the code that was imported; the other subjects go on
            reason = f"it could not be loaded: {type(error).__name__}: {error}"
            text = name or (named(source)[0] or str(source) if isinstance(source, (str, os.PathLike)) else repr(source))
            failed.append(Row(text, "callable", "", "python", None, 1, status="failed", reason=reason))
    if not sources:
        raise BenchOptionError("there is nothing to measure: name at least one subject.", option="SUBJECT")
    # One name in two forms, its ONNX file and its module, is one component.
    names = [(each.name, each.kind) for each in found]
    for each in names:
        if names.count(each) > 1:
            raise BenchOptionError(
                f"two subjects of one kind are called {each[0]!r}: give them names, such as first=… second=….",
                option="SUBJECT",
            )
    with reporter(progress) as shown:
        report = run(
            found, chosen, reporter=shown, keep=files.keep if files is not None else lambda _: None, failed=failed
        )
    if report.interrupted:
        interrupt = KeyboardInterrupt()
        interrupt.report = report  # type: ignore[attr-defined]
        raise interrupt
    return report


class _CallableModule(types.ModuleType):
    """`jetrt.bench` is this function whether or not somebody imported this package, whose name it has."""

    def __call__(self, *args: Any, **kwargs: Any) -> BenchReport:
        return bench(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
