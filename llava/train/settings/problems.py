"""All problems of a run's settings at once, where one error after the other would cost a start each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

LONGEST = 1000  # characters of a problem


class SettingsError(ValueError):
    """Settings that no run can have.

    Attributes:
        problems: one or more, each a sentence that names its flag.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        one_or_all = problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n- " + "\n- ".join(problems)
        super().__init__(one_or_all)


class Problems:
    """Collects the ValueErrors of checks that do not depend on each other."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        """Note a problem; one that is known already is not noted twice, and an overlong value is cut."""
        if len(problem) > LONGEST:
            problem = f"{problem[: LONGEST // 2]} ... {problem[-LONGEST // 2 :]}"
        if problem not in self.found:
            self.found.append(problem)

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Note a ValueError of the block, which ends it."""
        try:
            yield
        except SettingsError as error:
            for problem in error.problems:
                self.add(problem)
        except ValueError as error:
            self.add(str(error))

    def check(self, check: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `check` returns; None where it raises a ValueError, which is noted."""
        with self.catch():
            return check(*args, **kwargs)

    def drop(self, starts: Iterable[str]) -> None:
        """Forget problems that begin so: those that follow from another one."""
        known = tuple(starts)
        self.found = [problem for problem in self.found if not problem.startswith(known)]

    def raise_all(self) -> None:
        """Raise a SettingsError where anything was noted."""
        if self.found:
            raise SettingsError(self.found)
