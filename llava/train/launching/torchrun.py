"""torchrun, ending with the exit code of the rank that failed first, where torchrun itself always ends with 1."""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: list[str]) -> int:
    """Start the processes that torchrun's arguments describe.

    Returns:
        0, or the exit code of the rank that failed first; 128 and the signal's number if a signal ended it.
    """
    try:
        run.main(argv)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
