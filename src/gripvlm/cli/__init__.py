"""The command line: `gripvlm quickstart | ask | train | eval | ...`. Each command calls Python functions."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

import gripvlm
from gripvlm.cli.ask import ask_command
from gripvlm.cli.bench import bench_command
from gripvlm.cli.commands import env_command, evaluate_command, quickstart_command
from gripvlm.cli.demo import demo_command
from gripvlm.cli.listing import list_command
from gripvlm.cli.recommend import recommend_command
from gripvlm.cli.results import report_command
from gripvlm.cli.serving import serve_command
from gripvlm.cli.training import train_command
from gripvlm.cli.vllm import app as vllm_app
from gripvlm.errors import GripError
from gripvlm.utils.terminal import filled

__all__ = ["app", "main"]

app = typer.Typer(
    name="gripvlm",
    epilog="--debug after any command shows the traceback of an error.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(name="quickstart")(quickstart_command)
app.command(name="ask")(ask_command)
app.command(name="eval")(evaluate_command)
app.command(name="report")(report_command)
app.command(name="bench")(bench_command)
app.command(name="train")(train_command)
app.command(name="serve")(serve_command)
app.command(name="demo")(demo_command)
app.add_typer(vllm_app, name="vllm")
app.command(name="list")(list_command)
app.command(name="recommend")(recommend_command)
app.command(name="env")(env_command)

# typer brings its own copy of click or uses the installed one; this is the right class in both.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gripvlm {gripvlm.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Prune the visual tokens of vision-language models: try it, ask, evaluate."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 is success, 2 an error that the user can fix (one paragraph on standard error), 130 Ctrl-C.
    `--debug` anywhere shows the traceback as well.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # by hand: an option of the root would have to stand before the command
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    try:
        # not standalone: click would print errors in its own way and exit
        code = typer.main.get_command(app)(arguments, prog_name="gripvlm", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        print("Stopped.", file=sys.stderr)
        return 130
    except (_UsageError, OSError, GripError, ImportError, MemoryError, RuntimeError) as error:
        # PyTorch has no error class for missing memory on all devices; any other RuntimeError is a bug in gripvlm.
        if isinstance(error, RuntimeError) and "out of memory" not in str(error):
            raise
        if debug:
            traceback.print_exc()
        print(filled(_message(error), start="Error: "), file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def _message(error: Exception) -> str:
    """The message for an error that a user can fix: what is wrong and what to do."""
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "gripvlm"
        message = error.format_message()  # type: ignore[attr-defined]
        option = getattr(error, "option_name", None) or ""
        if command.endswith(" train") and option.startswith("--"):
            from gripvlm.grip.train.config import RENAMED

            if name := RENAMED.get(option[2:].replace("-", "_")):
                message = f"No such option: {option}. It is now --{name.replace('_', '-')}."
        end = "" if message.endswith((".", "!", "?")) else "."
        return f"{message}{end} Type `{command} --help` to see its options."
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, RuntimeError):
        return "the device ran out of memory: type a smaller batch size, or --device cpu"
    return str(error) or type(error).__name__
