"""Errors travel between processes whole."""

from __future__ import annotations

import pickle

from trainables.errors import ConfigError, Fault


def test_a_config_error_keeps_its_faults_and_its_heading_when_pickled() -> None:
    error = ConfigError([Fault("run", "is not done"), Fault("run", "is not done")], "nothing was loaded")
    sent = pickle.loads(pickle.dumps(error))
    assert str(sent) == str(error) == "1 fault found; nothing was loaded:\n  - run: is not done"
    assert sent.faults == error.faults
