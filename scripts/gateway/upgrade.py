"""`make upgrade`: a new archive in place of the one that serves, without a gap.

New nodes start beside the old ones, classify sample photographs, and take over in one reload of
nginx. The old ones answer what they still have and end. Whenever a check fails, the old ones go on
as if nothing had been. No model is ever registered with a running TorchServe, so that its API for
that stays off.
"""

import dataclasses
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from classification_client import RefusedError, ServiceError
from classification_client.retrying import tries
from scripts.gateway.gateway import GATEWAY_DIR, Node, operation, require_gateway
from scripts.gateway.nginx import change_nodes, wait_for_drain
from scripts.gateway.nodes import (
    keep_release,
    require_own,
    start_node,
    stop_nodes,
    stop_unused,
)
from scripts.samples import sample_photographs
from scripts.serve.management import client_of, ready_workers
from scripts.serve.running import Running, find_running
from scripts.serve.server import stop as stop_server
from scripts.store import read_card, sha256
from scripts.terminal import UserError, step, warn

# Of the sample photographs, the share whose first label may not change; of models that give several
# labels, whose labels may not.
AGREEMENT = 0.9
# Seconds for which the new nodes serve clients before the old ones end.
TRIAL_SECONDS = 5.0
_CHECK_TIMEOUT = 30.0


def upgrade(
    archive: Path,
    agreement: float = AGREEMENT,
    trial_seconds: float = TRIAL_SECONDS,
    folder: Path = GATEWAY_DIR,
) -> None:
    """Puts nodes that serve `archive` in the place of all that serve now.

    Args:
        archive: the new one.
        agreement: share of the sample photographs, 0 to 1, on which new and old nodes must give the
            same first label, or the same labels where a model gives several. A new handler keeps
            all of them; other weights need a smaller share.
        trial_seconds: how long the new nodes must serve clients without a failure.
        folder: the gateway's.

    Raises:
        UserError: a check failed, or another `operation` goes on; the old nodes serve as before.
    """
    with operation(f"make upgrade to {archive.name}", folder):
        _upgrade(archive, agreement, trial_seconds, folder)


def _upgrade(archive: Path, agreement: float, trial_seconds: float, folder: Path) -> None:
    old = [node for node in require_gateway(folder).nodes if not node.drained]
    names = {node.name for node in old}
    require_own(old)
    release = keep_release(archive, folder.parent)
    _check_archive(release, old)
    fresh: list[Node] = []
    gone: list[Node] = []
    try:
        for node in old:
            fresh.append(start_node(release, node.workers, folder.parent))
            step(f"Upgrade: {fresh[-1].name} is ready beside {node.name}")
        _check_answers(fresh, old, agreement)
        leaving = change_nodes(
            lambda nodes: [
                *(dataclasses.replace(n, drained=n.drained or n.name in names) for n in nodes),
                *fresh,
            ],
            folder,
        )
        step("Upgrade: switched; the old nodes finish what they have")
        _check_service(fresh, trial_seconds)
        if not wait_for_drain(leaving):
            warn("Some clients did not take their answers in time and were cut.")
        gone = [node for node in require_gateway(folder).nodes if node.name in names]
        change_nodes(lambda nodes: [node for node in nodes if node.name not in names], folder)
    except BaseException:
        try:
            _go_back(names, fresh, gone, folder)
        except (UserError, OSError, psutil.Error) as error:
            # What failed first is what the caller is told.
            warn(f"The old nodes could not be put back: {error} See: make gateway-status")
        raise
    _end(old)
    step(f"Upgrade: {len(fresh)} node(s) serve {release.parent.name}")


def _go_back(
    old: Collection[str], fresh: Sequence[Node], gone: Sequence[Node], folder: Path
) -> None:
    """Has the old nodes serve again, and ends the new ones once nobody waits for them.

    In the list as it is now: what others changed in it meanwhile stays, and only those nodes come
    back into it that this upgrade took out. New nodes that cannot be taken out serve on.
    """
    new = {node.name for node in fresh}

    def with_old(nodes: Sequence[Node]) -> list[Node]:
        kept = [node for node in nodes if node.name not in new]
        present = {node.name for node in kept}
        kept += [node for node in gone if node.name not in present]
        return [
            dataclasses.replace(node, drained=node.drained and node.name not in old)
            for node in kept
        ]

    try:
        wait_for_drain(change_nodes(with_old, folder))
    finally:
        stop_unused(fresh, folder)


def _end(nodes: Sequence[Node]) -> None:
    """Ends nodes, the server of `make run` too."""
    stop_nodes(nodes)
    for node in nodes:
        running = find_running(Path(node.run_dir))
        if running is not None:
            stop_server(running, Path(node.run_dir))


def _check_archive(release: Path, old: Sequence[Node]) -> None:
    new_card = read_card(release)
    if new_card is None:
        raise UserError(f"{release} is no archive of this project.")
    if not old:
        raise UserError("No node serves now; there is nothing to upgrade.")
    names = {Path(node.archive).stem for node in old}
    if names != {release.stem}:
        raise UserError(
            f"The gateway serves {', '.join(names)}, and this archive is called {release.stem}. "
            "An upgrade keeps the name, which is part of the clients' addresses."
        )
    if all(sha256(Path(node.archive)) == sha256(release) for node in old):
        raise UserError("This archive is what is being served already.")
    old_card = read_card(Path(old[0].archive))
    if old_card is not None and old_card.trained and not new_card.trained:
        raise UserError("The new archive has untrained random weights, the old one trained ones.")


@dataclass(frozen=True)
class _Answer:
    """What a client is told of one photograph, as far as an upgrade must not change it.

    Attributes:
        labels: the first label; of a model that gives several, all that pass, or none.
        several: whether the model gives several.
    """

    labels: frozenset[str]
    several: bool


def _check_answers(fresh: Sequence[Node], old: Sequence[Node], agreement: float) -> None:
    """Compares answers to sample photographs: of each new node, and of the old ones."""
    photographs = list(sample_photographs())
    before = _answers(old[0], photographs)
    for node in fresh:
        after = _answers(node, photographs)
        several = before[0].several or after[0].several
        compared = "labels" if several else "first label"
        # Of several labels, all photographs may rightly get the same ones: none.
        if len(set(after)) == 1 and not several:
            label = next(iter(after[0].labels))
            raise UserError(f"The new archive answers {label!r} to every sample photograph.")
        same = sum(a.labels == b.labels for a, b in zip(before, after, strict=True))
        share = same / len(photographs)
        step(f"Upgrade: {node.name} gives the same {compared} to {share:.0%} of the samples")
        if share < agreement:
            raise UserError(
                f"Only {share:.0%} of the sample photographs keep their {compared}, "
                f"{agreement:.0%} were asked for. If the new archive is meant to answer "
                "differently, say how much must stay: AGREEMENT=0.5"
            )
        if not any(answer.labels for answer in after):
            warn(
                f"{node.name} gives no sample photograph a label, so that they show little of the "
                "new archive. Measure it on pictures of yours: make evaluate"
            )


def _answers(node: Node, photographs: Sequence[bytes]) -> list[_Answer]:
    try:
        with client_of(_running(node), patience=_CHECK_TIMEOUT) as client:
            found = [client.classify(photograph) for photograph in photographs]
    except RefusedError as error:
        raise UserError(
            f"{node.name} answers {error.code} to a sample photograph: {error.message[:300]}"
        ) from error
    except ServiceError as error:
        raise UserError(f"{node.name} does not answer a sample photograph: {error}") from error
    return [
        _Answer(frozenset([one.label]), several=False)
        if one.labels is None
        else _Answer(frozenset(label.label for label in one.labels), several=True)
        for one in found
    ]


def _check_service(fresh: Sequence[Node], trial_seconds: float) -> None:
    """Watches the new nodes serve clients: they must stay ready and answer nothing with a 5xx."""
    deadline = time.monotonic() + trial_seconds
    while True:
        failed = {node.name: _failures(_running(node)) for node in fresh}
        if any(failed.values()):
            raise UserError(f"The new nodes fail at their clients' requests: {failed}.")
        unready = [node.name for node in fresh if ready_workers(_running(node)) == 0]
        if unready:
            raise UserError(f"No worker of {', '.join(unready)} is ready any more.")
        if time.monotonic() > deadline:
            return
        time.sleep(0.5)


def _failures(running: Running) -> float:
    """How many requests this server answered with a 5xx since it started."""
    for attempt in tries(requests.RequestException, patience=_CHECK_TIMEOUT):
        with attempt:
            text = requests.get(running.metrics_url, timeout=_CHECK_TIMEOUT).text
    return sum(float(n) for n in re.findall(r"^Requests5XX\{[^}]*\} (\S+)$", text, re.MULTILINE))


def _running(node: Node) -> Running:
    running = find_running(Path(node.run_dir))
    if running is None:
        raise UserError(f"{node.name} has ended; see {node.run_dir}/logs.")
    return running
