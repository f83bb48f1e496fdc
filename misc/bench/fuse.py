#!/usr/bin/env python3
"""fuse.py: what FUSE costs once all data is local, against ext4 holding the same tree.

One tree twice: unpacked on this file system (which should be ext4), and as an image behind nydusd with a full
cache. Both are measured in turns; medians of RUNS, and the ratio of the medians. Root; an idle machine.

  BIN       directory of the binaries (target/release)
  RUNS      repetitions (5)
  IMAGE     image of misc/images/make-images (node)
  VARIANTS  further daemons beside the default one: `NAME=FLAGS;NAME=FLAGS`, where the first of FLAGS may be the
            path of another nydusd, or `fs-raw`: the barest server of the unpacked tree, with flags of its own (none);
            `all` is nydusd through io_uring, and that server in the ways that the kernel offers one
  ROWS      some rows only, by their first word (all)
  RESULT    file that gets every number as JSON (none)
  KEEP      directory where tree and image are kept for the next time (none)

Cold: both page caches (the mount's, and that of the cache file and bootstrap beneath) and all cached names and
attributes are dropped, and the daemon is a new one. Times are divided nydusd / ext4, rates as well: a bound on a
time is met from below, one on a rate from above; `so is raw`: the barest server misses it as well. `requests` is how often nydusd was asked (its own counters).

All servers have four threads, but for io_uring one a CPU; the kernel is made to offer that meanwhile.
"""

import contextlib
import errno
import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

from image import LAYOUTS, nydusd
from machine import BIN, HERE, MIB, Failed, directory, process, read_all, run, unmount

RUNS = int(os.environ.get("RUNS", "5"))
NAME = os.environ.get("IMAGE", "node")
ROWS = os.environ.get("ROWS", "").split(",") if os.environ.get("ROWS") else None
VARIANTS = {"nydusd": []}
ALL = (
    "uring=--fuse-io-uring;raw=fs-raw;clone=fs-raw --clone;splice=fs-raw --data splice;"
    "move=fs-raw --data move;pass=fs-raw --data passthrough"
)
for variant in filter(None, {"all": ALL}.get(wanted := os.environ.get("VARIANTS", ""), wanted).split(";")):
    label, _, flags = variant.partition("=")
    VARIANTS[label] = shlex.split(flags)

# What has the kernel offer io_uring, and what a daemon logs that is served by it.
RINGS = "/sys/module/fuse/parameters/enable_uring"
THROUGH_RINGS = "FUSE requests come through io_uring"

# The bound on what the kernel can not answer, against the server `raw`.
RAW_BOUND = 0.9

# Blocks enough for a second or more, each read once.
SEQUENTIAL_BYTES, RANDOM_BYTES = 192 * MIB, 16 * MIB


def is_raw(flags):
    """True for the barest server, which is no nydusd."""
    return flags[:1] == ["fs-raw"]


def drop_caches():
    """Pages, names and attributes of the whole machine."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w", encoding="utf-8") as file:
        file.write("3")


@contextlib.contextmanager
def rings():
    """Has the kernel offer io_uring."""
    with open(RINGS, encoding="utf-8") as file:
        before = file.read()
    try:
        with open(RINGS, "w", encoding="utf-8") as file:
            file.write("Y")
        yield
    finally:
        with open(RINGS, "w", encoding="utf-8") as file:
            file.write(before)


def wait_for_rings(log):
    """The daemon with this log takes its requests through io_uring: it would be no variant without."""
    deadline = time.monotonic() + 10
    while True:
        with open(log, encoding="utf-8") as file:
            text = file.read()
        if THROUGH_RINGS in text:
            return
        if time.monotonic() > deadline:
            raise Failed(f"nydusd does not serve through io_uring:\n{text}")
        time.sleep(0.001)


def load(*arguments):
    return json.loads(run(f"{BIN}/fs-load", *map(str, arguments)))


class Unix(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=20)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        # The socket appears when the mount has answered.
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                return self.sock.connect(self.path)
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)


def requests(api):
    """FUSE requests that the daemon has counted."""
    connection = Unix(api)
    connection.request("GET", "/api/v1/metrics")
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return sum(answer["fop_hits"]) + sum(answer["fop_errors"])


def timed(action):
    start = time.monotonic()
    action()
    return {"seconds": time.monotonic() - start}


def find(root):
    with process(["find", root, "-xdev"], stdout=subprocess.DEVNULL) as child:
        if child.wait() != 0:
            raise Failed(f"find {root} ended with {child.returncode}")


def rate(*arguments):
    done = load(*arguments)
    return {"rate": done["count"] / done["seconds"], "bytes": done["bytes"] / done["seconds"], "errno": done["errno"]}


def sequential(jobs):
    return lambda root: rate("--jobs", jobs, "read", "--block", 128 << 10, "--bytes", SEQUENTIAL_BYTES, root)


def random(jobs):
    return lambda root: rate("--jobs", jobs, "read", "--random", "--block", 4096, "--bytes", RANDOM_BYTES, root)


# Row: what is done to a tree; cold or warm; what is compared, its unit and divisor; the bound on the ratio.
PER_SECOND, SECONDS, THROUGHPUT = ("rate", "1/s", 1), ("seconds", "s", 1), ("bytes", "MiB/s", MIB)
TABLE = {
    "tar-warm: whole tree": (lambda root: timed(lambda: read_all(root)), False, SECONDS, 1.3),
    "tar-cold: whole tree": (lambda root: timed(lambda: read_all(root)), True, SECONDS, 1.0),
    "find-cold: names of the whole tree": (lambda root: timed(lambda: find(root)), True, SECONDS, 1.0),
    "stat: once seen, 1 thread": (lambda root: rate("stat", root), False, PER_SECOND, 0.85),
    "stat-2: once seen, 2 threads": (lambda root: rate("--jobs", 2, "stat", root), False, PER_SECOND, 0.95),
    "readdir: once seen": (lambda root: rate("readdir", root), False, PER_SECOND, 0.9),
    "getxattr: no such attribute": (lambda root: rate("getxattr", root), False, PER_SECOND, None),
    "sequential: cold, 128 KiB, 1 job": (sequential(1), True, THROUGHPUT, 0.8),
    "sequential-4: cold, 128 KiB, 4 jobs": (sequential(4), True, THROUGHPUT, 0.9),
    "random: cold, 4 KiB, 1 job": (random(1), True, PER_SECOND, 0.7),
    "random-2: cold, 4 KiB, 2 jobs": (random(2), True, PER_SECOND, None),
    "random-4: cold, 4 KiB, 4 jobs": (random(4), True, PER_SECOND, None),
}


def prepare(work):
    """The unpacked tree, and an image of it: (tree, bootstrap, configuration)."""
    tree, boot, blobs, cache = f"{work}/bundle/rootfs", f"{work}/boot", f"{work}/blobs", f"{work}/cache"
    if not os.path.exists(boot):
        run(f"{HERE}/misc/images/make-images", LAYOUTS, NAME)
        for path in (f"{work}/bundle", blobs, cache):
            shutil.rmtree(path, ignore_errors=True)
        os.makedirs(blobs)
        run("umoci", "unpack", "--image", f"{LAYOUTS}/{NAME}:latest", f"{work}/bundle")
        run(f"{BIN}/nydus-image", "create", "--compressor", "zstd", "--bootstrap", boot, "--blob-dir", blobs, tree)
    config = {
        "version": 2,
        "backend": {"type": "localfs", "localfs": {"dir": blobs}},
        "cache": {"type": "filecache", "filecache": {"work_dir": cache}},
        "rafs": {"mode": "direct"},
    }
    with open(f"{work}/config.json", "w", encoding="utf-8") as file:
        json.dump(config, file)
    return tree, boot, ["--bootstrap", "{bootstrap}", "--config", f"{work}/config.json", "--trace", "off"]


class Tree:
    """One side of the comparison."""

    def __init__(self, name, root=None, daemon=None):
        self.name, self.root, self.daemon = name, root, daemon

    @contextlib.contextmanager
    def ready(self, cold):
        """Yields (root, how often nydusd was asked so far). The tree was read whole if not `cold`."""
        if self.root:
            self.warm(self.root, cold)
            yield self.root, None
            return
        with self.daemon() as (root, api):
            self.warm(root, cold)
            yield root, api and (lambda: requests(api))

    @staticmethod
    def warm(root, cold):
        if cold:
            drop_caches()
        else:
            read_all(root)


@contextlib.contextmanager
def raw(tree, scratch, flags):
    """The barest server; yields its mount point."""
    point = f"{scratch}/mount"
    os.makedirs(point)
    before = os.stat(point).st_dev
    try:
        with process([f"{BIN}/fs-raw", *flags, tree, point]) as child:
            while os.stat(point).st_dev == before:
                if child.poll() is not None:
                    raise Failed("fs-raw ended")
                time.sleep(0.0005)
            yield point
    finally:
        unmount(point)


def measure(actions, cold, trees):
    """Every tree RUNS times, in turns, each time with all `actions`; dictionaries of numbers by tree, one an action."""
    found = [{tree.name: [] for tree in trees} for _ in actions]
    for turn in range(RUNS):
        for tree in trees if turn % 2 == 0 else reversed(trees):
            with tree.ready(cold) as (root, asked):
                for action, runs in zip(actions, found):
                    before = asked() if asked else 0
                    one = action(root)
                    if asked:
                        one["requests"] = asked() - before
                    runs[tree.name].append(one)
    return found


def head():
    cells = [f"{name:>10} {'ratio':>8}{'' if is_raw(flags) else '  requests'}" for name, flags in VARIANTS.items()]
    print(f"{'':36} {'':6} {'ext4':>10} {' '.join(cells)}", flush=True)


def show(what, found, compared, bound):
    key, unit, divisor = compared
    middle = {name: statistics.median(one[key] for one in runs) / divisor for name, runs in found.items()}
    base = middle.pop("ext4")
    cells, judged = [f"{base:10.{3 if unit == 's' else 0}f}"], []

    def missed(name):
        return middle[name] / base > bound if unit == "s" else middle[name] / base < bound

    for name, value in middle.items():
        asked = [one["requests"] for one in found[name] if "requests" in one]
        asked = f" {statistics.median(asked):9.0f}" if asked else ""
        cells.append(f"{value:10.{3 if unit == 's' else 0}f} {value / base:6.2f} x{asked}")
    if bound:
        judged.append(f"{'ok' if not missed('nydusd') else 'ABOVE' if unit == 's' else 'BELOW'} {bound} x")
        if missed("nydusd") and "raw" in middle and missed("raw"):
            judged.append("so is raw")
    if what.startswith("getxattr"):
        once = all(one["errno"] == errno.EOPNOTSUPP for one in found["nydusd"])
        judged.append("ok answered by the kernel" if once else "asked every time")
        if not once and "raw" in middle:
            ratio = middle["nydusd"] / middle["raw"]
            judged.append(f"{'ok' if ratio >= RAW_BOUND else 'BELOW'}, {ratio:.2f} of {RAW_BOUND} x raw")
    print(f"{what:36} {unit:>6} {' '.join(cells)}  {'; '.join(judged)}", flush=True)
    return {"row": what, "unit": unit, "runs": found, "bound": bound, "judged": judged}


def main():
    if os.geteuid() != 0:
        raise Failed("mounting needs root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.ExitStack() as stack:
        through_rings = [name for name, flags in VARIANTS.items() if "--fuse-io-uring" in flags]
        if through_rings and os.path.exists(RINGS):
            stack.enter_context(rings())
        elif through_rings:
            print(f"{NAME}: without {', '.join(through_rings)}: the kernel has no FUSE over io_uring ({RINGS})")
            for name in through_rings:
                del VARIANTS[name]
        parent = os.environ.get("TMPDIR", "/var/tmp")
        work = os.environ.get("KEEP") or stack.enter_context(directory(parent))
        os.makedirs(work, exist_ok=True)
        tree, boot, source = prepare(work)
        image = type("Local", (), {"bootstrap": boot})

        @contextlib.contextmanager
        def daemon(flags):
            if is_raw(flags):
                with directory(parent) as scratch, raw(tree, scratch, flags[1:]) as point:
                    yield point, None
                return
            program = flags[0] if flags and flags[0].startswith("/") else f"{BIN}/nydusd"
            flags = source + [flag for flag in flags if flag != program]
            ringed = "--fuse-io-uring" in flags
            level = "info" if ringed else "warn"
            with (
                directory(parent) as scratch,
                nydusd(scratch, image, None, flags, program=program, level=level) as (_, point),
            ):
                if ringed:
                    wait_for_rings(f"{scratch}/nydusd.log")
                yield point, f"{scratch}/api.sock"

        with daemon([]) as (root, _):
            read_all(root)  # fills the cache
            entries = sum(len(names) + len(dirs) for _, dirs, names in os.walk(root))
        kind = run("stat", "-f", "-c", "%T", tree).strip()
        version = " ".join(run(f"{BIN}/nydusd", "--version").split()[:6])
        print(f"{NAME}: {entries} entries on {kind}, medians of {RUNS} on {os.cpu_count()} cores; {version}")
        head()
        trees = [Tree("ext4", root=tree)]
        trees += [Tree(name, daemon=lambda flags=flags: daemon(flags)) for name, flags in VARIANTS.items()]
        results = []
        wanted = {what: row for what, row in TABLE.items() if ROWS is None or what.partition(":")[0] in ROWS}
        warm = [what for what, (_, cold, _, _) in wanted.items() if not cold]
        # What is warm stays so: one daemon for all those rows. What is cold is so once.
        for rows in [warm] * bool(warm) + [[what] for what in wanted if what not in warm]:
            cold = wanted[rows[0]][1]
            for what, found in zip(rows, measure([wanted[what][0] for what in rows], cold, trees)):
                results.append(show(what, found, *wanted[what][2:]))
    if os.environ.get("RESULT"):
        with open(os.environ["RESULT"], "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"fuse: {failure}")
