"""Named points at which a test can kill the process, so that a kill happens at an exact instant.

``SHIFTGRAD_FAIL_AT=after_publish:generations`` makes the process that reaches the point of that name send itself
SIGKILL: no handler runs, exactly as when the machine takes the process away.
"""

from __future__ import annotations

import os
import signal

ENVIRONMENT_VARIABLE = "SHIFTGRAD_FAIL_AT"


def failpoint(name: str) -> None:
    """Kill this process here if the environment names this point; otherwise do nothing."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == name:
        os.kill(os.getpid(), signal.SIGKILL)
