"""A Slurm controller and two nodes on this machine: each has its own network, processes, name, /tmp and /dev/shm."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ADDRESSES = {"ctl": "10.77.0.1", "node1": "10.77.0.11", "node2": "10.77.0.12"}
NODES = ("node1", "node2")
_HERE = Path(__file__).parent
_NAMESPACES = ("--net", "--uts", "--ipc", "--pid", "--mount")


def until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: it does not hold in time.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)


class Cluster:
    """Started with the constructor; `stop` leaves nothing but its directory.

    Args:
        directory: of its files, in which jobs may work as well: all nodes see it.
        shared: what they see besides of /tmp; they see everything that lies elsewhere.
    """

    def __init__(self, directory: Path, *shared: Path) -> None:
        self.directory = directory
        self._shared = [str(path) for path in (directory, *shared)]
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", "spool.node1", "spool.node2"):
            (directory / name).mkdir()
        conf = (_HERE / "slurm.conf").read_text().replace("{directory}", str(directory))
        (directory / "slurm.conf").write_text(conf)
        for name in ADDRESSES:  # a node's own name is a loopback address, as Debian's installer has it
            known = {"127.0.0.1": "localhost", "127.0.1.1": name} | {ADDRESSES[n]: n for n in ADDRESSES if n != name}
            (directory / f"hosts.{name}").write_text("".join(f"{where} {who}\n" for where, who in known.items()))
        (directory / "nsswitch.conf").write_text("hosts: files\npasswd: files\ngroup: files\n")
        (directory / "munge.key").write_bytes(os.urandom(1024))
        (directory / "munge.key").chmod(0o600)
        try:
            for name in ADDRESSES:
                self._boot(name)
            until(lambda: self.on("ctl", "sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 30, "two idle nodes")
        except BaseException:
            self.stop()
            raise

    def start(self, node: str, *command: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """A command on a node, in this process's directory; its output can be read."""
        enter = ["nsenter", "-t", str(self._first_process(node)), *_NAMESPACES, f"--wd={Path.cwd()}", "--"]
        given = os.environ | {"SLURM_CONF": str(self.directory / "slurm.conf")} | (env or {})
        pipe = subprocess.PIPE
        return subprocess.Popen([*enter, *command], env=given, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def on(self, node: str, *command: str, env: dict[str, str] | None = None) -> str:
        """What a command prints on a node.

        Raises:
            RuntimeError: it fails.
        """
        process = self.start(node, *command, env=env)
        printed, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} on {node}: status {process.returncode}\n{printed}")
        return printed

    def submit(self, *words: str, **variables: str) -> str:
        """Id of a new job, submitted from the directory of the repository with these variables."""
        return self.on("ctl", "sbatch", "--parsable", *words, env=variables).strip()

    def state(self, job: str) -> str:
        """Of a job: PENDING, RUNNING, COMPLETED, ..."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """What `scontrol show job` says of a job."""
        words = self.on("ctl", "scontrol", "-o", "show", "job", job).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(f"{name}="))

    def wait(self, job: str, seconds: float, *, states: Sequence[str] = ()) -> str:
        """The state in which a job has ended, or the first of these that it comes to."""
        ends = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.state(job) in ends, seconds, f"job {job}, now {self.state(job)}, to be one of {ends}")
        return self.state(job)

    def processes(self, node: str) -> list[str]:
        """Command lines of what runs on a node besides its own daemons."""
        own = ("bash " + str(_HERE), "sleep 3600", "slurmd", "munged", "slurmctld", "ps ")
        lines = self.on(node, "ps", "-e", "-o", "args=").splitlines()
        return [line for line in lines if not line.startswith(own) and "/slurmd" not in line.split()[0]]

    def check_empty(self) -> None:
        """Assert that jobs have left neither processes nor files of theirs on the nodes."""
        for node in NODES:
            until(lambda node=node: self.processes(node) == [], 10, f"an empty {node}: {self.processes(node)}")
            assert self.on(node, "ls", "/dev/shm") == ""
            own = {path.split("/")[2] for path in self._shared if path.startswith("/tmp/")}
            left = set(self.on(node, "ls", "/tmp").split()) - own
            assert left == set(), f"on {node}, in /tmp: {self.on(node, 'find', *(f'/tmp/{name}' for name in left))}"

    def stop(self) -> None:
        """End the nodes; with the first process of each all others end, and its network and mounts go."""
        for process in self._started.values():
            process.kill()  # unshare takes the node's first process along
        for process in self._started.values():
            process.wait()
        self._started.clear()

    def _first_process(self, node: str) -> int:
        outer = self._started[node].pid
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])

    def _boot(self, name: str) -> None:
        how = ["unshare", *_NAMESPACES, "--propagation", "private", "--fork", "--kill-child", "--mount-proc"]
        init = ["bash", str(_HERE / "node.sh"), name, str(self.directory), *self._shared]
        with (self.directory / f"{name}.log").open("wb") as log:
            self._started[name] = subprocess.Popen(
                [*how, *init], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        ready = self.directory / f"{name}.ready"
        until(lambda: ready.exists() or self._started[name].poll() is not None, 10, f"namespaces of {name}")
        if not ready.exists():
            raise RuntimeError(f"{name}: {(self.directory / f'{name}.log').read_text()}")
        if name == "ctl":
            self._start_controller()
        else:
            self._start_node(name)

    def _start_controller(self) -> None:
        self.on("ctl", "ip", "link", "add", "br0", "type", "bridge")
        self.on("ctl", "ip", "addr", "add", f"{ADDRESSES['ctl']}/24", "dev", "br0")
        self.on("ctl", "ip", "link", "set", "br0", "up")
        place = self.directory
        self.on(
            "ctl",
            "munged",
            "--force",
            f"--key-file={place}/munge.key",
            f"--socket={place}/munge.socket",  # a file, which the nodes reach too
            f"--pid-file={place}/munged.pid",
            f"--log-file={place}/munged.log",
            f"--seed-file={place}/munge.seed",
        )
        self.on("ctl", "slurmctld", "-c")

    def _start_node(self, name: str) -> None:
        """Its end of a cable to the controller's bridge, and slurmd."""
        own, cable = self._first_process(name), f"to-{name}"
        self.on("ctl", "ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0")
        subprocess.run(
            ["nsenter", "-t", str(self._first_process("ctl")), "--net", "ip", "link", "set", "eth0", "netns", str(own)],
            check=True,
        )
        self.on("ctl", "ip", "link", "set", cable, "master", "br0", "up")
        self.on(name, "ip", "addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
        self.on(name, "ip", "link", "set", "eth0", "up")
        self.on(name, "ip", "route", "add", "default", "via", ADDRESSES["ctl"])
        self.on(name, "slurmd", "-c", "-N", name)
