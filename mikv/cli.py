"""What every program of the project does with errors that are the user's to know: one message, no traceback."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quiet() -> None:
    """Call before transformers is imported: its progress bars and advice drown ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextmanager
def explained() -> Iterator[None]:
    """Errors with a message for the user end the program with status 2; MIKV_DEBUG=1 shows the traceback.

    A signal or Ctrl-C: 128 and its number, as shells have it.
    """
    from mikv.batches import OutOfMemory
    from mikv.kernels.verify import KernelsDisagree
    from mikv.models.architecture import Unsupported
    from mikv.models.load import ModelUnavailable
    from mikv.records import RecordError
    from mikv.results import ResultsError
    from mikv.runner import RunError
    from mikv.stopping import Stopped
    from mikv.tasks.data import DataUnavailable

    known = (
        *(ValueError, FileNotFoundError, DataUnavailable, KernelsDisagree, ModelUnavailable, OutOfMemory, RecordError),
        *(ResultsError, RunError, Unsupported),
    )
    try:
        yield
    except known as error:
        if os.environ.get("MIKV_DEBUG"):
            raise
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        raise SystemExit(128 + stopped.number) from stopped
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
