"""How every program starts and ends: streams that can show anything, and one way from an error to an exit status.

Imports nothing heavy, so that `--help` and wrong flags answer at once.
"""

import logging
import os
import sys
from collections.abc import Callable

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import DISK_ERRORS

# As grep and diff do it: 1 is an answer ("they differ", "it does not fit", "not learned"), 2 is a mistake.
EXIT_NO = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143  # as a shell says of a process that SIGTERM ended


def run_program(
    work: Callable[[], int | None],
    *,
    out_of_memory_advice: str = "use a smaller batch or a shorter length",
    disk_advice: str = "make room, or name another folder",
    interrupted: str = "interrupted",
    hint: Callable[[], str] = str,
) -> int:
    """Runs a program's work and returns its exit status.

    Args:
        work: parses flags and does the work; None counts as 0. A `SystemExit` of argparse passes.
        out_of_memory_advice: what to do when a device's memory is full.
        disk_advice: what to do when a disk is full or read-only.
        interrupted: what to say after Ctrl-C.
        hint: called after a `UserError`; what it returns is added to the message.

    Returns:
        0; 1 for a negative answer of `work`; 2 for a mistake in what was given (`UserError`), a file that cannot be
        used (`OSError`), or full memory, each told in one line on standard error; 130 after Ctrl-C. Whatever else is
        raised is a fault of ours and passes with its traceback.
    """
    prepare_streams()
    program = os.path.basename(sys.argv[0]) or "python"

    def tell(message: object) -> int:
        print(f"{program}: error: {message}", file=sys.stderr)
        return EXIT_USER_ERROR

    try:
        status = work() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left (head, less); Python would complain again when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        return tell(f"{error}{hint()}")
    except OSError as error:
        return tell(f"{error}; {disk_advice}" if error.errno in DISK_ERRORS else error)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        return tell(f"the memory is full ({error}); {out_of_memory_advice}")
    return status


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was full; torch is looked at only where it has been imported, for it alone raises its class."""
    torch = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def prepare_streams() -> None:
    """Makes standard streams usable whatever they are: closed ones read and write nothing, others never fail on a
    character that their encoding lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - it stays open
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def log_to(stream, level: int = logging.INFO) -> None:
    """Sends this project's log to `stream`: everything on the first process of a run, warnings from the others."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=stream)
    is_first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("finetune_chatmodel_demo").setLevel(level if is_first else logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that an optional package is missing
