"""A model that grades answers, behind any endpoint with OpenAI's chat interface."""

from __future__ import annotations


class Judge:
    """See `ask`."""

    def ask(self, prompt: str) -> str:
        """The judge's reply to a prompt."""
        raise NotImplementedError
