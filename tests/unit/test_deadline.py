"""Requests that nobody waits for any more are rejected before they cost anything."""

from pathlib import Path

import pytest

from handler.deadline import _MAX_CANCELLED, _MAX_FILE_BYTES, CancelledRequests, Deadlines
from handler.errors import Expired
from handler.request import Options, Request

NOW = 1_000_000.0


def request(**headers: str) -> Request:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Request("id", {}, named, Options(topk=5, threshold=0.1))


@pytest.mark.parametrize(
    ("start", "timeout", "batch_seconds", "expired"),
    [
        (None, None, 9.0, False),
        (None, "2", 9.0, False),  # the direct port: nobody knows when it arrived
        ("999999.0", "2", 0.0, False),
        ("999997.9", "2", 0.0, True),
        ("999998.5", "2", 0.5, True),  # its response would come too late
        ("999945.0", None, 0.0, False),
        ("999939.0", None, 0.0, True),
        ("1000009.0", "2", 9.0, False),  # the gateway's clock is ahead
        *((text, None, 0.0, False) for text in ("", "x", "1e5", "\u0663", "-5")),
        ("999990.0", "nan", 0.0, False),
    ],
)
def test_a_request_whose_time_limit_will_have_passed_is_rejected(
    start: str | None, timeout: str | None, batch_seconds: float, *, expired: bool
) -> None:
    headers = {"x_request_start": start, "x_request_timeout": timeout}
    late = request(**{name: text for name, text in headers.items() if text is not None})
    deadlines = Deadlines(clock=lambda: NOW)
    for _ in range(100):
        deadlines.end_batch(batch_seconds, images=8)
    if expired:
        with pytest.raises(Expired, match=r"The request waited .* s for a worker, and its time"):
            deadlines.check(late)
    else:
        deadlines.check(late)


def test_rejections_alone_do_not_reset_the_measured_batch_time_at_once() -> None:
    deadlines = Deadlines(clock=lambda: NOW)
    late = request(x_request_start="999998.5", x_request_timeout="2")
    for images, count, expired in ((8, 50, True), (0, 10, True), (0, 200, False)):
        for _ in range(count):
            deadlines.end_batch(0.5 if images else 0.0, images)
        if expired:
            with pytest.raises(Expired):
                deadlines.check(late)
        else:
            deadlines.check(late)


def test_a_request_whose_client_has_gone_is_rejected(tmp_path: Path) -> None:
    log = tmp_path / "cancelled.log"
    log.write_text("before-this-worker\n")
    deadlines = Deadlines(log)
    deadlines.start_batch()
    with log.open("a") as file:
        file.write("gone-1\ngone-2\nhalf-a-li")
    deadlines.start_batch()
    deadlines.check(request(x_request_id="before-this-worker"))
    deadlines.check(request(x_request_id="half-a-li"))
    deadlines.check(request(x_request_id="still-there"))
    for name in ("gone-1", "gone-2"):
        with pytest.raises(Expired, match="disconnected"):
            deadlines.check(request(x_request_id=name))
    with log.open("a") as file:
        file.write("ne\n")
    deadlines.start_batch()
    with pytest.raises(Expired):
        deadlines.check(request(x_request_id="half-a-line"))


def test_the_list_may_appear_later_and_be_rotated_and_only_its_latest_ids_are_kept(
    tmp_path: Path,
) -> None:
    log = tmp_path / "cancelled.log"
    cancelled = CancelledRequests(log)
    cancelled.update()
    log.touch()
    cancelled.update()
    log.write_text("first\n")
    cancelled.update()
    log.rename(tmp_path / "old.log")
    log.write_text("second\n")
    cancelled.update()
    assert "first" in cancelled
    with log.open("a") as nginx:
        nginx.writelines(f"id-{i}\n" for i in range(_MAX_CANCELLED))
    cancelled.update()
    assert "first" not in cancelled
    assert "second" not in cancelled
    assert f"id-{_MAX_CANCELLED - 1}" in cancelled


def test_a_long_list_is_truncated_and_no_worker_misses_an_id(
    tmp_path: Path,
) -> None:
    log = tmp_path / "cancelled.log"
    log.touch()
    workers = [CancelledRequests(log), CancelledRequests(log)]
    with log.open("a") as nginx:
        for content in ("first\n", "x" * _MAX_FILE_BYTES + "\n", "last\n"):
            for worker in workers:
                worker.update()
            nginx.write(content)
            nginx.flush()
        for worker in workers * 2:
            worker.update()
    assert log.stat().st_size < 100
    assert all("first" in worker and "last" in worker for worker in workers)
