"""The command ``shoestring``: one file a verb, imported when the verb is called.

A verb is a module ``shoestring/cli/<verb>.py`` with one typed function ``run``; its docstring is the help text and ends
with examples. It imports what is heavy inside ``run`` and names its options in full (``typer.Option("--room", ...)``:
typer 0.27 takes some metavars for names). Its line in `VERBS` registers it.

Exit codes: 0, 1 for bad input (and for claims that fail), 2 for bad usage, 130 after Ctrl-C. Errors are one line on
stderr; ``--debug`` or ``SHOESTRING_DEBUG=1`` shows the traceback.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from shoestring import __version__
from shoestring.cli import _console

__all__ = ["VERBS", "app", "main"]

# In the order of the help text. Once `list` is imported, the name here means that module: no builtin list in this file.
VERBS = (
    "list",
    "show",
    "cite",
    "info",
    "claim",
    "demo",
    "learn",
    "predict",
    "forget",
    "classify",
    "compress",
    "compare",
    "guide",
)


class Verbs(TyperGroup):
    """The verbs, each loaded at its first use, and the one place that turns errors into a line and an exit code."""

    def list_commands(self, ctx: Any) -> Any:
        return [*VERBS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            if not ctx.resilient_parsing:  # a shell asks for completions
                ctx.fail(f"verb {cmd_name!r} is unknown{_console.did_you_mean(cmd_name, VERBS)}")
            return None
        verb = typer.Typer(add_completion=False, rich_markup_mode=None)
        verb.command(cmd_name)(import_module(f"shoestring.cli.{cmd_name}").run)
        command = typer.main.get_command(verb)
        _console.keep_as_given(command)
        return command

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Run, then exit; `args` are those of the process by default."""
        _console.keep_as_given(self)
        argv = [*(sys.argv[1:] if args is None else args)]
        # Whoever sees an error adds --debug at the end of the line: it counts wherever it stands.
        _console.debug = "--debug" in argv or os.environ.get("SHOESTRING_DEBUG", "0") not in ("", "0")
        argv = [arg for arg in argv if arg != "--debug"]
        if not sys.stderr.isatty():  # a log file wants no bars; `datasets` would draw its own
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that has no "±" or "ö" shows "?"
        try:
            code = super().main(argv, prog_name="shoestring", **extra | {"standalone_mode": False})
            sys.stdout.flush()
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except BrokenPipeError:  # `shoestring list | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            code = 1
        except _console.EXPECTED as error:
            code = getattr(error, "exit_code", 1)
            verb = [arg for arg in argv if arg in VERBS][:1]
            hint = f" (try '{' '.join(['shoestring', *verb, '--help'])}')" if code == 2 else ""
            _console.print_error(error, hint=hint)
        if code == 130:
            print("interrupted", file=sys.stderr)
        raise SystemExit(code or 0)


app = typer.Typer(cls=Verbs, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def shoestring(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; at any place.")] = False,
) -> None:
    """Change or use a trained model without what you do not have.

    \b
    Examples:
      shoestring list --without labels --without gradients
      shoestring show g-acil
      shoestring claim g-acil --fast
    """
    if version:
        typer.echo(f"shoestring {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main() -> None:
    """Entry point of the command."""
    app()
