"""`make upgrade`: replace the served model archive with zero downtime.

A second TorchServe starts with the new archive and classifies sample images. If its answers agree
with the first one's, nginx sends all requests to it, the first one restarts with the new archive,
and nginx switches back. If a step fails, the old archive is served.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from classification_client import RejectedError, ServiceError
from scripts.gateway import nginx
from scripts.gateway.nginx import GATEWAY_DIR
from scripts.serve.management import client_of, ready_workers, wait_until
from scripts.serve.preflight import check_archives
from scripts.serve.running import HOST, ServerState, find_running, free_ports, require_running
from scripts.serve.server import SERVING, START_TIMEOUT, start, stop
from scripts.store import MODEL_STORE, read_card, sha256
from scripts.terminal import UserError, step, warn

# Share of the sample images whose top-1 label, or set of labels, must stay the same.
AGREEMENT = 0.9
# Subfolder of the server's folder with the archive that the last upgrade replaced.
PREVIOUS = "previous"
# Subfolder of the server's folder for the second server, while that runs.
SECOND = "second"
_CHECK_TIMEOUT = 30.0


def upgrade(
    archive: Path,
    agreement: float = AGREEMENT,
    folder: Path = GATEWAY_DIR,
    model_store: Path = MODEL_STORE,
) -> None:
    """Serve another archive behind the gateway, whose lock the caller holds.

    Args:
        archive: the new archive, with the same name as the served one.
        agreement: share of the sample images, 0 to 1, whose label(s) must be the same.
        folder: the gateway's folder; its parent is the server's.
        model_store: the folder from which the server loads its archive.

    Raises:
        UserError: a check failed; the old archive is served.
    """
    run_dir = folder.parent
    running = require_running(run_dir)
    options = nginx.read_options(folder)
    nginx.require(folder)
    if options.upstreams:
        raise UserError("UPSTREAMS are upgraded by whoever starts them, not by make upgrade.")
    served = run_dir / SERVING / f"{running.model}.mar"
    _check_archive(archive, served, running)
    if find_running(run_dir / SECOND) is not None:
        nginx.reload(options, folder)
        stop_second(run_dir)
    old = _copy(served, run_dir / SECOND / "old")
    new = _copy(archive, run_dir / SECOND / "new")
    try:
        second = start(new, free_ports(), running.workers, run_dir / SECOND)
        step("Upgrade: a second server is ready with the new archive")
        _compare(running, second, agreement)
        nginx.reload(options, folder, [f"{HOST}:{second.ports.inference}"])
        try:
            step("Upgrade: switched; the first server restarts")
            try:
                _restart(new, running, run_dir, model_store)
            except BaseException:
                warn(
                    "The server does not start with the new archive; it restarts with the old one."
                )
                _restart(old, running, run_dir, model_store)
                raise
            _copy(old, run_dir / PREVIOUS)
        finally:
            if find_running(run_dir) is not None:
                nginx.reload(options, folder)
    finally:
        if find_running(run_dir) is not None:
            stop_second(run_dir)
        else:
            warn("The second server serves until the first one is started and upgraded again.")
    step(f"Upgrade: {running.model} serves {sha256(archive)[:12]}; make rollback undoes it")


def _check_archive(archive: Path, served: Path, running: ServerState) -> None:
    check_archives([archive])
    card = read_card(archive)
    assert card is not None
    if len(running.models) > 1:
        raise UserError("make upgrade works for a server of one model.")
    if archive.stem != running.model:
        raise UserError(
            f"The server serves {running.model}, and this archive is named {archive.stem}. An "
            "upgrade keeps the name, which is part of the clients' URLs."
        )
    if sha256(archive) == running.archive_sha256:
        raise UserError("This archive is being served already.")
    old_card = read_card(served)
    if old_card is not None and old_card.trained and not card.trained:
        raise UserError("The new archive has untrained weights, and the served one trained ones.")


def _compare(old: ServerState, new: ServerState, agreement: float) -> None:
    from scripts.samples import sample_photographs  # the container image has no NumPy

    images = list(sample_photographs())
    before, after = _labels(old, images), _labels(new, images)
    share = sum(a == b for a, b in zip(before, after, strict=True)) / len(images)
    step(f"Upgrade: the label is the same for {share:.0%} of the sample images")
    if share < agreement:
        raise UserError(
            f"Only {share:.0%} of the sample images keep their label, and {agreement:.0%} are "
            "required. If the new archive is meant to answer differently: AGREEMENT=0.5"
        )
    if len(set(after)) == 1:
        warn("All sample images get the same label, so they show little of the new archive.")


def _labels(running: ServerState, images: Sequence[bytes]) -> list[frozenset[str]]:
    """Return the labels of each image: its top-1 label, or all labels of a multi-label model."""
    try:
        with client_of(running, patience=_CHECK_TIMEOUT) as client:
            found = [client.classify(image) for image in images]
    except RejectedError as error:
        raise UserError(f"A sample image is rejected: {error.message[:300]}") from error
    except ServiceError as error:
        raise UserError(f"A sample image is not answered: {error}") from error
    return [
        frozenset([one.label] if one.labels is None else [label.label for label in one.labels])
        for one in found
    ]


def _restart(archive: Path, running: ServerState, run_dir: Path, model_store: Path) -> None:
    """Restart the first server with another archive."""
    target = _copy(archive, model_store)
    digest = sha256(target)
    present = find_running(run_dir)
    if present is not None:
        stop(present, run_dir)
    if not running.supervised:
        start(target, running.ports, running.workers, run_dir, grpc=running.grpc)
        return

    def serves() -> bool:
        now = find_running(run_dir)
        return (
            now is not None
            and now.archive_sha256 == digest
            and ready_workers(now) >= running.workers
        )

    if not wait_until(serves, START_TIMEOUT):
        raise UserError(f"The supervisor did not restart the server within {START_TIMEOUT:.0f} s.")


def stop_second(run_dir: Path) -> None:
    """Stop the second server of an upgrade, even if the upgrade was killed."""
    second = find_running(run_dir / SECOND)
    if second is not None:
        stop(second, run_dir / SECOND)
    shutil.rmtree(run_dir / SECOND, ignore_errors=True)


def _copy(archive: Path, folder: Path) -> Path:
    """Copy an archive to a folder atomically; return the copy."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / archive.name
    if target.exists() and target.samefile(archive):
        return target
    unfinished = target.with_suffix(".unfinished")
    shutil.copyfile(archive, unfinished)
    unfinished.replace(target)
    return target
