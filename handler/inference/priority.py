"""Restore a worker's CPU priority if it inherited the lower one of Java's event loops.

The event loops run at the lowest priority (see `lower_event_loop_priority` in
`scripts/serve/server.py`), and a worker that the management API adds inherits it.
"""

import logging
import os

logger = logging.getLogger(__name__)


def restore_priority() -> None:
    """Set the parent's priority; log a warning if the process lacks the privilege."""
    parent = os.getpriority(os.PRIO_PROCESS, os.getppid())
    if os.getpriority(os.PRIO_PROCESS, 0) <= parent:
        return
    try:
        os.setpriority(os.PRIO_PROCESS, 0, parent)
    except PermissionError:
        logger.warning(
            "This worker has a lower priority than the others, since it was added by the "
            "management API. Restart the server with WORKERS=... to give all the same."
        )
