"""What keeps reward code away from the run's other processes: what they were started with, and what is in their memory.

Where the system lets a user make namespaces, the code runs in a user, PID and mount namespace of its own, in which
its own processes are the only ones there are, under the same user and with the same files; a network namespace of its
own has a loopback interface alone. Where it does not, as in containers with Docker's default settings, Landlock keeps
the code from looking into other processes and, from Linux 6.7 on, from TCP, and from 6.12 on, from sending signals; it
still sees the names of processes. A system may have neither.
"""

import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

_LIBC = ctypes.CDLL(None, use_errno=True)
# From linux/sched.h, sys/mount.h, linux/prctl.h and linux/landlock.h; Python 3.11 has none of them.
_NEW_NAMESPACES = 0x10000000 | 0x20000000 | 0x00020000  # CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNS
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_GET_FLAGS, _SET_FLAGS, _IS_UP = 0x8913, 0x8914, 0x1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP
_REC_PRIVATE = 0x4000 | 0x40000
_NOSUID_NODEV_NOEXEC = 0x2 | 0x4 | 0x8
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_REFER, _LANDLOCK_TCP, _LANDLOCK_SCOPE_SIGNAL = 1 << 13, 1 << 0 | 1 << 1, 1 << 1
_READS_ALL_PROCESSES = (19, 21, 38)  # CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON: past Landlock, if root has them
_SETUID_AND_SETGID = 1 << 7 | 1 << 6  # bits of CapEff in /proc/PID/status


class Separation(NamedTuple):
    """How this process is kept apart from others."""

    kind: Literal["namespaces", "landlock", "none"]
    reason: str  # why it is not kept apart better; empty where it is in namespaces
    network: Literal["none", "no TCP", "open"]  # what it has of it


def separate(*, network: bool) -> Separation:
    """Keep this process, which has one thread, away from others as well as the system allows.

    With namespaces it returns in a new process. The one that called stays as its guard: it ends as that one ends, with
    the same status, and when its own parent ends; every process of the namespace ends with it.

    Args:
        network: whether it may use the network. Otherwise it is kept from that too, as far as the system allows.
    """
    parent, flags = os.getppid(), _NEW_NAMESPACES | (0 if network else _NEW_NETWORK)
    try:
        # Tried by another process, since one that has failed halfway could not go back.
        _in_child(lambda: _try_namespaces(flags))
    except OSError as error:
        reason = f"namespaces: {error.strerror}"
    else:
        _enter_namespaces(parent, flags)
        return Separation("namespaces", "", "open" if network else "none")
    try:
        version = landlock_version()
        enter_landlock(version, network=network)
    except OSError as error:
        return Separation("none", f"{reason}, Landlock: {error.strerror}", "open")
    return Separation("landlock", reason, "open" if network or version < 4 else "no TCP")


def landlock_version() -> int:
    """Version of the kernel's Landlock interface. Raises OSError where there is none."""
    return _system_call(_LANDLOCK_CREATE_RULESET, None, 0, 1)


def enter_landlock(version: int, *, network: bool) -> None:
    """Make this process, which has one thread, and its descendants a Landlock domain that restricts no file.

    Without `network` they can listen and connect at no TCP port, from version 4 on.

    Raises:
        OSError: Landlock is too old (version 1 would forbid moving files between directories), or not permitted.
    """
    if version < 2:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    # A domain must restrict something: signals, or before version 6 the moving of files, which a rule then allows.
    files, tcp = 0 if version >= 6 else _LANDLOCK_REFER, 0 if network else _LANDLOCK_TCP
    known = (8 if version < 4 else 16) if version < 6 else 24
    attributes = struct.pack("QQQ", files, tcp, _LANDLOCK_SCOPE_SIGNAL)[:known]
    ruleset = _system_call(_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    if version < 6:
        root = os.open("/", os.O_PATH | os.O_CLOEXEC)
        _system_call(_LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", _LANDLOCK_REFER, root), 0)
        os.close(root)
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))  # for programs that are executed, too
    _system_call(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    _drop_capabilities(_READS_ALL_PROCESSES)


def _drop_capabilities(numbers: tuple[int, ...]) -> None:
    header, words = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    _check(_LIBC.capget(header, words))
    kept = [~sum(1 << number % 32 for number in numbers if number // 32 == half) for half in (0, 1)]
    # Of each half: effective, permitted, inheritable.
    values = [word & kept[place // 3] for place, word in enumerate(struct.unpack("6I", words.raw))]
    _check(_LIBC.capset(header, struct.pack("6I", *values)))


def _enter_namespaces(parent: int, flags: int) -> None:
    """Return in a new process of new namespaces; the caller stays to guard it."""
    _unshare(flags)
    first = os.fork()
    if first == 0:
        _be_first()
    worker = os.fork()
    if worker:
        _guard(worker, first, parent)
    os.setsid()  # a process group that exists in this namespace
    _mount_proc()
    if flags & _NEW_NETWORK:
        _raise_loopback()


def _try_namespaces(flags: int) -> None:
    _unshare(flags)
    _in_child(_mount_proc)
    if flags & _NEW_NETWORK:
        _raise_loopback()


def _raise_loopback() -> None:
    """A new network namespace has its loopback interface down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        name, flags, _ = struct.unpack("16sh22s", fcntl.ioctl(any_socket, _GET_FLAGS, struct.pack("16s24x", b"lo")))
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh22x", name, flags | _IS_UP))


def _unshare(flags: int) -> None:
    """Leave the namespaces of `flags` for new ones; children alone have a new PID namespace."""
    process, (ready, done) = os.getpid(), os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(done)
        os.read(ready, 1)  # until the end of the file: the namespace is there
        _exit_with(lambda: _map_users(process))
    os.close(ready)
    try:
        _check(_LIBC.unshare(flags))
    finally:
        os.close(done)
        _, status = os.waitpid(helper, 0)
    _raise_status(status)


def _map_users(process: int) -> None:
    """Give a process in a new user namespace the users that it had: all of them if we may, else its own."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    capabilities = int(status.partition("CapEff:")[2].split()[0], 16)
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        # Where we may map all of them, root stays able to read the files of others.
        ranges = [(own, 1)]
        if capabilities & _SETUID_AND_SETGID == _SETUID_AND_SETGID:
            lines = Path(f"/proc/self/{kind}_map").read_text(encoding="utf-8").splitlines()
            ranges = [(int(first), int(count)) for first, _, count in map(str.split, lines)]
        elif kind == "gid":
            Path(f"/proc/{process}/setgroups").write_text("deny", encoding="utf-8")  # the kernel asks for it
        text = "".join(f"{first} {first} {count}\n" for first, count in ranges)
        Path(f"/proc/{process}/{kind}_map").write_text(text, encoding="utf-8")


def _mount_proc() -> None:
    """Show this PID namespace in /proc, in our mount namespace alone."""
    _check(_LIBC.mount(b"none", b"/", None, _REC_PRIVATE, None))
    _check(_LIBC.mount(b"proc", b"/proc", b"proc", _NOSUID_NODEV_NOEXEC, None))


def _be_first() -> NoReturn:
    """Process 1 of a PID namespace: orphans become its children, and all others end with it."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    os.closerange(0, 3)
    while True:
        signal.pause()


def _guard(worker: int, first: int, parent: int) -> NoReturn:
    """Wait for the end of `worker`, end its namespace and end alike; end all where our parent has ended."""
    ended = select.poll()
    ended.register(os.pidfd_open(worker), select.POLLIN)
    while not ended.poll(1000):
        if os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)
    _, status = os.waitpid(worker, 0)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _in_child(function: Callable[[], None]) -> None:
    """Run a function in a child process. Raises its OSError."""
    child = os.fork()
    if child == 0:
        _exit_with(function)
    _raise_status(os.waitpid(child, 0)[1])


def _exit_with(function: Callable[[], None]) -> NoReturn:
    """Run a function and end this process with the number of its OSError, or 0."""
    code = errno.EIO  # of any other error
    try:
        function()
        code = 0
    except OSError as error:
        code = error.errno or errno.EIO
    finally:
        os._exit(code)


def _raise_status(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    if code:
        number = code if code > 0 else errno.EIO
        raise OSError(number, os.strerror(number))


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _system_call(number: int, *arguments: int | bytes | None) -> int:
    """A system call without a function in the C library. Raises OSError."""
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _check(_LIBC.syscall(ctypes.c_long(number), *values))
