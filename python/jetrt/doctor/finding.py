"""What a check found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

__all__ = ["SCHEMA", "Finding", "Report", "Severity"]

SCHEMA: Final = "jetrt-doctor-1"

#: "error": something fails. "warning": something may be wrong or slow. "note": worth knowing, and perhaps intended.
Severity = Literal["error", "warning", "note"]
_ORDER: Final = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    #: Stays the same over versions; what `--ignore` takes.
    id: str
    severity: Severity
    #: What was found here.
    what: str
    #: Why it matters.
    why: str
    #: Commands for a shell that put it right; one way, not all of them.
    fix: tuple[str, ...]

    def text(self) -> str:
        rows = [("why", self.why), *(("fix" if i == 0 else "", line) for i, line in enumerate(self.fix))]
        return "\n".join([f"{self.severity}: {self.id}: {self.what}", *(f"  {name:3}  {line}" for name, line in rows)])


@dataclass(frozen=True)
class Report:
    findings: tuple[Finding, ...]
    #: (what could not be checked, why).
    unchecked: tuple[tuple[str, str], ...] = ()
    #: Ids that were found and are not wanted in `findings`.
    ignored: tuple[str, ...] = field(default=())

    @property
    def code(self) -> int:
        """The exit code: 0 without errors and warnings, else 1."""
        return int(any(finding.severity != "note" for finding in self.findings))

    def to_mapping(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "code": self.code,
            "findings": [{**asdict(finding), "fix": list(finding.fix)} for finding in self.findings],
            "unchecked": [list(entry) for entry in self.unchecked],
            "ignored": list(self.ignored),
        }

    def text(self) -> str:
        ordered = sorted(self.findings, key=lambda finding: _ORDER.index(finding.severity))
        parts = [finding.text() for finding in ordered]
        parts += [f"not checked: {what}: {why}" for what, why in self.unchecked]
        counts = [(sum(f.severity == kind for f in ordered), kind) for kind in _ORDER]
        summary = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for count, kind in counts if count)
        tail = f" ({len(self.ignored)} ignored)" if self.ignored else ""
        return "\n\n".join([*parts, (summary or "nothing found") + tail])
