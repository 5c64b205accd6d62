"""A model that grades answers, behind any endpoint with OpenAI's chat interface."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

KEY_VARIABLE = "OPENAI_API_KEY"
OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Verdict:
    """A judge's reply.

    Attributes:
        text: what it said.
        model: which model said it, as the endpoint names it; a name such as gpt-4 moves from model to model.
    """

    text: str
    model: str


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A judge. Verdicts are kept in a folder: the same question is asked once, whatever happens to a run.

    Attributes:
        model: its name at the endpoint.
        url: of the endpoint, up to `/v1`.
        cache: folder for the verdicts; None keeps none.
        retries: of a request that fails: busy, out of reach, or an error of the server.
        seconds: to wait for a reply.
    """

    model: str
    url: str = OPENAI
    cache: Path | None = None
    retries: int = 8
    seconds: float = 120.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"judge's url {self.url!r}: expected http:// or https://, up to /v1")
        if self.url == OPENAI and not os.environ.get(KEY_VARIABLE):
            raise ValueError(f"the judge at {OPENAI} wants a key: set {KEY_VARIABLE}, or name another endpoint")

    def describe(self) -> dict[str, Any]:
        """What a result says of its judge."""
        return {"model": self.model, "url": self.url}

    def ask(
        self, prompt: str, *, system: str | None = None, temperature: float = 0.0, max_tokens: int = 1024, turn: int = 0
    ) -> Verdict:
        """The judge's reply to a prompt.

        Args:
            prompt: the whole question.
            system: a system prompt.
            temperature, max_tokens: of the reply.
            turn: number of the attempt, where an earlier reply to the same prompt was of no use.

        Raises:
            ConnectionError: the endpoint can't be reached, or refuses; it is named.
        """
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        request = {
            "model": self.model,
            "messages": messages,
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        file = self._file({**request, "url": self.url, "turn": turn})
        if file is not None and file.is_file():
            return Verdict(**json.loads(file.read_text(encoding="utf-8")))
        verdict = self._request(request)
        if file is not None:
            _write(file, {"text": verdict.text, "model": verdict.model})
        return verdict

    def _file(self, request: dict[str, Any]) -> Path | None:
        mark = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        return None if self.cache is None else self.cache / f"{mark}.json"

    @cached_property
    def _client(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise ValueError("a judge needs the package openai: pip install 'llava[eval]'") from error
        key = os.environ.get(KEY_VARIABLE) or "none"  # an endpoint of one's own wants none, and openai some
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=self.retries, timeout=self.seconds)

    def _request(self, request: dict[str, Any]) -> Verdict:
        import openai

        try:
            reply = self._client.chat.completions.create(**request)
        except openai.OpenAIError as error:
            raise ConnectionError(
                f"judge {self.model} at {self.url}: {error}; the same command goes on from here"
            ) from error
        if not reply.choices:
            raise ConnectionError(f"judge {self.model} at {self.url} sent a reply without a choice")
        return Verdict(reply.choices[0].message.content or "", reply.model or self.model)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    staged.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    staged.replace(file)
