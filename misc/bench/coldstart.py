#!/usr/bin/env python3
"""coldstart.py: seconds from the start of nydusd until a program in a real image has answered.

A registry (docker-registry) on this machine, and a link between it and the daemon that adds a round
trip and caps the bandwidth (`link-relay`, tests/support/link.rs). Medians of RUNS; root; an idle machine.

  BIN      directory of the binaries (target/release)
  RUNS     repetitions (5)
  IMAGES   images of misc/images/make-images (python,node)
  LINKS    round trip in ms / Mbit/s (10/1000,50/200)
  ROWS     some rows only, by their first word (all)
  RESULT   file that gets every number as JSON (none)
  LINKLOG  directory that gets a line for every request (none)

L is the program's time with all data local and the page cache warm, B the stored bytes of the chunks that
the start touches over the link's rate (pages that the program faults in, with the kernel's readahead off), R
the round trip. Bounds: without a trace k (L + B) + n R, k = 1.25 at 10 ms and 1.35 at 50 ms, n = 6 (node: 20,
its imports depend on one another); with one 1.1 and 1.15, n = 4; never above 1.05 x the parallel pull.
"""

import contextlib
import ctypes
import json
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request

HERE = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
BIN = os.environ.get("BIN", f"{HERE}/target/release")
RUNS = int(os.environ.get("RUNS", "5"))
IMAGES = os.environ.get("IMAGES", "python,node").split(",")
LINKS = [tuple(map(float, link.split("/"))) for link in os.environ.get("LINKS", "10/1000,50/200").split(",")]
ROWS = os.environ.get("ROWS", "").split(",") if os.environ.get("ROWS") else None
LOCAL_RUNS = max(RUNS, 5)  # they are quick, and every bound hangs on them
LAYOUTS = f"{HERE}/misc/.cache/images"
PATH = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
PROGRAMS = {
    "python": (["python3", "/srv/app/main.py"], PATH | {"PYTHONDONTWRITEBYTECODE": "1"}),
    "node": (["node", "/srv/app/main.js"], PATH | {"NODE_PATH": "/usr/share/nodejs:/usr/lib/nodejs"}),
}
MIB = 1 << 20
LIMIT = 300  # seconds that anything may take
ALL_LIMIT = 90  # seconds that a read of everything may take

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
def registry(work):
    """docker-registry on a free loopback port; yields HOST:PORT."""
    config = f"{work}/registry.yml"
    with open(config, "w", encoding="utf-8") as file:
        file.write(
            "version: 0.1\nlog:\n  level: info\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n"
            f"    rootdirectory: {work}/storage\nhttp:\n  addr: 127.0.0.1:0\n"
        )
    with process(["docker-registry", "serve", config], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        for line in child.stderr:
            if "listening on " in line:
                threading.Thread(target=child.stderr.read, daemon=True).start()
                yield line.split("listening on ")[1].split('"')[0].split(",")[0]
                return
        raise Failed("docker-registry does not listen")


class Link:
    """A running link-relay: its address, and what went over it since `forget`."""

    def __init__(self, address, control):
        self.address, self.control = address, control
        self.forget()

    def _now(self):
        with urllib.request.urlopen(f"http://{self.control}/", timeout=10) as answer:
            return json.load(answer)

    def forget(self):
        self.start = self._now()

    def counted(self):
        now = self._now()
        return {key: now[key] - self.start[key] for key in now}


@contextlib.contextmanager
def link(upstream, round_trip, rate, log=None):
    command = [f"{BIN}/link-relay", "--upstream", upstream, "--delay", str(round_trip), "--rate", str(rate)]
    command += ["--control", "127.0.0.1:0"] + (["--log", log] if log else [])
    with process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        yield Link(child.stdout.readline().strip(), child.stdout.readline().strip())


def fetch(url, accept="*/*"):
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=60) as answer:
        return answer.read()


class Image:
    """One image in the registry, as it came (NAME:oci) and converted (NAME:nydus)."""

    def __init__(self, name, host, work):
        self.name, self.work = name, work
        self.program, self.environment = PROGRAMS[name]
        layout = f"oci:{LAYOUTS}/{name}:latest"
        run("skopeo", "copy", "--quiet", "--dest-tls-verify=false", layout, f"docker://{host}/{name}:oci")
        told = f"{work}/{name}.json"
        run(f"{BIN}/nydus-image", "convert", "--output-json", told, layout, f"docker://{host}/{name}:nydus")
        with open(told, encoding="utf-8") as file:
            told = json.load(file)
        chunks = sum(layer["chunks"] for layer in told["layers"])
        # What a daemon may hold while it streams.
        self.memory_limit = 15_000_000 + 64 * chunks + 4 * told["chunk_size"]
        kind = "application/vnd.oci.image.manifest.v1+json"
        self.manifest = json.loads(fetch(f"http://{host}/v2/{name}/manifests/nydus", kind))
        *self.layers, last = self.manifest["layers"]
        blob = f"{work}/{name}.tgz"
        with open(blob, "wb") as file:
            file.write(fetch(f"http://{host}/v2/{name}/blobs/{last['digest']}"))
        self.bootstrap = f"{work}/{name}.boot"
        with tarfile.open(blob) as archive, open(self.bootstrap, "wb") as file:
            shutil.copyfileobj(archive.extractfile("image/image.boot"), file)
        # The registry is to answer from memory: its disk is not what is measured.
        for layer in self.layers:
            fetch(f"http://{host}/v2/{name}/blobs/{layer['digest']}")
        with open(f"{LAYOUTS}/{name}/index.json", encoding="utf-8") as file:
            digest = json.load(file)["manifests"][0]["digest"].replace(":", "/")
        with open(f"{LAYOUTS}/{name}/blobs/{digest}", encoding="utf-8") as file:
            sizes = [layer["size"] for layer in json.load(file)["layers"]]
        self.source_bytes, self.bytes = sum(sizes), sum(layer["size"] for layer in self.layers)

    def run(self, root, limit=LIMIT):
        """Runs the program in `root` until it says that it is ready."""
        with process(["chroot", root, *self.program], env=self.environment, stdout=subprocess.PIPE, text=True) as child:
            timer = threading.Timer(limit, child.kill)
            timer.start()
            line = child.stdout.readline()
            timer.cancel()
            if not line.startswith("ready"):
                raise Failed(f"{self.name}: the program printed {line!r}")


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


@contextlib.contextmanager
def nydusd(scratch, image, cache, source):
    """A daemon on the image; yields (process, mount point) as soon as the mount is there. `source`: flags."""
    point = f"{scratch}/mount"
    os.makedirs(point, exist_ok=True)
    before = os.stat(point).st_dev
    command = [f"{BIN}/nydusd", "fuse", "--mountpoint", point, "--apisock", f"{scratch}/api.sock", "--log-level", "warn"]
    command += [flag.format(cache=cache, bootstrap=image.bootstrap) for flag in source]
    with open(f"{scratch}/nydusd.log", "w+", encoding="utf-8") as log:
        try:
            with process(command, stdout=log, stderr=log) as child:
                while os.stat(point).st_dev == before:
                    if child.poll() is not None:
                        log.seek(0)
                        raise Failed(f"nydusd ended:\n{log.read()}")
                    time.sleep(0.0005)
                yield child, point
                log.seek(0)
                for line in log.read().splitlines():
                    if "ERROR" in line:
                        print(f"coldstart: nydusd: {line}", file=sys.stderr)
        finally:
            unmount(point)


def backend_flags(work, host, image, cache, **rafs):
    """Flags for a local bootstrap and blobs of the registry at `host`."""
    path = tempfile.mkstemp(dir=work, suffix=".json")[1]
    config = {
        "version": 2,
        "backend": {"type": "registry", "registry": {"scheme": "http", "host": host, "repo": image.name}},
        "cache": {"type": "filecache", "filecache": {"work_dir": cache}},
        "rafs": {"mode": "direct"} | rafs,
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)
    return ["--bootstrap", "{bootstrap}", "--config", path]


def read_all(root, limit=LIMIT):
    """tar of the whole tree; not straight to /dev/null, where GNU tar would read nothing."""
    with process(["tar", "-C", root, "--one-file-system", "-cf", "-", "."], stdout=subprocess.PIPE) as child:
        timer = threading.Timer(limit, child.kill)
        timer.start()
        while child.stdout.read(MIB):
            pass
        timer.cancel()
        if child.wait() != 0:
            raise Late(f"tar ended with {child.returncode} within {limit} s")


def touched(image, root):
    """Chunks and stored bytes that are in the page cache of the mount at `root`."""
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
    text = "".join(line + "\n" for line in lines)
    return json.loads(run(f"{BIN}/touched-chunks", "--bootstrap", image.bootstrap, input=text))


def local_times(image, work, host, unpacked):
    """L over an unpacked tree, L with nydusd and a full cache, and what the start touches."""
    alone = []
    with directory(work) as scratch, overlay(unpacked, scratch) as merged:
        for _ in range(LOCAL_RUNS + 1):
            start = time.monotonic()
            image.run(merged)
            alone.append(time.monotonic() - start)
    with directory(work) as scratch:
        cache = f"{scratch}/cache"
        flags = backend_flags(work, host, image, cache)
        with nydusd(scratch, image, cache, flags) as (_, point):
            read_all(point)
        daemon = []
        for _ in range(LOCAL_RUNS + 1):
            start = time.monotonic()
            with nydusd(scratch, image, cache, flags) as (_, point), overlay(point, scratch) as merged:
                image.run(merged)
                daemon.append(time.monotonic() - start)
        with nydusd(scratch, image, cache, flags) as (_, point), overlay(point, scratch) as merged:
            device = os.stat(point).st_dev
            with open(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb", "w", encoding="utf-8") as file:
                file.write("0")
            image.run(merged)
            chunks = touched(image, point)
    return statistics.median(alone[1:]), statistics.median(daemon[1:]), chunks


def pull(image, work, between, everything=False):
    """The rival: parallel pull and unpack, then the program (or a read of everything)."""
    with directory(work) as scratch:
        root = f"{scratch}/root"
        os.mkdir(root)
        between.forget()
        start = time.monotonic()
        run(f"{BIN}/parallel-pull", "--registry", between.address, "--image", f"{image.name}:oci", "--into", root)
        if everything:
            read_all(root)
        else:
            with overlay(root, scratch) as merged:
                image.run(merged)
        return {"time": time.monotonic() - start} | between.counted()


def record(image, work, host):
    """Starts once on this machine and keeps the trace; its path below a cache directory, and its bytes."""
    with directory(work) as scratch:
        cache = f"{scratch}/cache"
        flags = backend_flags(work, host, image, cache)
        with nydusd(scratch, image, cache, flags) as (_, point), overlay(point, scratch) as merged:
            image.run(merged)
        traces = {}
        for parent, _, names in os.walk(cache):
            for name in names:
                if name.endswith(".trace"):
                    with open(f"{parent}/{name}", "rb") as file:
                        traces[os.path.relpath(f"{parent}/{name}", cache)] = file.read()
        if not traces:
            raise Failed("nydusd has kept no trace")
        return traces


def ours(image, work, between, flags=None, everything=False, traces=None, **rafs):
    """A cold start with an empty cache, or one with nothing but traces (or a read of everything)."""
    with directory(work) as scratch:
        cache = f"{scratch}/cache"
        for name, data in (traces or {}).items():
            os.makedirs(os.path.dirname(f"{cache}/{name}"), exist_ok=True)
            with open(f"{cache}/{name}", "wb") as file:
                file.write(data)
        flags = flags or backend_flags(work, between.address, image, cache, **rafs)
        forget_pages(image.bootstrap)
        between.forget()
        start = time.monotonic()
        with nydusd(scratch, image, cache, flags) as (child, point):
            memory = Memory(child.pid)
            mounted = time.monotonic() - start
            if everything:
                read_all(point, ALL_LIMIT)
            else:
                with overlay(point, scratch) as merged:
                    image.run(merged)
            elapsed = time.monotonic() - start
            counted = between.counted()
            memory.done.set()
            memory.join()
        return {"time": elapsed, "mounted": mounted, "memory": memory.most} | counted


def second(image, work, between):
    """Another container of the same image on the same node."""
    with directory(work) as scratch, directory(work) as other:
        cache = f"{scratch}/cache"
        flags = backend_flags(work, between.address, image, cache)
        with nydusd(scratch, image, cache, flags) as (_, point), overlay(point, scratch) as merged:
            image.run(merged)
            # What the first fetches beyond its start is the first's.
            settle(between)
            between.forget()
            start = time.monotonic()
            with nydusd(other, image, cache, flags) as (_, point), overlay(point, other) as merged:
                image.run(merged)
                return {"time": time.monotonic() - start} | between.counted()


def settle(between):
    """Waits until nothing has come for a while."""
    last = None
    while last != (last := between.counted()["down"]):
        time.sleep(0.5)


def crowd(image, work, between, count=20):
    """Simultaneous cold starts of one image on one node: a daemon each, one cache."""
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(directory(work))
        flags = backend_flags(work, between.address, image, f"{shared}/cache")
        between.forget()
        failures = []

        def one(scratch):
            try:
                with nydusd(scratch, image, f"{shared}/cache", flags) as (_, point), overlay(point, scratch) as merged:
                    image.run(merged)
                    ready.wait(LIMIT)  # until all are: nobody takes its share of memory back early
            except Exception as error:  # pylint: disable=broad-except
                failures.append(error)
                ready.abort()

        ready = threading.Barrier(count + 1)
        scratches = [stack.enter_context(directory(work)) for _ in range(count)]
        start = time.monotonic()
        threads = [threading.Thread(target=one, args=(scratch,)) for scratch in scratches]
        for thread in threads:
            thread.start()
        with contextlib.suppress(threading.BrokenBarrierError):
            ready.wait(LIMIT)
        elapsed = time.monotonic() - start
        counted = between.counted()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return {"time": elapsed} | counted


class Table:
    """Rows as they come, and all numbers for RESULT."""

    def __init__(self):
        self.results = []
        self.memory_limit = 0

    def head(self, text):
        print(f"\n{text}\n{'':48} {'seconds':>8} {'(min - max)':>15} {'requests':>8} {'MiB':>7} {'MiB mem':>7}", flush=True)

    def row(self, setting, what, measured, bound=None, rival=None, most=None):
        """`bound`: seconds; `rival`: seconds of the parallel pull; `most`: (requests, bytes)."""
        times = sorted(one["time"] for one in measured)
        value = statistics.median(times)
        middle = {
            key: statistics.median(one[key] for one in measured) for key in ("requests", "down", "memory") if key in measured[0]
        }
        judged = []

        def judge(name, limit, found, form):
            judged.append(f"{'ok' if found <= limit else 'ABOVE'} {name} {form.format(limit)}")

        if bound:
            judge("bound", bound, value, "{:.2f} s")
        if rival:
            judge("1.05 x pull", 1.05 * rival, value, "{:.2f} s")
        if most:
            judge("requests", most[0], middle["requests"], "{}")
            if most[1]:
                judge("MiB", most[1] / MIB, middle["down"] / MIB, "{:.1f}")
        if "memory" in middle:
            judge("MiB mem", self.memory_limit / MIB, max(one["memory"] for one in measured) / 1024, "{:.1f}")
        cells = [f"{value:8.2f}", f"({times[0]:.2f} - {times[-1]:.2f})".rjust(15)]
        cells.append(f"{middle['requests']:8.0f}" if "requests" in middle else f"{'':8}")
        cells.append(f"{middle['down'] / MIB:7.1f}" if "down" in middle else f"{'':7}")
        cells.append(f"{middle['memory'] / 1024:7.1f}" if "memory" in middle else f"{'':7}")
        print(f"{what:48} {' '.join(cells)}  {'; '.join(judged)}", flush=True)
        self.results.append(setting | {"row": what, "runs": measured, "bound": bound, "judged": judged})
        return value


def wanted(row):
    return ROWS is None or row.split()[0] in ROWS


def measure(image, work, host, local, table):
    alone, daemon, chunks = local
    table.memory_limit = image.memory_limit
    for round_trip, rate in LINKS:
        setting = {"image": image.name, "round_trip_ms": round_trip, "rate_mbit": rate}
        log = os.environ.get("LINKLOG")
        log = log and f"{log}/{image.name}-{round_trip:g}-{rate:g}.log"
        traces = record(image, work, host) if wanted("trace:") else None
        seconds_b = chunks["bytes"] / (rate * 1e6 / 8)
        trip = round_trip / 1e3
        slack = 1.25 if round_trip <= 10 else 1.35
        trips = 20 if image.name == "node" else 6
        bound = slack * (alone + seconds_b) + trips * trip
        traced = (1.1 if round_trip <= 10 else 1.15) * (alone + seconds_b) + 4 * trip
        table.head(
            f"{image.name}, {round_trip:g} ms, {rate:g} Mbit/s: L {alone:.2f} s ({daemon:.2f} s with nydusd and a full cache), "
            f"touched {chunks['chunks']} chunks, {chunks['bytes'] / MIB:.1f} MiB, B {seconds_b:.2f} s"
        )
        touch = chunks["bytes"]
        with link(host, round_trip, rate, log) as between:
            rows = {
                "pull and unpack, 6 connections": lambda: pull(image, work, between),
                "time: no trace": lambda: ours(image, work, between, prefer="time"),
                "bytes: no trace, prefer = bytes": lambda: ours(image, work, between, prefer="bytes"),
                "trace: with the trace of another start": lambda: ours(image, work, between, traces=traces),
                "trace-bytes: the same, prefer = bytes": lambda: ours(image, work, between, traces=traces, prefer="bytes"),
                "image: from --image, plain http": lambda: ours(
                    image, work, between, ["--image", f"docker://{between.address}/{image.name}:nydus", "--cache-dir", "{cache}"]
                ),
                "pull-all and unpack, then read everything": lambda: pull(image, work, between, everything=True),
                "all: read everything": lambda: ours(image, work, between, everything=True),
            }
            rows = {name: work for name, work in rows.items() if wanted(name)}
            found = {name: [] for name in rows}
            for _ in range(RUNS):  # in turns, so that all meet the same machine
                for name, measured in rows.items():
                    try:
                        found[name].append(measured())
                    except Late as late:
                        print(f"{name}: {late}", file=sys.stderr, flush=True)
            rivals = {}
            for name, runs in found.items():
                word = name.split()[0]
                if not runs:
                    print(f"{name:48} {'never':>8}", flush=True)
                    continue
                if word.startswith("pull"):
                    rivals[word] = table.row(setting, name, runs)
                elif word == "time:":
                    table.row(setting, name, runs, bound, rivals.get("pull"), (60, None))
                elif word == "bytes:":
                    table.row(setting, name, runs, None, rivals.get("pull"), (60, 2 * touch))
                elif word == "trace:":
                    table.row(setting, name, runs, traced, rivals.get("pull"), (12, None))
                elif word == "trace-bytes:":
                    table.row(setting, name, runs, None, rivals.get("pull"), (12, 1.15 * touch))
                elif word == "image:":
                    table.row(setting, name, runs, bound + 12 * trip, None)
                elif word == "all:":
                    table.row(setting, name, runs, None, rivals.get("pull-all"))
            if wanted("second"):
                table.row(setting, "second container on the node", [second(image, work, between)], None, None, (0, None))
            if wanted("crowd") and (round_trip, rate) == LINKS[0] and image.name == IMAGES[0]:
                one = ours(image, work, between)
                settle(between)
                table.row(setting, "crowd: 20 starts at once", [crowd(image, work, between)], None, None, (1000, 1.02 * one["down"]))


def main():
    if os.geteuid() != 0:
        raise Failed("mounting needs root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    run(f"{HERE}/misc/images/make-images", LAYOUTS, *IMAGES)
    table = Table()
    with directory(os.environ.get("TMPDIR", "/var/tmp")) as work, registry(work) as host:
        version = " ".join(run(f"{BIN}/nydusd", "--version").split()[:6])
        print(f"cold start, medians of {RUNS} on {os.cpu_count()} cores; {version}")
        for name in IMAGES:
            image = Image(name, host, work)
            unpacked = f"{work}/{name}-tree"
            os.mkdir(unpacked)
            run(f"{BIN}/parallel-pull", "--registry", host, "--image", f"{name}:oci", "--into", unpacked)
            measure(image, work, host, local_times(image, work, host, unpacked), table)
            shutil.rmtree(unpacked)
    if os.environ.get("RESULT"):
        with open(os.environ["RESULT"], "w", encoding="utf-8") as file:
            json.dump(table.results, file, indent=1)


try:
    main()
except Failed as failure:
    sys.exit(f"coldstart: {failure}")
