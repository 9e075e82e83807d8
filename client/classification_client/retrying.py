"""The retry policy: exponential backoff with jitter."""

from typing import Any

import stamina


def tries(on: Any, patience: float) -> Any:
    """Return an iterable of attempts, each a context manager for one attempt.

    Args:
        on: the errors to retry, see stamina.
        patience: seconds after which the last error is raised; 0 for one attempt.
    """
    attempts = None if patience else 1
    waits = {"wait_initial": 0.1, "wait_max": 5.0, "wait_jitter": 0.1}
    return stamina.retry_context(on=on, attempts=attempts, timeout=patience or None, **waits)
