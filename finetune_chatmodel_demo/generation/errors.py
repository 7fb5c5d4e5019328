"""How inference.py and evaluate.py end: 0, or 2 and one line for a mistake in what was given, or 130 after Ctrl-C."""

import os
import sys
from collections.abc import Callable

from finetune_chatmodel_demo.common.errors import UserError

EXIT_USAGE = 2
EXIT_BROKEN_PIPE = 1
EXIT_INTERRUPTED = 130


UsageError = UserError


def run_and_explain(action: Callable[[], None], *, out_of_memory_advice: str) -> int:
    """Run an entry point's work; turn what a user can mend into one line on standard error.

    Args:
        action: the work. Its OSErrors and ValueErrors say what, where and what to do.
        out_of_memory_advice: what to do when the GPU's memory is full.

    Returns:
        The exit code. Every other exception is a fault of ours, and passes with its traceback.
    """
    try:
        action()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left; Python would complain again when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(f"error: the GPU's memory is full ({error}); {out_of_memory_advice}", file=sys.stderr)
        return EXIT_USAGE
    return 0
