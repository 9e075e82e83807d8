"""The command line: `python -m scripts COMMAND --option value`; the Makefile calls it."""

import sys
from importlib import import_module

import typer

from scripts.terminal import run

# Module and function of each command. Only the requested one is imported: some imports take 1 s.
COMMANDS = {
    "run": "scripts.run:main",
    "archive": "scripts.build.commands:main",
    "start": "scripts.serve.commands:start_command",
    "status": "scripts.serve.commands:status_command",
    "scale": "scripts.serve.commands:scale_command",
    "stop": "scripts.serve.commands:stop_command",
    "classify": "scripts.classify:main",
    "evaluate": "scripts.evaluate:main",
    "image": "scripts.container.image:main",
    "gateway": "scripts.gateway.commands:start_command",
    "gateway-reload": "scripts.gateway.commands:reload_command",
    "gateway-stop": "scripts.gateway.commands:stop_command",
    "upgrade": "scripts.gateway.commands:upgrade_command",
    "rollback": "scripts.gateway.commands:rollback_command",
}


def program(wanted: str | None = None) -> typer.Typer:
    """Return the app with only the wanted command, or with all if there is no such command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
    # Without a callback, Typer would omit the name of a single command.
    app.callback()(lambda: None)
    for name in [wanted] if wanted in COMMANDS else COMMANDS:
        module, _, function = COMMANDS[name].partition(":")
        app.command(name)(getattr(import_module(module), function))
    return app


if __name__ == "__main__":
    run(program(sys.argv[1] if len(sys.argv) > 1 else None))
