"""The process of a server that `fill` started: `python -m lift_embedder.fill.child PARENT CONFIG`.

PARENT is the process id of the fill, CONFIG a `ServeConfig` as JSON. The server does not outlive the fill, however
that ends: what it acknowledged is durable, and a server nobody talks to would keep the cache and a GPU for ever.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, config = int(sys.argv[1]), sys.argv[2]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)

    from lift_cache.terminal import ending_in_one_line
    from lift_embedder.config import ServeConfig
    from lift_embedder.server import serve

    # A line for each request of a fill would make a log as long as the captions.
    logging.getLogger("lift_embedder.http").setLevel(logging.WARNING)
    with ending_in_one_line("what was acknowledged is in the cache"):
        serve(ServeConfig.model_validate_json(config))


if __name__ == "__main__":
    main()
