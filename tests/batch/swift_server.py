"""OpenStack Swift in one process: its account, container, object and proxy servers, and its S3 API.

It runs in an environment of its own, see requirements.in beside it:

    python swift_server.py FOLDER PORT_FILE

Data is kept in FOLDER. When all four listen on loopback, the S3 API's port is in PORT_FILE. It
listens until it is told to end. What it does is what Swift's own programs do, on one device with
one copy of each object.
"""

import os
import signal
import sys
from pathlib import Path

import eventlet
from eventlet import wsgi
from swift.common import ring, utils
from swift.common.wsgi import SwiftHttpProtocol, loadapp

BACKENDS = ("account", "container", "object")
# S3's: multipart uploads are Swift's static large objects, deleting many at once is `bulk`.
PIPELINE = "catch_errors gatekeeper listing_formats s3api tempauth bulk slo proxy-server"
PROXY = f"""
[pipeline:main]
pipeline = {PIPELINE}
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
auth_pipeline_check = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
"""


def main() -> None:
    """Listens until SIGTERM."""
    folder, port_file = Path(sys.argv[1]), Path(sys.argv[2])
    os.environ["TZ"] = "UTC+0"
    eventlet.hubs.use_hub("poll")
    utils.eventlet_monkey_patch()
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
    utils.set_swift_dir(str(folder))
    listeners = {name: eventlet.listen(("127.0.0.1", 0)) for name in (*BACKENDS, "proxy")}
    (folder / "devices" / "d0").mkdir(parents=True)
    for name in BACKENDS:
        _write_ring(folder, name, listeners[name].getsockname()[1])
    for name in (*BACKENDS, "proxy"):
        eventlet.spawn(_serve, listeners[name], _application(folder, name))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    ready = port_file.with_suffix(".new")
    ready.write_text(str(listeners["proxy"].getsockname()[1]))
    ready.rename(port_file)
    while True:
        eventlet.sleep(3600)


def _write_ring(folder: Path, name: str, port: int) -> None:
    """Where Swift finds a kind of backend: one device."""
    builder = ring.RingBuilder(part_power=1, replicas=1, min_part_hours=0)
    device = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "d0", "weight": 1}
    builder.add_dev(device)
    builder.rebalance()
    builder.get_ring().save(str(folder / f"{name}.ring.gz"))


def _application(folder: Path, name: str) -> object:
    defaults = f"[DEFAULT]\nswift_dir = {folder}\ndevices = {folder}/devices\nmount_check = false\n"
    own = PROXY if name == "proxy" else f"[app:main]\nuse = egg:swift#{name}\n"
    configuration = folder / f"{name}.conf"
    configuration.write_text(defaults + own)
    return loadapp(str(configuration), {"log_name": name})


def _serve(listener: object, application: object) -> None:
    wsgi.server(
        listener,
        application,
        utils.NullLogger(),
        protocol=SwiftHttpProtocol,
        # S3's clients ask for "ETag", not "Etag".
        capitalize_response_headers=False,
    )


if __name__ == "__main__":
    main()
