"""What runs containers for tests and measurements alike."""

from benchmarks.containerized import ASKED, FENCED, READY_TIMEOUT, Answer, Container, container

__all__ = ["ASKED", "FENCED", "READY_TIMEOUT", "Answer", "Container", "container"]
