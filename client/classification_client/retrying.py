"""The one way in which anything is tried again: with growing and random pauses."""

from collections.abc import Callable
from typing import Any

import stamina

# Seconds.
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0

On = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]


def tries(on: On, patience: float) -> Any:
    """An iterable of tries, each a context in which to do the work once.

    Args:
        on: what is worth another try: kinds of errors, or a function that tells.
        patience: seconds after which the last error is raised; 0 for one try.
    """
    return stamina.retry_context(
        on=on,
        attempts=None if patience else 1,
        timeout=patience or None,
        wait_initial=_FIRST_WAIT,
        wait_max=_LONGEST_WAIT,
        wait_jitter=_FIRST_WAIT,
    )
