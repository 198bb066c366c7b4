"""Endpoints: servers that speak OpenAI's chat protocol, and what they may be asked at most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

from trainables.config import Config

DEFAULT_ENDPOINT = "openai"


def _base_url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise ValueError(f"must begin with http:// or https://; got {text!r}")
    if "@" in text.partition("//")[2].partition("/")[0]:
        raise ValueError("must not hold a user or a password; keys come from the environment (api_key_env)")
    return text.rstrip("/")


def _variable(text: str) -> str:
    if not text.isidentifier():
        raise ValueError(f"is the NAME of an environment variable, never the key itself; got {len(text)} characters")
    return text


class EndpointConfig(Config):
    """One server. Nothing here is part of any identity: the same model may move to another place."""

    base_url: Annotated[str, AfterValidator(_base_url)] = "https://api.openai.com/v1"
    """Where the server is, up to and with the version, such as http://localhost:8000/v1."""
    api_key_env: Annotated[str, AfterValidator(_variable)] | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; null: the server wants none."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """At most so many requests a minute over all actors; null: no limit."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """At most so many tokens a minute, prompt and completion together; null: no limit."""
    max_dollars: float | None = Field(default=None, gt=0)
    """What one invocation may spend here; what would cost more ends as budget_exhausted. It needs both prices."""
    price_per_million_prompt_tokens: float | None = Field(default=None, ge=0)
    """Dollars; null: not known."""
    price_per_million_completion_tokens: float | None = Field(default=None, ge=0)
    """Dollars; null: not known."""
    max_concurrency: int = Field(default=64, ge=1)
    """At most so many requests under way at a time, over all actors; the number in use adapts to the server."""
    actors: int = Field(default=1, ge=1)
    """Processes that ask. One keeps 64 requests under way; more help where a process is busy on its CPU."""
    timeout_s: float = Field(default=60.0, gt=0)
    """A request that takes longer counts as failed and is tried again."""
    max_retries: int = Field(default=6, ge=0)
    """How often one request is tried again before it ends as api_error."""

    def price(self, num_prompt_tokens: int, num_completion_tokens: int) -> float | None:
        """Dollars for so many tokens; None where a price is not known."""
        prompt, completion = self.price_per_million_prompt_tokens, self.price_per_million_completion_tokens
        if prompt is None or completion is None:
            return None
        return (num_prompt_tokens * prompt + num_completion_tokens * completion) / 1e6


def endpoint_faults(endpoints: Mapping[str, EndpointConfig]) -> list[tuple[str, str]]:
    """``(key, message)`` for settings that need others."""
    return [
        (
            f"endpoints.{name}.max_dollars",
            "needs price_per_million_prompt_tokens and price_per_million_completion_tokens",
        )
        for name, endpoint in endpoints.items()
        if endpoint.max_dollars is not None and endpoint.price(1, 1) is None
    ]
