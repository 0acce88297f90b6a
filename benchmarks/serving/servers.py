"""Starts the servers that benchmarks compare: all up, one awake at a time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from benchmarks.models import kv_cache_space
from benchmarks.serving.configurations import Configuration

ROOT = Path(__file__).parents[2]
SERVED_NAME = "bench"
_LAST_LINES = 25


class ServerError(RuntimeError):
    """A server that did not start, died or answered an error; the message holds the end of its log."""


@dataclass
class Server:
    """A server and its log.

    Attributes:
        leash: The process that kills the server should this one die.
        group: The server's process group.
    """

    configuration: Configuration
    port: int
    leash: subprocess.Popen[bytes]
    group: int
    log: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=900)

    @property
    def name(self) -> str:
        return self.configuration.name

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Lets the server run for one measurement; outside, it is stopped, so that its polling costs others nothing."""
        self.signal(signal.SIGCONT)
        # Let what piled up meanwhile (timers, heartbeats) pass.
        time.sleep(0.3)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to all its processes, those that are left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, number)

    def processes(self) -> list[psutil.Process]:
        """Its processes that are alive."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                if os.getpgid(process.pid) == self.group and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def cpu_seconds(self) -> float:
        """Processor time its processes have used so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())

    def memory(self) -> int:
        """Resident bytes now, summed over its processes."""
        return sum(process.memory_info().rss for process in self.processes())

    def reset_peak(self) -> None:
        """Forgets the peak so far (Linux: proc_pid_clear_refs(5))."""
        for process in self.processes():
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def peak_memory(self) -> int:
        """Largest resident bytes of each of its processes since ``reset_peak``, summed."""
        lines = (Path(f"/proc/{process.pid}/status").read_text() for process in self.processes())
        return sum(1024 * int(text.split("VmHWM:", 1)[1].split(None, 1)[0]) for text in lines)

    def gpu_memory(self) -> int | None:
        """Bytes of device memory that its processes hold; None without an NVIDIA GPU."""
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        try:
            listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
        except (OSError, subprocess.CalledProcessError):
            return None
        mine = {process.pid for process in self.processes()}
        rows = [line.split(",") for line in listed if line.strip()]
        # Containers may hide the memory of single processes.
        known = [int(used) for pid, used in rows if int(pid) in mine and used.strip().isdecimal()]
        return 1024**2 * sum(known) if known else None

    def prompt_tokens(self) -> int:
        """Prompt tokens the engine has counted since it started."""
        metrics = self.client.get("/metrics").text
        lines = [line for line in metrics.splitlines() if line.startswith("vllm:prompt_tokens_total")]
        return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))

    def counters(self, start: int = 0) -> Counter[str]:
        """Sums of the counters in its log from a byte offset on."""
        with open(self.log, "rb") as file:
            file.seek(start)
            # Whole lines: the last one may still be written.
            lines = re.findall(r"TRIMIX rows: (.*)\n", file.read().decode(errors="replace"))
        found: Counter[str] = Counter()
        for line in lines:
            found.update({key: int(value) for key, value in re.findall(r"(\w+)=(\d+)(?= |$)", line)})
        return found

    def log_size(self) -> int:
        """Bytes of its log so far: where what comes next begins."""
        return self.log.stat().st_size

    def check_alive(self) -> None:
        """Raises ServerError, with the end of its log, if the server is gone."""
        if self.leash.poll() is not None:
            raise ServerError(f"{self.name}: the server died (exit status {self.leash.returncode}).\n{self.tail()}")

    def text(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        """The last lines of its log."""
        return f"Last lines of {self.log}:\n" + "\n".join(self.text().splitlines()[-_LAST_LINES:])


def command_line(
    configuration: Configuration, model: Path, *, port: int, max_model_len: int, arguments: Sequence[str]
) -> list[str]:
    """The ``vllm serve`` command of a configuration."""
    command = [
        # The command `vllm`, which need not lie beside the interpreter.
        *(sys.executable, "-m", "vllm.entrypoints.cli.main"),
        "serve",
        str(model),
        f"--served-model-name={SERVED_NAME}",
        "--host=127.0.0.1",
        f"--port={port}",
        f"--max-model-len={max_model_len}",
        "--no-enable-prefix-caching",
        *arguments,
        *configuration.arguments,
    ]
    if configuration.trimix is not None:
        command += ["--attention-backend=TRIMIX", "--additional-config=" + json.dumps({"trimix": configuration.trimix})]
    return command


def choose_port(wanted: int) -> int:
    """``wanted``, or a free port for 0.

    Raises:
        ValueError: The port is in use.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ValueError(
                f"--port: {wanted} can't be used ({error.strerror}); choose another, or 0 for any"
            ) from None
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serve(
    configurations: Sequence[Configuration],
    model: Path,
    directory: Path,
    *,
    max_model_len: int,
    cpus: str = "0",
    arguments: Sequence[str] = (),
    port: int = 0,
    start_timeout: float = 900,
) -> Iterator[list[Server]]:
    """Starts servers side by side, waits until all are healthy, and stops them with the signal of Ctrl-C.

    Args:
        configurations: What to serve.
        model: Checkpoint or bench shape.
        directory: Where their logs go.
        max_model_len: In tokens.
        cpus: Cores of each worker on CPU machines, e.g. ``0``.
        arguments: ``vllm serve`` arguments common to all.
        port: The first server's, the next ones' follow; 0: any free ones.
        start_timeout: Seconds until a server must be healthy.

    Raises:
        ServerError: One didn't start in time, died, or does not run what it was asked to.
    """
    space = kv_cache_space(model, max_model_len, arguments=arguments, engines=len(configurations))
    ports = [choose_port(port + index if port else 0) for index in range(len(configurations))]
    servers: list[Server] = []
    try:
        for configuration, own_port in zip(configurations, ports, strict=True):
            command = command_line(
                configuration, model, port=own_port, max_model_len=max_model_len, arguments=arguments
            )
            servers.append(_start(configuration, command, own_port, directory, cpus=cpus, space=space))
        deadline = time.monotonic() + start_timeout
        for server in servers:
            _wait_until_healthy(server, deadline, start_timeout)
            _check_log(server)
        yield servers
    finally:
        for server in servers:
            server.client.close()
            server.signal(signal.SIGCONT)
            server.signal(signal.SIGINT)
        for server in servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.leash.wait(60)
            server.signal(signal.SIGKILL)
            server.leash.communicate()


def _start(
    configuration: Configuration, command: list[str], port: int, directory: Path, *, cpus: str, space: dict[str, str]
) -> Server:
    log = directory / f"{configuration.name}.log"
    log.write_text(" ".join(command) + "\n")
    env = {"VLLM_CPU_OMP_THREADS_BIND": cpus, **os.environ, **space}
    # So that workers find this package's own worker extensions.
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    if configuration.trimix is None:
        # An allowlist that names no plugin: stock is stock.
        env["VLLM_PLUGINS"] = ""
    leash = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("leash.py")), str(log), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
        start_new_session=True,
    )
    assert leash.stdout is not None
    return Server(configuration, port, leash, int(leash.stdout.readline()), log)


def _wait_until_healthy(server: Server, deadline: float, start_timeout: float) -> None:
    while True:
        server.check_alive()
        with contextlib.suppress(httpx.TransportError):
            if server.client.get("/health", timeout=5).status_code == 200:
                return
        if time.monotonic() > deadline:
            raise ServerError(
                f"{server.name}: the server was not healthy after {start_timeout:.0f} s (--start-timeout).\n"
                f"{server.tail()}"
            )
        time.sleep(0.5)


def _check_log(server: Server) -> None:
    """A figure must be of what it says: stock never loaded the plugin, the others run TRIMIX and what they promise."""
    text = server.text().split("\n", 1)[1]
    if server.configuration.trimix is None:
        wrong = "TRIMIX:" in text or "vllm_trimix." in text
    else:
        wrong = "TRIMIX: layers=" not in text or server.configuration.proof not in text
    if wrong:
        raise ServerError(f"{server.name}: its log does not show what it was asked to run.\n{server.tail()}")
