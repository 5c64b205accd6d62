"""A model that grades answers, behind any endpoint with OpenAI's chat interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A judge.

    Attributes:
        model: its name at the endpoint.
        url: of the endpoint, up to `/v1`.
    """

    model: str
    url: str

    def describe(self) -> dict[str, Any]:
        """What a result says of its judge."""
        return {"model": self.model, "url": self.url}

    def ask(self, prompt: str) -> str:
        """The judge's reply to a prompt."""
        raise NotImplementedError
