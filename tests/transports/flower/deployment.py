"""A SuperLink and SuperNodes as processes of this machine, over loopback, ended with the test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep


class Deployment:
    """Use it as a context manager; every process is the leader of a group of its own."""

    def __init__(self, home: Path, nodes: int, configs: Sequence[str] = ()) -> None:
        self.home, self.nodes = home, nodes
        self.configs = configs or [f"partition-id={i} num-partitions={nodes}" for i in range(nodes)]
        self.processes: dict[str, subprocess.Popen] = {}
        self.port, *self.ports = free_ports(nodes + 1)
        self.bin = Path(sys.executable).parent
        repository = Path(__file__).parents[3]
        paths = [str(repository / part) for part in ("", "kernels", "theory")]
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(home / "flwr"),
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "FLWR_TELEMETRY_ENABLED": "0",
        }

    def __enter__(self) -> Deployment:
        folder = self.home / "flwr"
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(
            '[superlink]\ndefault = "loopback"\n\n'
            f'[superlink.loopback]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        try:
            self.spawn(
                "superlink",
                "flower-superlink --insecure --disable-runtime-dependency-installation "
                f"--host 127.0.0.1 --port {self.port}",
            )
            self.wait_for_superlink()
            for i, port in enumerate(self.ports):
                self.spawn(
                    f"supernode-{i}",
                    f"flower-supernode --insecure --superlink 127.0.0.1:{self.port} --port {port}",
                    "--node-config",
                    self.configs[i],
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self.processes)):
            self.kill(name)

    def spawn(self, name: str, command: str, *further: str) -> subprocess.Popen:
        program, *rest = command.split()
        with open(self.home / f"{name}.log", "w") as log:
            self.processes[name] = subprocess.Popen(
                [str(self.bin / program), *rest, *further],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        return self.processes[name]

    def wait_for_superlink(self, seconds: float = 120.0) -> None:
        end = monotonic() + seconds
        while True:
            assert self.processes["superlink"].poll() is None, self.log("superlink")
            assert monotonic() < end, self.log("superlink")
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            sleep(0.2)

    def kill(self, name: str) -> None:
        """End a process and its children at once, as a machine that loses its power."""
        process = self.processes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text()


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports
