"""The command line: `gripvlm quickstart | ask | train | eval | ...`, thin over the Python of the same names."""

from __future__ import annotations

import sys
import textwrap
import traceback
from collections.abc import Sequence

import typer

from gripvlm.cli.bench import bench_command
from gripvlm.cli.commands import app
from gripvlm.cli.listing import list_command
from gripvlm.cli.results import report_command
from gripvlm.cli.training import train_command
from gripvlm.errors import GripError

__all__ = ["app", "main"]

app.command(name="list")(list_command)
app.command(name="bench")(bench_command)
app.command(name="train")(train_command)
app.command(name="report")(report_command)

# typer brings its own copy of click or uses the installed one; this is the right class in both.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 is success, 2 an error that the user can mend (one paragraph on standard error), 130 Ctrl-C.
    `--debug` anywhere shows the traceback as well.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    try:
        code = typer.main.get_command(app)(arguments, prog_name="gripvlm", standalone_mode=False)
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "gripvlm"
        message = error.format_message()  # type: ignore[attr-defined]
        end = "" if message.endswith((".", "!", "?")) else "."
        return _complain(f"{message}{end} Type `{command} --help` to see what it takes.", debug)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("Stopped.", debug=False, code=130)
    except OSError as error:
        about = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        return _complain(about or type(error).__name__, debug)
    except (GripError, ImportError, MemoryError) as error:
        return _complain(str(error) or type(error).__name__, debug)
    except RuntimeError as error:  # PyTorch's own for memory that runs out
        if "out of memory" not in str(error):
            raise
        return _complain(
            "the device ran out of memory: type a smaller --batch (train: --rows or --images), or --device cpu", debug
        )
    return code if isinstance(code, int) else 0


def _complain(message: str, debug: bool, code: int = 2) -> int:
    """One paragraph on standard error."""
    if debug:
        traceback.print_exc()
    text = " ".join(message.split())
    if code == 2:
        text = f"Error: {text}"
    print(textwrap.fill(text, width=100, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
    return code
