"""What is wrong with this machine: one small function per finding, over facts that were gathered first.

    report = jetrt.doctor.examine()   # the current folder's plans and scripts count too
    report.findings                   # each: id, severity, what, why, fix

Nothing is changed, and nothing heavy is imported into this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from . import library_checks, plan_checks, python_checks, release_checks, setting_checks, system_checks
from .facts import Facts, gather
from .finding import Finding, Report, Severity

__all__ = ["Facts", "Finding", "Report", "Severity", "check", "checks", "examine", "gather"]

Check = Callable[[Facts], Iterator[Finding]]


def checks() -> tuple[Check, ...]:
    """Every check, in the order of the report."""
    modules = (library_checks, python_checks, release_checks, setting_checks, system_checks, plan_checks)
    return tuple(check for module in modules for check in module.CHECKS)


def check(facts: Facts, ignore: Iterable[str] = ()) -> Report:
    """Runs every check on the facts. A check that fails itself is told among `unchecked`."""
    findings: list[Finding] = []
    unchecked = list(facts.unchecked)
    if facts.machine_problem and facts.environment.gpus:
        unchecked.append(("whether the plans fit this GPU", facts.machine_problem))
    for one in checks():
        try:
            findings += one(facts)
        except Exception as error:  # one surprise must not hide what the others found
            unchecked.append((one.__name__, f"{type(error).__name__}: {error}"))
    unwanted = set(ignore)
    kept = tuple(finding for finding in findings if finding.id not in unwanted)
    ignored = tuple(sorted({finding.id for finding in findings} & unwanted))
    return Report(kept, tuple(unchecked), ignored)


def examine(folder: Any = ".", *, deep: bool = False, ignore: Iterable[str] = ()) -> Report:
    """Gathers the facts of this machine and checks them; `deep` also imports heavy packages, in processes of their own.

    Raises OSError for a folder that cannot be read."""
    return check(gather(folder, deep=deep), ignore)
