"""Python programs of tests as forks of one process that has imported torch and every paper: seconds
sooner than a fresh interpreter, which `tests.conftest.python` starts."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

import horkd.train  # noqa: F401

SECONDS = 300


def forked(*arguments: str) -> subprocess.CompletedProcess:
    """What `python -c CODE ARGUMENTS` or `python -m MODULE ARGUMENTS` ends in, on one thread.

    A code below 0: the signal that ended it.
    """
    (done,) = _run([{}], arguments)
    return done


def ranks(number: int, *arguments: str) -> list[subprocess.CompletedProcess]:
    """So many of them, told what torchrun tells its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number),
              "LOCAL_WORLD_SIZE": str(number)}  # fmt: skip
    return _run([common | {"RANK": str(k), "LOCAL_RANK": str(k)} for k in range(number)], arguments)


def _run(
    environments: list[dict[str, str]], arguments: tuple[str, ...]
) -> list[subprocess.CompletedProcess]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    end = time.monotonic() + SECONDS
    with tempfile.TemporaryDirectory() as told:
        started: list[ForkServerProcess] = []
        paths = [Path(told, str(k)) for k in range(len(environments))]
        try:
            for path, environment in zip(paths, environments, strict=True):
                process = context.Process(target=_child, args=(path, environment, arguments))
                process.start()
                started.append(process)
            for process in started:
                process.join(max(0.0, end - time.monotonic()))
                if process.is_alive():
                    raise subprocess.TimeoutExpired(arguments, SECONDS)
        finally:
            for process in started:
                process.kill()
        return [
            subprocess.CompletedProcess(
                arguments, process.exitcode or 0,
                path.with_suffix(".out").read_text(), path.with_suffix(".err").read_text(),
            )
            for process, path in zip(started, paths, strict=True)
        ]  # fmt: skip


def _child(path: Path, environment: dict[str, str], arguments: tuple[str, ...]) -> None:
    for stream, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(path.with_suffix(suffix), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    os.environ.update(environment)
    torch.set_num_threads(1)
    kind, what, *rest = arguments
    sys.argv = ["-c", *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<code>", "exec"), {"__name__": "__main__"})
