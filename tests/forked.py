"""Scripts in processes of their own that need not import first: they are forked from one that has imported.

What a script changes in classes, registries and the environment ends with its process. What is read while
modules are imported cannot be set by a script's environment: it is that of the process that imported.
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["run"]


def run(script: str, imports: str, paths: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script after some imports.

    Args:
        script: what to run, as ``__main__``.
        imports: what has run before it, once for all scripts with these imports and paths.
        paths: PYTHONPATH; the working folder is not on the path.
        environment: variables that the script finds.
    """
    server = _server(imports, os.pathsep.join(paths))
    with tempfile.TemporaryDirectory() as folder:
        try:
            code = _ask(server, {"script": script, "environment": environment, "folder": folder})
        except BaseException:
            # A test's time is over, say: another script would get this one's answer.
            _end(server)
            _server.cache_clear()
            raise
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess([script], code, out, err)


def _ask(server: subprocess.Popen[str], request: dict[str, Any]) -> int:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        raise RuntimeError("the process that imports has ended; what it wrote is among the tests' output")
    return int(answer)


@functools.cache
def _server(imports: str, paths: str) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, imports],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    """End it, and the script that it runs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


def _serve(imports: str) -> None:
    answers, requests = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    os.dup2(2, 1)  # what imports print is not an answer, and what scripts read no request
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(imports, names)
    for line in requests:
        child = os.fork()
        if child == 0:
            _run(json.loads(line), names)
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def _run(request: dict[str, Any], names: dict[str, Any]) -> None:
    """In the child: run a script to the end of its process."""
    os.environ.update(request["environment"])
    for name, descriptor in (("out", 1), ("err", 2)):
        with (Path(request["folder"]) / name).open("w") as file:
            os.dup2(file.fileno(), descriptor)
    code = 0
    try:
        sys.modules["__main__"].__dict__.update(names)
        exec(compile(request["script"], "script", "exec"), sys.modules["__main__"].__dict__)
    except BaseException as error:  # noqa: BLE001 - whatever ends a script, SystemExit too, as Python shows it
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
