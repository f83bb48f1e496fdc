#!/usr/bin/env python3
"""mounts.py: what many images in one daemon cost: time a mount call, memory, CPU when nobody asks.

One daemon, one kernel mount, MOUNTS images in it, mounted, read and unmounted through the API. Root; an idle machine.

  BIN       directory of the binaries (target/release)
  IMAGE     image of misc/images/make-images (node)
  MOUNTS    mounts of that image (1000)
  DISTINCT  the first so many have a bootstrap and a blob of their own: small images, built for it (50)
  IDLE      seconds that the daemon is left alone at the end (10)
  RESULT    file that gets every number as JSON (none)
  KEEP      directory where tree and image are kept for the next time, also fuse.py's (none)

Memory is RssAnon + RssShmem: what the daemon itself holds. A mapped bootstrap is the page cache's, and shared.
"""

import contextlib
import http.client
import json
import os
import signal
import statistics
import sys
import time

from fuse import Unix, prepare
from image import LAYOUTS, nydusd
from machine import BIN, HERE, Failed, directory, run

MOUNTS, DISTINCT = int(os.environ.get("MOUNTS", "1000")), int(os.environ.get("DISTINCT", "50"))
IDLE = float(os.environ.get("IDLE", "10"))
NAME = os.environ.get("IMAGE", "node")
MEMORY_BASE, MEMORY_EACH = 12e6, 1e6  # bytes: the bound is the sum, up to 500 mounts
MOUNT_SECONDS, ENTRY_SECONDS = 0.005, 1e-6  # the bound on a mount; more for each entry that is new


class Api:
    """The daemon's API on one connection, which it never closes."""

    def __init__(self, path):
        self.connection = Unix(path)

    def call(self, method, path, body=None):
        """Seconds until the answer came."""
        text = None if body is None else json.dumps(body)
        start = time.monotonic()
        self.connection.request(method, path, text, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        told = answer.read()
        took = time.monotonic() - start
        if answer.status not in (200, 204):
            raise Failed(f"{method} {path}: {answer.status} {told[:300]!r}")
        return took


def held(pid):
    """Bytes of RssAnon and RssShmem."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith(("RssAnon", "RssShmem")))


def ticks(pid):
    """CPU time so far, in seconds."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        words = file.read().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def look(point):
    """Walks a mount that is in the tree."""
    with os.scandir(point) as entries:
        return sum(1 for _ in entries)


def small_images(work, count):
    """Bootstraps of `count` images with a file each that no other has."""
    boots = []
    for number in range(count):
        tree, boot = f"{work}/small/{number}/tree", f"{work}/small/{number}/boot"
        if not os.path.exists(boot):
            os.makedirs(f"{tree}/d", exist_ok=True)
            with open(f"{tree}/d/own", "w", encoding="utf-8") as file:
                file.write(f"image {number}\n" * 1000)
            run(f"{BIN}/nydus-image", "create", "--bootstrap", boot, "--blob-dir", f"{work}/blobs", tree)
        boots.append(boot)
    return boots


def times(what, found, bound):
    ordered = sorted(found)
    middle, late = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
    verdict = "" if bound is None else f"  {'ok' if middle <= bound else 'ABOVE'} {bound * 1000:.1f} ms"
    numbers = " ".join(f"{value * 1000:9.3f}" for value in (middle, late, ordered[-1]))
    print(f"{what:44} {numbers}{verdict}", flush=True)
    return {"what": what, "seconds": found}


def memory(what, pid, mounts, judged=True):
    size = held(pid)
    bound = MEMORY_BASE + MEMORY_EACH * mounts
    verdict = f"  {'ok' if size <= bound else 'ABOVE'} {bound / 1e6:.0f} MB" if judged else ""
    print(f"{what:44} {size / 1e6:9.1f}{verdict}", flush=True)
    return {"what": what, "bytes": size}


def main():
    if os.geteuid() != 0:
        raise Failed("mounting needs root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    run(f"{HERE}/misc/images/make-images", LAYOUTS, NAME)
    results = []
    with contextlib.ExitStack() as stack:
        parent = os.environ.get("TMPDIR", "/var/tmp")
        work = os.environ.get("KEEP") or stack.enter_context(directory(parent))
        os.makedirs(work, exist_ok=True)
        tree, boot, _ = prepare(work)
        entries = sum(len(names) + len(dirs) for _, dirs, names in os.walk(tree))
        boots = small_images(work, min(DISTINCT, MOUNTS - 1))
        with open(f"{work}/config.json", encoding="utf-8") as file:
            config = file.read()
        scratch = stack.enter_context(directory(parent))
        daemon, point = stack.enter_context(nydusd(scratch, None, None, []))
        api = Api(f"{scratch}/api.sock")

        def mount(number, source):
            body = {"fs_type": "rafs", "source": source, "config": config, "prefetch_files": []}
            took = api.call("POST", f"/api/v1/mount?mountpoint=/m{number}", body)
            return took, look(f"{point}/m{number}")

        def unmount(number):
            return api.call("DELETE", f"/api/v1/mount?mountpoint=/m{number}")

        print(f"{NAME}: {entries} entries, and {len(boots)} small images; {' '.join(run(f'{BIN}/nydusd', '--version').split()[:6])}")
        print(f"{'mount calls, ms':44} {'median':>9} {'99 %':>9} {'most':>9}")
        first = [mount(0, boot)[0]]
        results.append(times("first of a bootstrap", first, MOUNT_SECONDS + entries * ENTRY_SECONDS))
        own = [mount(1 + number, source)[0] for number, source in enumerate(boots)]
        if own:
            results.append(times(f"{len(own)} small images, first of each", own, MOUNT_SECONDS))
        again, marks = [], []
        for number in range(1 + len(boots), MOUNTS):
            again.append(mount(number, boot)[0])
            if number + 1 in (100, 500):
                marks.append((number + 1, held(daemon.pid)))
        results.append(times(f"{len(again)} more of a bootstrap seen before", again, MOUNT_SECONDS))
        if len(again) >= 200:
            results.append(times("  the last 100 of them", again[-100:], MOUNT_SECONDS))
        print(f"{'memory, MB':44}")
        for count, size in marks:
            bound = MEMORY_BASE + MEMORY_EACH * count
            print(f"{f'{count} mounts':44} {size / 1e6:9.1f}  {'ok' if size <= bound else 'ABOVE'} {bound / 1e6:.0f} MB")
            results.append({"what": f"{count} mounts", "bytes": size})
        results.append(memory(f"{MOUNTS} mounts", daemon.pid, MOUNTS))
        before = ticks(daemon.pid)
        time.sleep(IDLE)
        used = ticks(daemon.pid) - before
        print(f"{'CPU, seconds':44}\n{f'{MOUNTS} mounts, alone for {IDLE:.0f} s':44} {used:9.2f}  {'ok' if used == 0 else 'ABOVE'} 0")
        results.append({"what": "idle", "seconds": [used]})
        print(f"{'unmount calls, ms':44} {'median':>9} {'99 %':>9} {'most':>9}")
        results.append(times("all", [unmount(number) for number in range(MOUNTS)], None))
        results.append(memory("memory with none, MB", daemon.pid, 0, judged=False))
        for number in range(MOUNTS):
            mount(number, boot)
            unmount(number)
        results.append(memory(f"after {MOUNTS} more, one at a time", daemon.pid, 0, judged=False))
    if os.environ.get("RESULT"):
        with open(os.environ["RESULT"], "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


try:
    main()
except (Failed, http.client.HTTPException) as failure:
    sys.exit(f"mounts: {failure}")
