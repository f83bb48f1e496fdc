"""Processes, mounts, page cache and memory, for benchmarks of whole scenarios."""

import contextlib
import ctypes
import http.client
import mmap
import os
import shutil
import socket
import subprocess
import tempfile
import threading

HERE = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
BIN = os.environ.get("BIN", f"{HERE}/target/release")
MIB = 1 << 20
LIMIT = 300  # seconds that anything may take

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


class Failed(Exception):
    """The bench can not go on."""


class Late(Failed):
    """A row took longer than it may; the others go on."""


def mount(source, target, kind, options=""):
    if libc.mount(source.encode(), target.encode(), kind.encode(), 0, options.encode()) != 0:
        raise Failed(f"mount {target}: {os.strerror(ctypes.get_errno())}")


def unmount(target):
    libc.umount2(target.encode(), 2)  # MNT_DETACH; not mounted is fine


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False, **options)
    if done.returncode != 0:
        raise Failed(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def process(command, **options):
    """A process that does not outlive the block."""
    child = subprocess.Popen(command, **options)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextlib.contextmanager
def directory(parent):
    path = tempfile.mkdtemp(dir=parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def overlay(lower, scratch):
    for name in ("upper", "work", "merged"):
        os.makedirs(f"{scratch}/{name}", exist_ok=True)
    merged = f"{scratch}/merged"
    mount("overlay", merged, "overlay", f"lowerdir={lower},upperdir={scratch}/upper,workdir={scratch}/work")
    try:
        yield merged
    finally:
        unmount(merged)


def forget_pages(path):
    """Takes a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


class Memory(threading.Thread):
    """Watches RssAnon + RssShmem of a process; `most` in KiB."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.most, self.done = pid, 0, threading.Event()
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while not self.done.wait(0.02):
                with open(f"/proc/{self.pid}/status", encoding="utf-8") as file:
                    lines = [line.split() for line in file if line.startswith(("RssAnon", "RssShmem"))]
                self.most = max(self.most, sum(int(words[1]) for words in lines))


def hash_seconds(socket_path):
    """CPU time that the daemon with this API socket has verified chunks for."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection):
        connection.sock.connect(socket_path)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if "cpu_seconds" in line and 'work="verify"' in line)


def read_all(root, limit=LIMIT):
    """tar of the whole tree; not straight to /dev/null, where GNU tar would read nothing."""
    with process(["tar", "-C", root, "--one-file-system", "-cf", "-", "."], stdout=subprocess.PIPE) as child:
        timer = threading.Timer(limit, child.kill)
        timer.daemon = True
        timer.start()
        while child.stdout.read(MIB):
            pass
        timer.cancel()
        if child.wait() != 0:
            raise Late(f"tar ended with {child.returncode} within {limit} s")


def cached_pages(root):
    """What is in the page cache of the mount at `root`: a line `OFFSET LENGTH PATH` each."""
    page = mmap.PAGESIZE
    lines = []
    for parent, _, names in os.walk(root):
        for name in names:
            path = os.path.join(parent, name)
            status = os.lstat(path)
            if not os.path.isfile(path) or os.path.islink(path) or status.st_size == 0:
                continue
            descriptor = os.open(path, os.O_RDONLY)
            pages = (status.st_size + page - 1) // page
            address = libc.mmap(None, status.st_size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
            os.close(descriptor)
            found = ctypes.create_string_buffer(pages)
            if libc.mincore(address, status.st_size, found) != 0:
                raise Failed(f"mincore {path}: {os.strerror(ctypes.get_errno())}")
            libc.munmap(address, status.st_size)
            inside = os.path.relpath(path, root)
            for number, present in enumerate(found.raw[:pages]):
                if present & 1:
                    lines.append(f"{number * page} {min(page, status.st_size - number * page)} {inside}")
    return "".join(line + "\n" for line in lines)
