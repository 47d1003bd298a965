"""Running programs that a model wrote: apart, without a network, within limits.

The program runs in a process of its own, in an empty folder, with a clean environment. Walls, from
strong to weak:

1. where the kernel lets us: new user, network, IPC and mount name spaces (no network interface at all),
   and, when we are root, the user `nobody`;
2. resource limits: CPU seconds, memory, file size, open files, no new processes, no core files; a
   wall-clock limit after which the whole process group is killed;
3. inside Python: an audit hook that refuses sockets, processes, signals, foreign functions, and files
   outside the folder and Python's own library.

The third wall stands everywhere but is made of Python; the first may be missing (in some containers).
`capabilities` says which walls stand, and every result made with the sandbox records it.

A test counts as passed only if the program ran to its end and the tests after it did not fail: exiting
early, however politely, is a failure. What this is not: a jail for someone who attacks Python's own
frames to fake a pass. It protects the machine; a faked pass would only fool the model's own score.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

MEMORY_BYTES = 1 << 29
FILE_BYTES = 1 << 20
CPU_S = 8
WALL_S = 12.0
_OUTPUT_BYTES = 4096

# Runs in the child before the program. It is text, so that the child loads nothing of ours.
_CHILD = r"""
import sys
def _start():
    import builtins, os, resource
    config = eval(sys.stdin.readline(), {"__builtins__": {}})
    nonce, memory, file_bytes, cpu, drop, folder = config
    program = sys.stdin.read()
    walls = []
    # What ordinary programs import is loaded now: `nobody` may not be able to read Python's library.
    for name in (
        "abc array base64 binascii bisect calendar cmath collections collections.abc contextlib copy csv dataclasses "
        "datetime decimal difflib enum fractions functools hashlib heapq hmac io itertools json keyword math numbers "
        "operator os.path pprint queue random re secrets statistics string struct textwrap time traceback types "
        "typing unicodedata unittest uuid warnings zlib encodings.idna encodings.ascii encodings.latin_1"
    ).split():
        __import__(name)
    try:
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        new_user, new_net, new_ipc, new_mount = 0x10000000, 0x40000000, 0x08000000, 0x00020000
        flags = new_net | new_ipc | new_mount
        if libc.unshare(flags if os.geteuid() == 0 else flags | new_user) == 0:
            walls.append("namespaces")
        # No more privileges through set-uid programs.
        if libc.prctl(38, 1, 0, 0, 0) == 0:
            walls.append("no-new-privileges")
    except Exception:
        pass
    limits = [
        (resource.RLIMIT_CPU, (cpu, cpu + 1)), (resource.RLIMIT_FSIZE, (file_bytes,) * 2),
        (resource.RLIMIT_CORE, (0, 0)), (resource.RLIMIT_NOFILE, (32, 32)), (resource.RLIMIT_AS, (memory,) * 2),
    ]
    if drop:
        try:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
            walls.append("nobody")
        except OSError:
            pass
    os.chdir(folder)
    limits.append((resource.RLIMIT_NPROC, (0, 0)))
    for which, value in limits:
        resource.setrlimit(which, value)
    walls.append("limits")
    for name in list(sys.modules):
        if name.startswith(("ctypes", "_ctypes")):
            del sys.modules[name]
    readable = tuple({os.path.realpath(p) for p in sys.path if p} | {os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)})
    home = os.path.realpath(folder)
    def watch(
        event, arguments, *, refused=(
            "socket.", "subprocess.", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system",
            "os.kill", "os.killpg", "pty.", "ctypes.", "sys.addaudithook", "sys.setprofile", "sys.settrace",
            "gc.get_", "code.__new__", "os.chmod", "os.chown", "os.link", "os.symlink", "os.putenv", "os.unsetenv",
            "os.setxattr", "resource.", "shutil.", "mmap.", "http.", "urllib.", "ftplib.", "smtplib.", "telnetlib.",
            "webbrowser.", "_winapi.", "os.chdir", "os.chroot", "os.mount", "signal.", "fcntl.", "syslog.", "cpython.run",
            "_thread.start_new_thread", "sqlite3.",
        ), paths=("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.listdir", "os.scandir", "os.utime"),
        modules=("ctypes", "_ctypes", "cffi", "_posixsubprocess", "multiprocessing", "_multiprocessing", "gdb"),
        readable=readable, home=home, real=os.path.realpath, text=str, kind=isinstance, fspath=os.fspath, error=PermissionError,
        integer=int, writing=os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, bytes_=bytes,
    ):
        if event.startswith(refused):
            raise error(event + " is not allowed here")
        if event == "import" and text(arguments[0]).split(".")[0] in modules:
            raise error("import of " + text(arguments[0]) + " is not allowed here")
        if event == "open" or event in paths:
            path = arguments[0]
            if path is None or kind(path, integer):
                if event == "open":
                    return
                path = "."
            if kind(path, bytes_):
                path = path.decode("utf-8", "surrogateescape")
            place = real(fspath(path))
            if place == home or place.startswith(home + "/"):
                return
            flags = arguments[2] if event == "open" and kind(arguments[2], integer) else writing
            if flags & writing or not any(place == r or place.startswith(r + "/") for r in readable):
                raise error(event + " of " + text(place) + " is not allowed here")
    report = os.fdopen(3, "w")
    report.write("started " + ",".join(walls) + "\n")
    report.flush()
    sys.addaudithook(watch)
    return program, nonce, report, builtins
_program, _nonce, _report, _builtins = _start()
del _start
def _main(program, nonce, report, builtins, compiled=compile, execute=exec, exit_=__import__("os")._exit):
    space = {"__name__": "__main__", "__builtins__": builtins}
    try:
        execute(compiled(program, "<program>", "exec"), space)
    except SystemExit:
        report.write("failed the program ended early (SystemExit)\n")
    except BaseException as problem:
        report.write("failed " + type(problem).__name__ + ": " + str(problem)[:300].replace("\n", " ") + "\n")
    else:
        report.write("passed " + nonce + "\n")
    report.flush()
    exit_(0)
_arguments = (_program, _nonce, _report, _builtins)
del _program, _nonce, _report, _builtins
_main(*_arguments)
"""


@dataclass(frozen=True)
class Run:
    """What became of a program. reason: "" when it passed, else in a few words why not."""

    passed: bool
    reason: str
    walls: tuple[str, ...]


def run(program: str, tests: str = "", *, wall_s: float = WALL_S, memory_bytes: int = MEMORY_BYTES) -> Run:
    """Run `program` and then `tests` in one name space; passed when both end without an error."""
    nonce = secrets.token_hex(16)
    drop = os.geteuid() == 0
    with tempfile.TemporaryDirectory(prefix="phi-sandbox-") as folder:
        if drop:
            os.chmod(folder, 0o777)
        config = (nonce, memory_bytes, FILE_BYTES, CPU_S, drop, folder)
        reader, writer = os.pipe()
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _move_to_3(writer) + _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writer,),
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        os.close(writer)
        timed_out = False
        try:
            text = f"{config!r}\n{program}\n\n{tests}\n".encode("utf-8", "replace")
            child.communicate(text, timeout=wall_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            # The whole group: whatever the program started goes with it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        with os.fdopen(reader, "rb") as file:
            os.set_blocking(file.fileno(), False)
            said = (file.read(_OUTPUT_BYTES) or b"").decode("utf-8", "replace").splitlines()
        _empty(Path(folder))
    walls = (
        tuple(said[0].removeprefix("started ").split(",")) if said and said[0].startswith("started ") else ()
    )
    if timed_out:
        return Run(False, f"stopped after {wall_s:g} s", walls)
    last = said[-1] if said else ""
    if last == f"passed {nonce}":
        return Run(True, "", walls)
    if last.startswith("failed "):
        return Run(False, last.removeprefix("failed "), walls)
    code = child.returncode
    return Run(False, f"ended by signal {-code}" if code < 0 else "the program ended early", walls)


@functools.cache
def capabilities() -> str:
    """Which walls stand on this machine: "namespaces, no-new-privileges, nobody, limits, audit hook"."""
    found = run("pass")
    return ", ".join([*found.walls, "audit hook"])


def _move_to_3(descriptor: int) -> str:
    """The child expects its report pipe at descriptor 3, and no other descriptor."""
    if descriptor == 3:
        return ""
    return f"import os; os.dup2({descriptor}, 3); os.close({descriptor}); del os\n"


def _empty(folder: Path) -> None:
    """Make what the program left deletable."""
    for root, folders, _ in os.walk(folder):
        for name in folders:
            with contextlib.suppress(OSError):
                os.chmod(Path(root) / name, 0o700)
