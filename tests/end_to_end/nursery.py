"""Starts training processes in a second: a process that has imported everything forks them.

That process reads tasks as JSON lines: ``{"argv": [...], "ranks": n, "port": p, "folder": where output goes,
"largest_file": bytes or null}``, starts the ranks in its working directory and answers with their process ids; ``{}``
waits for them and answers with their exit codes.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any


class Nursery:
    """The other end: ranks of one run at a time."""

    def __init__(self, workspace: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.end_to_end.nursery"],
            cwd=workspace,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == {"ready": True}

    def start(self, folder: Path, *overrides: str, largest_file: int | None = None) -> list[int]:
        """Start two ranks on small.yaml and return their process ids; ``folder`` gets what they print."""
        from tests.distributed.harness import free_port

        folder.mkdir(exist_ok=True)
        argv = ["--config", "small.yaml", *overrides]
        return list(self._ask(argv=argv, ranks=2, port=free_port(), folder=str(folder), largest_file=largest_file))

    def codes(self) -> list[int]:
        """Wait for the ranks and return their exit codes."""
        return list(self._ask())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)

    def _ask(self, **task: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def text_of(folder: Path) -> str:
    """The end of what all ranks printed."""
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.iterdir()))


def main() -> None:
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    from adamoe_dist import platform

    platform.prepare()
    import adamoe_dist.training.session  # noqa: F401

    children: list[int] = []
    answer({"ready": True})
    for line in sys.stdin:
        task = json.loads(line)
        if task:
            children = [be_born(task, rank) for rank in range(task["ranks"])]
            answer(children)
        else:
            answer([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])


def answer(message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def be_born(task: dict[str, Any], rank: int) -> int:
    child = os.fork()
    if child:
        return child
    os.setsid()
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(Path(task["folder"]) / f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(task["ranks"]),
        WORLD_SIZE=str(task["ranks"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(task["port"]),
    )
    if task["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["largest_file"], resource.RLIM_INFINITY))
    code = 1
    try:
        from adamoe_dist.training import pretrain

        code = pretrain(task["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise AssertionError


if __name__ == "__main__":
    main()
