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
    ("headers", "batch_seconds", "expired"),
    [
        ({}, 9.0, False),
        ({"x_request_timeout": "2"}, 9.0, False),  # the direct port: nobody knows when it arrived
        ({"x_request_start": "999999.0", "x_request_timeout": "2"}, 0.0, False),
        ({"x_request_start": "999997.9", "x_request_timeout": "2"}, 0.0, True),
        # Its response would come too late.
        ({"x_request_start": "999998.5", "x_request_timeout": "2"}, 0.5, True),
        ({"x_request_start": "999945.0"}, 0.0, False),
        ({"x_request_start": "999939.0"}, 0.0, True),
        # The gateway's clock is ahead.
        ({"x_request_start": "1000009.0", "x_request_timeout": "2"}, 9.0, False),
        *(({"x_request_start": text}, 0.0, False) for text in ("", "x", "1e5", "\u0663", "-5")),
        ({"x_request_start": "999990.0", "x_request_timeout": "nan"}, 0.0, False),
    ],
)
def test_a_request_whose_time_limit_will_have_passed_is_rejected(
    headers: dict[str, str], batch_seconds: float, *, expired: bool
) -> None:
    deadlines = Deadlines(clock=lambda: NOW)
    for _ in range(100):
        deadlines.end_batch(batch_seconds, images=8)
    if not expired:
        deadlines.check(request(**headers))
        return
    with pytest.raises(Expired, match=r"The request waited .* s for a worker, and its time limit"):
        deadlines.check(request(**headers))


def test_rejections_do_not_hide_how_long_a_batch_takes_but_for_ever() -> None:
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


def test_the_list_may_appear_later_and_be_rotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handler.deadline._REOPEN_SECONDS", 0)
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
    assert "second" in cancelled


def test_a_long_list_is_emptied_and_all_workers_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handler.deadline._REOPEN_SECONDS", 0)
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


def test_only_the_latest_ids_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "cancelled.log"
    log.touch()
    cancelled = CancelledRequests(log)
    cancelled.update()
    log.write_text("".join(f"id-{i}\n" for i in range(_MAX_CANCELLED + 1)))
    cancelled.update()
    assert "id-0" not in cancelled
    assert f"id-{_MAX_CANCELLED}" in cancelled
