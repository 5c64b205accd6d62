"""What a check found, and how it is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

ERROR, WARNING, NOTE = "error", "warning", "ok"
LEVELS = (ERROR, WARNING, NOTE)
NAMED = 5
"""Samples that a line names."""


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
        kind: what it is about, e.g. "image"; lines of one kind stand together.
        message: what was found and how to mend it.
        level: "error": the run must not start; "warning": it may; "ok": for information.
    """

    kind: str
    message: str
    level: str = ERROR

    def line(self) -> str:
        """`error: image: 3 samples ...`, on one line."""
        return f"{self.level}: {self.kind}: {' '.join(self.message.split())}"


@dataclass
class Report:
    """Findings, as they come."""

    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, message: str, level: str = ERROR) -> None:
        """Note a finding."""
        self.findings.append(Finding(kind, message, level))

    @property
    def errors(self) -> list[Finding]:
        """What must be mended."""
        return [finding for finding in self.findings if finding.level == ERROR]

    def ordered(self) -> list[Finding]:
        """Errors first, then warnings, then the rest; within them by kind, in the order in which they were found."""
        kinds = list(dict.fromkeys(finding.kind for finding in self.findings))
        return sorted(self.findings, key=lambda one: (LEVELS.index(one.level), kinds.index(one.kind)))

    @contextmanager
    def catch(self, kind: str) -> Iterator[None]:
        """Note a ValueError or OSError of the block, which ends it, as an error."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.add(kind, str(error))


def name_samples(labels: Sequence[str], count: int) -> str:
    """`3 samples ('a', 'b', ...)`.

    Args:
        labels: of the first ones, as they shall appear.
        count: of all.
    """
    more = ", ..." if count > len(labels[:NAMED]) else ""
    return f"{count} sample{'' if count == 1 else 's'} ({', '.join(labels[:NAMED])}{more})"
