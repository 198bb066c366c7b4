"""What all jobs of a sweep's graph have in common."""

from __future__ import annotations

from trainables.config import Config


class StoredJob(Config):
    """A job is done when everything that its tasks make is in the store."""

    def tasks(self) -> tuple[tuple[str, str], ...]:
        """(id of the task, key that it makes), for every key."""
        raise NotImplementedError

    def outputs(self) -> tuple[str, ...]:
        """Keys that exist when the job is done."""
        return tuple(key for _, key in self.tasks())
