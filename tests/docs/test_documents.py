"""The documents: their commands and programs, with what they print, and their links.

Commands and programs run as a reader would run them, in a copy of the project, against the server
that the copy's `make run` started: on ports of its own, so that those of the text stand for them.
In a `console` block a line that begins with `$` is a command, and what follows is what it prints;
in a `python` block the comments at its end are. `...` stands for what varies, and white space
counts once.
"""

import dataclasses
import doctest
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import SkipTest

import pytest
from playwright.sync_api import expect, sync_playwright
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from handler import errors
from scripts.serve.running import Ports, free_ports, unused_ports
from tests.browser.conftest import launch
from tests.docs import configuration
from tests.workspace import copy_project, project_files

README = Path("README.md")
# The README comes first: it starts the server.
CONTENTS = Path("docs/README.md")
PAGES = [README, *sorted(Path("docs").rglob("*.md"))]
# Of the README, so that a reader reaches its end.
MAX_LINES = 150
NAVIGATION = Path("docs/site/mkdocs.yml")
TIMEOUT = 280  # seconds

MIN_SYMPTOMS = 25
# Folders whose messages users see.
PRODUCT = {"scripts", "handler", "client", "batch", "deploy"}
# Messages that are not this project's.
OF_OTHERS = {"No space left on device", "ErrorDataDecoderException", "RepeatedPart", "NotAnImage"}

# The beginnings of commands that are not run, and why.
NOT_RUN = {
    "git clone": "it is what the reader has",
    "make test": "it is what runs this",
    "make bench": "it takes ten minutes",
}

# What the text calls these, beside TorchServe's ports.
GATEWAY_PORTS = {"HTTP_PORT": 5000, "HTTPS_PORT": 8443}

# Where nobody answers: `make run` serves the model whose weights are a package, as for the text.
_NO_WEIGHTS = "http://127.0.0.1:9/densenet121-a639ec97.pth"

# curl shows its progress where it does not write to a terminal.
_AS_ON_A_TERMINAL = 'curl() { command curl --silent "$@"; }; '

OUTPUT = doctest.OutputChecker()


@dataclass(frozen=True)
class Workspace:
    """A copy of the project in which commands run.

    Attributes:
        folder: the copy.
        server: the variable of `make run` for each port of the text, and what stands for it here.
        gateway: the same for `make gateway`.
    """

    folder: Path
    server: dict[str, tuple[int, int]]
    gateway: dict[str, tuple[int, int]]

    @property
    def ports(self) -> dict[int, int]:
        """Those of the text, and what stands for each here."""
        return dict([*self.server.values(), *self.gateway.values()])

    def serve(self) -> None:
        """Does what each page takes for granted, `make run`, unless it has been done."""
        if not (self.folder / ".run/cat.png").exists():
            status, printed = self.run("make run")
            assert status == 0, printed

    def run(self, command: str) -> tuple[int, str]:
        """Run a command of the text; return its status and output, in the text's own terms."""
        return self._run(
            ["bash", "-c", _AS_ON_A_TERMINAL + self._with_variables(self.here(command))]
        )

    def run_python(self, code: str) -> tuple[int, str]:
        """The same for a program."""
        return self._run([".venv/bin/python", "-c", self.here(code)])

    def _run(self, command: list[str]) -> tuple[int, str]:
        found = subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, "COLUMNS": "100", "MAKEFLAGS": "", "PYTHONWARNINGS": ""},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        return found.returncode, self.there(found.stdout)

    def _with_variables(self, command: str) -> str:
        """Has make use these ports, and fetch no weights, as on the machine of the text."""

        def told(match: re.Match[str]) -> str:
            chosen = self.gateway if match[1] == "gateway" else self.server
            weights = f" WEIGHTS={_NO_WEIGHTS}" if match[1] == "run" else ""
            return (
                match[0]
                + "".join(f" {name}={mine}" for name, (_, mine) in chosen.items())
                + weights
            )

        return re.sub(r"\bmake (run|start|gateway)\b(?!-)", told, command)

    def here(self, text: str) -> str:
        """The text with this workspace's ports for its own."""
        return _replaced(text, self.ports)

    def there(self, text: str) -> str:
        """The text with the documented ports for this workspace's."""
        return _replaced(text, {mine: documented for documented, mine in self.ports.items()})


def _replaced(text: str, ports: dict[int, int]) -> str:
    return re.sub(r"(?<=:)\d{4,5}\b", lambda m: str(ports.get(int(m[0]), m[0])), text)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """The project as git has it, with this environment's packages."""
    folder = tmp_path_factory.mktemp("project")
    copy_project(folder)
    (folder / "build").mkdir()
    for export in Path("build").glob("*.onnx"):  # exporting takes half of what the README does
        (folder / "build" / export.name).symlink_to(export.absolute())
    documented, mine = dataclasses.asdict(Ports()), dataclasses.asdict(free_ports())
    server = {
        "PORT" if use == "inference" else f"{use.upper()}_PORT": (documented[use], mine[use])
        for use in documented
    }
    unused = unused_ports(len(GATEWAY_PORTS))
    gateway = {
        name: (port, mine) for (name, port), mine in zip(GATEWAY_PORTS.items(), unused, strict=True)
    }
    yield Workspace(folder, server, gateway)
    for command in ("gateway-stop", "stop"):
        subprocess.run(["make", command], cwd=folder, capture_output=True, check=False)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "page",
    [README, *(pytest.param(page, marks=pytest.mark.slow) for page in PAGES[1:])],
    ids=str,
)
def test_a_page_says_what_its_commands_print(
    page: Path, workspace: Workspace, note: list[str]
) -> None:
    if page != README:
        workspace.serve()
    parsers = [CodeBlockParser("console", _run_console), CodeBlockParser("python", _run_python)]
    document = Document.parse(str(page), SkipParser(), *parsers)
    document.namespace.update(workspace=workspace, ran=[], left=[])
    ran, left = document.namespace["ran"], document.namespace["left"]
    for example in document.examples():
        _evaluate(example)
    note.append(f"{page}: {len(ran)} commands and programs were run, {len(left)} not: {left}")


def _evaluate(example: Example) -> None:
    try:
        example.evaluate()
    except SkipTest as skip:
        example.namespace["left"].append(f"line {example.line}: {skip}")


def _run_console(example: Example) -> str | None:
    """Return what is wrong with a block, if anything."""
    for command, expected in _commands(str(example.parsed)):
        reason = next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)
        if reason is not None:
            example.namespace["left"].append(f"{command}: {reason}")
        elif wrong := _wrong(example, command, expected, Workspace.run):
            return wrong
    return None


def _run_python(example: Example) -> str | None:
    code = str(example.parsed)
    expected = re.search(r"(?:^# .*\n?)*\Z", code, re.MULTILINE)
    assert expected is not None
    printed = re.sub("^# ", "", expected[0], flags=re.MULTILINE)
    return _wrong(example, code, printed, Workspace.run_python)


def _wrong(
    example: Example, text: str, expected: str, run: Callable[[Workspace, str], tuple[int, str]]
) -> str | None:
    status, printed = run(example.namespace["workspace"], text)
    difference = _difference(expected, printed)
    # A command that shows how something fails prints so.
    if difference is not None or (status != 0 and "Error" not in expected):
        return f"{text}\nended with status {status}; {difference or printed}"
    example.namespace["ran"].append(text)
    return None


def _commands(block: str) -> Iterator[tuple[str, str]]:
    """Each command of a block, with what the block says that it prints."""
    for match in re.finditer(r"^\$ ((?:.*\\\n)*.*)\n?((?:(?!\$ ).*\n?)*)", block, re.MULTILINE):
        yield match[1], match[2]


def _difference(expected: str, printed: str) -> str | None:
    """What a reader would see instead; None where the text is right, or says nothing."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not expected.strip() or OUTPUT.check_output(expected, printed, flags):
        return None
    return OUTPUT.output_difference(doctest.Example("", expected), printed, flags)


# --- Links ---

_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_ELSEWHERE = re.compile(r"[a-z]+:")


def test_links_lead_to_files_and_headings_that_are_there() -> None:
    dead = [
        f"{page}: {link}"
        for page in project_files()
        if page.suffix == ".md"
        for link in _LINK.findall(_prose(page))
        if not _ELSEWHERE.match(link) and not _leads_somewhere(link, page)
    ]
    assert not dead


def _leads_somewhere(link: str, page: Path) -> bool:
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    return target.exists() and (not anchor or anchor in _anchors(target))


def _prose(page: Path) -> str:
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def _anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings; none of them stands there twice."""
    headings: list[str] = _HEADING.findall(_prose(page))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_the_contents_and_the_site_name_every_page() -> None:
    readme = README.read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= MAX_LINES
    assert f"({CONTENTS})" in readme
    pages = {page.as_posix() for page in PAGES} - {str(README), str(CONTENTS)}
    contents = {f"docs/{link}" for link in _LINK.findall(_prose(CONTENTS))}
    assert pages <= contents
    navigation = re.findall(r"- (?:.*: )?(\S+\.md)$", NAVIGATION.read_text(), re.MULTILINE)
    assert sorted(navigation) == sorted({*pages, str(README), str(CONTENTS)})


@pytest.mark.slow
def test_the_site_builds_with_strict_links_and_is_searched_from_the_disk() -> None:
    made = subprocess.run(["make", "docs"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    failed: list[str] = []
    with sync_playwright() as playwright:
        chromium = launch(playwright.chromium)
        if chromium is None:
            pytest.skip("NOT RUN: no Chromium")
        page = chromium.new_context(offline=True).new_page()
        page.on("requestfailed", lambda request: failed.append(request.url))
        page.goto(Path("build/docs/site/index.html").absolute().as_uri())
        page.keyboard.press("/")
        search = page.get_by_placeholder("Search")
        search.fill("calibration")
        expect(page.get_by_role("link", name="Reduced precision").first).to_be_visible()
        expect(search).to_have_value("calibration")
        chromium.close()
    assert not failed


# --- What stands in two places ---


def test_the_configuration_page_has_the_options_and_settings_of_the_code() -> None:
    written = configuration.PAGE.read_text(encoding="utf-8").partition(configuration.MARKER)[2]
    assert written == configuration.generated(), "run: python -m tests.docs.configuration"


def test_each_error_type_has_a_row() -> None:
    page = Path("docs/reference/errors.md").read_text(encoding="utf-8")
    types = {getattr(c, "type", None) for c in vars(errors).values() if isinstance(c, type)} - {
        None
    }
    assert types
    assert not {name for name in types if f"| `{name}` |" not in page}


def test_each_alert_has_a_runbook_and_no_other() -> None:
    rules = Path("deploy/monitoring/alerts.yaml").read_text(encoding="utf-8")
    alerts = re.findall(r"alert: (\w+)", rules)
    page = Path("docs/operate/monitoring.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (\w+)$", page, re.MULTILINE) == alerts
    runbooks = re.findall(r"runbook: docs/operate/monitoring.md#(\w+)", rules)
    assert runbooks == [alert.lower() for alert in alerts]


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    page = Path("docs/operate/troubleshooting.md").read_text(encoding="utf-8")
    symptoms = re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
    assert len(symptoms) > MIN_SYMPTOMS
    files = [f for f in project_files() if f.suffix == ".py" and f.parts[0] in PRODUCT]
    # One text, without the seams of strings that take several lines.
    code = re.sub(r'"\s*f?"', "", "".join(f.read_text(encoding="utf-8") for f in files))
    quoted = [q for symptom in symptoms for q in re.findall(r"`((?:Error: )?[A-Z].*?)`", symptom)]
    missing = [
        part
        for message in quoted
        if message not in OF_OTHERS
        for part in re.split(r"\.\.\.|\w+=|\d+", message.removeprefix("Error: "))
        if len(part.strip()) > 3 and part.strip() not in code
    ]
    assert quoted
    assert not missing
