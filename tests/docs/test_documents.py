"""The documentation: commands and programs with their output, links, and facts of the code.

Commands and programs run in a copy of the project, against the server of the copy's `make run`. It
has its own ports, which replace those of the text. In a `console` block a line that begins with `$`
is a command, followed by its output; a `python` block ends with its output in comments. `...`
matches any text, and white space any white space.
"""

import doctest
import os
import re
import subprocess
from collections.abc import Callable, Iterator
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
# Of the README.
MAX_LINES = 150
NAVIGATION = Path("docs/site/mkdocs.yml")
TIMEOUT = 280  # seconds

MIN_SYMPTOMS = 25
# Folders whose messages users see.
PRODUCT = {"scripts", "handler", "client", "batch", "deploy"}
# Messages that are not this project's.
OF_OTHERS = {"No space left on device", "ErrorDataDecoderException", "RepeatedPart", "NotAnImage"}

# Beginnings of commands that are not run, and the reason.
NOT_RUN = {
    "git clone": "the copy replaces it",
    "make test": "it runs this test",
    "make bench": "it takes ten minutes",
}

# The gateway's ports in the text.
GATEWAY_PORTS = {"HTTP_PORT": 5000, "HTTPS_PORT": 8443}

_NO_WEIGHTS = "http://127.0.0.1:9/densenet121-a639ec97.pth"

# curl reports its progress unless it writes to a terminal.
_AS_ON_A_TERMINAL = 'curl() { command curl --silent "$@"; }; '

OUTPUT = doctest.OutputChecker()


class Workspace:
    """A copy of the project in which commands run, with ports of its own."""

    def __init__(self, folder: Path) -> None:
        """Copy the project."""
        self.folder = folder
        copy_project(folder)
        (folder / "build").mkdir()
        for export in Path("build").glob("*.onnx"):  # the export takes half of the README's time
            (folder / "build" / export.name).symlink_to(export.absolute())
        uses, mine = Ports().used(grpc=True), free_ports().used(grpc=True)
        names = {use: "PORT" if use == "inference" else f"{use.upper()}_PORT" for use in uses}
        server = {names[use]: mine[use] for use in uses}
        gateway = dict(zip(GATEWAY_PORTS, unused_ports(len(GATEWAY_PORTS)), strict=True))
        # Unreachable weights, so that `make run` serves the model whose weights are a package.
        self._variables: dict[str, dict[str, object]] = {
            "run": server | {"WEIGHTS": _NO_WEIGHTS},
            "start": dict(server),
            "gateway": dict(gateway),
        }
        # By port of the text, the port here.
        self._ports = {uses[use]: mine[use] for use in uses}
        self._ports |= {GATEWAY_PORTS[name]: port for name, port in gateway.items()}

    def serve(self) -> None:
        """Run `make run`, which each page presupposes, unless it has been done."""
        if not (self.folder / ".run/cat.png").exists():
            status, printed = self.run("make run")
            assert status == 0, printed

    def run(self, command: str) -> tuple[int, str]:
        """Run a command of the text; return its status, and its output with the text's ports."""

        def with_variables(match: re.Match[str]) -> str:
            variables = self._variables[match[1]].items()
            return " ".join([match[0], *(f"{name}={value}" for name, value in variables)])

        command = _replaced(command, self._ports)
        command = re.sub(r"\bmake (run|start|gateway)\b(?!-)", with_variables, command)
        return self._run(["bash", "-c", _AS_ON_A_TERMINAL + command])

    def run_python(self, code: str) -> tuple[int, str]:
        """Run a program of the text in the same way."""
        return self._run([".venv/bin/python", "-c", _replaced(code, self._ports)])

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
        documented = {mine: port for port, mine in self._ports.items()}
        return found.returncode, _replaced(found.stdout, documented)


def _replaced(text: str, ports: dict[int, int]) -> str:
    return re.sub(r"(?<=:)\d{4,5}\b", lambda m: str(ports.get(int(m[0]), m[0])), text)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A copy of the project with this environment's packages."""
    made = Workspace(tmp_path_factory.mktemp("project"))
    yield made
    for command in ("gateway-stop", "stop"):
        subprocess.run(["make", command], cwd=made.folder, capture_output=True, check=False)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "page",
    [README, *(pytest.param(page, marks=pytest.mark.slow) for page in PAGES[1:])],
    ids=str,
)
def test_the_commands_of_a_page_print_its_output(
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
    """Return the first difference in a block, if any."""
    for command, expected in _commands(str(example.parsed)):
        reason = next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)
        if reason is not None:
            example.namespace["left"].append(f"{command}: {reason}")
        elif wrong := _check(example, command, expected, Workspace.run):
            return wrong
    return None


def _run_python(example: Example) -> str | None:
    code = str(example.parsed)
    expected = re.search(r"(?:^# .*\n?)*\Z", code, re.MULTILINE)
    assert expected is not None
    printed = re.sub("^# ", "", expected[0], flags=re.MULTILINE)
    return _check(example, code, printed, Workspace.run_python)


def _check(
    example: Example, text: str, expected: str, run: Callable[[Workspace, str], tuple[int, str]]
) -> str | None:
    status, printed = run(example.namespace["workspace"], text)
    difference = _difference(expected, printed)
    # A command may show an error message.
    if difference is not None or (status != 0 and "Error" not in expected):
        return f"{text}\nexited with status {status}; {difference or printed}"
    example.namespace["ran"].append(text)
    return None


def _commands(block: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a block with its documented output."""
    for match in re.finditer(r"^\$ ((?:.*\\\n)*.*)\n?((?:(?!\$ ).*\n?)*)", block, re.MULTILINE):
        yield match[1], match[2]


def _difference(expected: str, printed: str) -> str | None:
    """Return the difference in the output; None if there is none or no output is documented."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not expected.strip() or OUTPUT.check_output(expected, printed, flags):
        return None
    return OUTPUT.output_difference(doctest.Example("", expected), printed, flags)


# --- Links ---

_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_ELSEWHERE = re.compile(r"[a-z]+:")


def test_links_lead_to_existing_files_and_headings() -> None:
    dead = [
        f"{page}: {link}"
        for page in project_files()
        if page.suffix == ".md"
        for link in _LINK.findall(_prose(page))
        if not _ELSEWHERE.match(link) and not _exists(link, page)
    ]
    assert not dead


def _exists(link: str, page: Path) -> bool:
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    return target.exists() and (not anchor or anchor in _anchors(target))


def _prose(page: Path) -> str:
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def _anchors(page: Path) -> set[str]:
    """Return GitHub's anchors of a page's headings, which are unique on each page."""
    headings: list[str] = _HEADING.findall(_prose(page))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_contents_and_navigation_have_every_page() -> None:
    readme = README.read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= MAX_LINES
    assert f"({CONTENTS})" in readme
    pages = {page.as_posix() for page in PAGES} - {str(README), str(CONTENTS)}
    contents = {f"docs/{link}" for link in _LINK.findall(_prose(CONTENTS))}
    assert pages <= contents
    navigation = re.findall(r"- (?:.*: )?(\S+\.md)$", NAVIGATION.read_text(), re.MULTILINE)
    assert sorted(navigation) == sorted({*pages, str(README), str(CONTENTS)})


@pytest.mark.slow
def test_the_site_builds_with_strict_links_and_can_be_searched_offline() -> None:
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


# --- Facts that are in the code too ---


def test_the_configuration_page_has_the_options_and_settings_of_the_code() -> None:
    written = configuration.PAGE.read_text(encoding="utf-8").partition(configuration.MARKER)[2]
    assert written == configuration.generated(), "run: python -m tests.docs.configuration"


def test_each_error_type_is_documented() -> None:
    page = Path("docs/reference/errors.md").read_text(encoding="utf-8")
    types = {getattr(c, "type", None) for c in vars(errors).values() if isinstance(c, type)} - {
        None
    }
    assert types
    assert not {name for name in types if f"| `{name}` |" not in page}


def test_each_alert_has_a_runbook() -> None:
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
    # Join string literals that take several lines.
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
