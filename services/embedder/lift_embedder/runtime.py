"""What has to hold in a process before an engine is imported there.

The vLLM engine lives in a child that Python spawns: it inherits the environment and re-imports the main
module, nothing else. So what the child must know travels in one environment variable that `join_parent` reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import signal
import sys

CHILD_VARIABLE = "LIFT_ENGINE_CHILD"
"""`<pid of the server>:<modules that do not load, comma-separated>`."""

BESIDE_TORCH = ("torchvision", "torchaudio", "torchcodec")
"""Wheels that transformers imports whenever it finds them, and that need exactly the torch they were built for."""

PR_SET_PDEATHSIG = 1


def shield_imports() -> tuple[str, ...]:
    """Hide the modules of `BESIDE_TORCH` that are installed but do not load beside this torch.

    Without this, `import vllm` fails with "operator torchvision::nms does not exist" on machines where a
    torchvision for another torch is installed. Call before transformers or vllm is imported.
    """
    hidden = []
    for name in BESIDE_TORCH:
        if name in sys.modules or importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception:
            hidden.append(name)
    _hide(hidden)
    return tuple(hidden)


def prepare_for_engine() -> None:
    """Set up this process and, through the environment, the engine's child. Call before vllm is imported.

    Variables that the user has set are left as they are.
    """
    hidden = shield_imports()
    os.environ[CHILD_VARIABLE] = f"{os.getpid()}:{','.join(hidden)}"
    for name, value in {
        "HF_HUB_OFFLINE": "1",  # models are resolved to a local folder before an engine starts
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # on a CPU, otherwise the core gets yet another child
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; pooling keeps no context between requests
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinning to "all but one" core starves a small machine
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "true",
    }.items():
        os.environ.setdefault(name, value)


def join_parent() -> None:
    """In the engine's child: die with the server, ignore its terminal, hide what does not load.

    A server killed with SIGKILL cannot stop its child, which would keep its memory and its GPU for ever. A
    session of its own keeps Ctrl-C in the server's terminal from killing the engine while the server drains.
    """
    server, _, hidden = os.environ.get(CHILD_VARIABLE, "").partition(":")
    if not server or int(server) == os.getpid():
        return
    _hide([name for name in hidden.split(",") if name])
    if "multiprocessing.spawn" not in sys.modules or os.getppid() != int(server):
        return  # a helper of the server's that is not its engine
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(server):  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.setsid()


def _hide(names: list[str]) -> None:
    for name in names:
        # None makes `import name` raise ImportError, and find_spec say that it is not there.
        sys.modules[name] = None  # type: ignore[assignment]
