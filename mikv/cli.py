"""What every program of the project does with errors that are the user's to know: one message, no traceback."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mikv.stopping import Stopped


def quiet() -> None:
    """Call before transformers is imported: its progress bars and advice drown ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextmanager
def explained() -> Iterator[None]:
    """Errors with a message for the user end the program with status 2; MIKV_DEBUG=1 shows the traceback.

    Those are all that this project defines, and what Python says of wrong values and missing files. A signal or Ctrl-C: 128 and
    its number, as shells have it.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        raise SystemExit(128 + stopped.number) from stopped
    except Exception as error:
        # by name: the modules that define them load torch, and a slip is answered before that
        ours = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
        if not (ours or isinstance(error, ValueError | FileNotFoundError)) or os.environ.get("MIKV_DEBUG"):
            raise
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(2) from error
