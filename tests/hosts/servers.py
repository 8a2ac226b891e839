"""The web servers: which there are in a Debian root, their configuration, start, stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import processes

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
PYTHONS = str(CHECKOUT / "tools" / "pythons")
PROCESSES, THREADS = 2, 8


@dataclass(frozen=True)
class Suite:
    """A Debian root with web servers, and the CPython that they embed."""

    name: str  # as on the command line
    root: str  # a name of tools/pythons
    python: str  # the name that anyfork is built for

    def run(self, *command: str, timeout: float = 60) -> str:
        done = subprocess.run(
            [PYTHONS, "run", self.root, "--", *command],
            capture_output=True, text=True, timeout=timeout, check=True,
        )  # fmt: skip
        return done.stdout


# Debian sid's mod_wsgi comes for two minor versions.
SUITES = (
    Suite("trixie", "wsgi-trixie", "wsgi-trixie"),
    Suite("forky", "wsgi-forky", "wsgi-forky"),
    Suite("sid", "wsgi-sid", "wsgi-sid"),
    Suite("sid-3.15", "wsgi-sid", "3.15"),
)


def states() -> dict[str, dict[str, str]]:
    done = subprocess.run([PYTHONS, "list", "--json"], capture_output=True, text=True, check=True)
    return {row["name"]: row for row in json.loads(done.stdout)}


def build(suite: Suite) -> str:
    """anyfork's package for the suite's CPython: the folder that holds it."""
    done = subprocess.run(
        [str(CHECKOUT / "tools" / "build"), suite.python, "--tag", "hosts"],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"tools/build {suite.python} failed:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Unavailable(Exception):
    """This server cannot be had for this CPython, and why."""


class Server:
    """One server, from its configuration to its last process."""

    name = ""
    log_name = "server.log"
    processes = PROCESSES
    exit_code = 0  # after SIGTERM
    # Operations that cannot work under it, and why.
    without: Mapping[str, str] = {}
    # What it says at its end without anyfork as well.
    own_words: tuple[str, ...] = ()

    def __init__(self, suite: Suite, version: str, site: str) -> None:
        self.suite = suite
        self.minor = ".".join(version.split(".")[:2])
        self.module = self.find_module()
        self.port = free_port()
        self.token = f"{os.getpid()}-{self.port}"
        # Copies in a folder that the server's user can read, wherever the checkout is.
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-"))
        self.folder.chmod(0o755)
        shutil.copytree(site, self.folder / "site")
        shutil.copytree(HERE / "app", self.folder / "app")
        self.run_folder = self.folder / "run"
        self.run_folder.mkdir(mode=0o755)
        self.log_path = self.folder / self.log_name
        self.process: subprocess.Popen[bytes] | None = None

    # -- what differs between servers
    def find_module(self) -> str:
        raise NotImplementedError

    def command(self) -> list[str]:
        raise NotImplementedError

    def daemons(self) -> list[int]:
        """The processes that run the application."""
        raise NotImplementedError

    # -- what does not
    def _present(self, path: str) -> bool:
        try:
            self.suite.run("test", "-e", path)
        except subprocess.CalledProcessError:
            return False
        return True

    def start(self) -> None:
        output = (self.folder / "output.log").open("wb")
        with output:
            self.process = subprocess.Popen(
                [PYTHONS, "run", self.suite.root, "--", *self.command()],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={**os.environ, processes.TOKEN: self.token}, start_new_session=True,
            )  # fmt: skip

    def answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log()}")
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self, seconds: float) -> bool:
        """Ask the server to stop; whether it did, and no process is left."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return processes.wait_until(lambda: not processes.of_server(self.token), seconds)

    def dies_anyway(self) -> str:
        """Why this version of the host crashes at its end, without anyfork as well."""
        return ""

    def log(self) -> str:
        """Everything the server and its processes said, without the paths of this run."""
        text = ""
        for path in {self.log_path, self.folder / "output.log"}:
            if path.exists():
                text += path.read_text(errors="replace")
        return text.replace(str(self.folder), "").replace(str(CHECKOUT), "")

    def clean(self, *, keep: bool) -> None:
        processes.kill_all(self.token)
        if self.process is not None:
            self.process.wait()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)


class Apache(Server):
    """mod_wsgi in daemon mode, an application group of its own per script."""

    name = "apache"
    # Its handler is C and survives a fork: exit(-1) in any process but the daemon
    # itself (mod_wsgi.c, wsgi_signal_handler).

    def find_module(self) -> str:
        path = f"/usr/lib/apache2/modules/mod_wsgi.so-{self.minor}"
        if not self._present(path):
            raise Unavailable(f"{self.suite.root} has no mod_wsgi for {self.minor}")
        return path

    def command(self) -> list[str]:
        f = self.folder
        config = f / "apache.conf"
        modules = "/usr/lib/apache2/modules"
        config.write_text(
            textwrap.dedent(f"""\
                ServerRoot {f}
                ServerName 127.0.0.1
                DefaultRuntimeDir {self.run_folder}
                PidFile {self.run_folder}/pid
                Listen 127.0.0.1:{self.port}
                User www-data
                Group www-data
                ErrorLog {self.log_path}
                LoadModule mpm_event_module {modules}/mod_mpm_event.so
                LoadModule authz_core_module {modules}/mod_authz_core.so
                LoadModule wsgi_module {self.module}
                StartServers 2
                ThreadsPerChild 64
                MaxRequestWorkers 256
                WSGISocketPrefix {self.run_folder}/wsgi
                WSGIRestrictEmbedded On
                WSGIDaemonProcess hosted processes={PROCESSES} threads={THREADS} \\
                    display-name=(wsgi:hosted) python-path={f}/site:{f}/app
                WSGIProcessGroup hosted
                WSGIScriptAlias /app {f}/app/installed.wsgi application-group=app
                WSGIScriptAlias /strict {f}/app/strict.wsgi application-group=strict
                <Directory {f}/app>
                    Require all granted
                </Directory>
            """)
        )
        return ["apache2", "-f", str(config), "-D", "FOREGROUND"]

    def daemons(self) -> list[int]:
        assert self.process is not None
        return sorted(
            p.pid
            for p in processes.of_server(self.token).values()
            # The display name, cut to the length of the first word of the command line.
            if p.ppid == self.process.pid and p.command.startswith("(wsgi:")
        )


class Uwsgi(Server):
    """Several applications, an interpreter each; the first one's is main."""

    name = "uwsgi"
    options = ("master = true", f"processes = {PROCESSES}")
    # It finalizes Python with its sub-interpreters alive.
    own_words = ("RuntimeWarning: remaining subinterpreters",)

    def find_module(self) -> str:
        plugin = f"python{self.minor.replace('.', '')}"
        if not self._present(f"/usr/lib/uwsgi/plugins/{plugin}_plugin.so"):
            raise Unavailable(f"{self.suite.root} has no uWSGI plugin for {self.minor}")
        return plugin

    def command(self) -> list[str]:
        f = self.folder
        config = f / "uwsgi.ini"
        lines = [
            "[uwsgi]",
            f"plugin = {self.module}",
            f"http-socket = 127.0.0.1:{self.port}",
            "uid = www-data",
            "gid = www-data",
            f"threads = {THREADS}",
            "enable-threads = true",
            "need-app = true",
            "die-on-term = true",
            "disable-logging = true",
            "manage-script-name = true",
            f"pythonpath = {f}/site",
            f"pythonpath = {f}/app",
            f"mount = /main={f}/app/main.wsgi",
            f"mount = /app={f}/app/installed.wsgi",
            f"mount = /strict={f}/app/strict.wsgi",
            *self.options,
        ]
        config.write_text("\n".join(lines) + "\n")
        return ["uwsgi-core", "--ini", str(config)]

    def daemons(self) -> list[int]:
        assert self.process is not None
        mine = processes.of_server(self.token).values()
        return sorted(
            p.pid
            for p in mine
            if p.state != "Z" and p.command.startswith("uwsgi-core") and p.ppid == self.process.pid
        )


    def dies_anyway(self) -> str:
        # Seen with an application of three lines that had answered some requests.
        if self.minor == "3.13":
            return "uWSGI 2.0.28 aborts at its end: Py_EndInterpreter: not the last thread"
        return ""


class UwsgiLazy(Uwsgi):
    """Each worker process loads the applications itself."""

    name = "uwsgi-lazy"
    options = (*Uwsgi.options, "lazy-apps = true")


class UwsgiAlone(Uwsgi):
    """One process, no master."""

    name = "uwsgi-alone"
    options = ("master = false",)
    processes = 1
    exit_code = 30  # UWSGI_END_CODE of its uwsgi.h

    def daemons(self) -> list[int]:
        assert self.process is not None
        return [self.process.pid]


SERVERS: tuple[type[Server], ...] = (Apache, Uwsgi, UwsgiLazy, UwsgiAlone)
