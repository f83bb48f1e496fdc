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
the round trip. Bounds: without a trace k (L + B) + n R, k = 1.25 at 10 ms and 1.35 at 50 ms, n = 6 (node converted
without hints: 26, its imports depend on one another); with one 1.1 and 1.15, n = 4; never above 1.05 x the parallel pull.
The program's time over nydusd with a full cache is what is left for FUSE once nothing has to be fetched.
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import sys
import threading
import time

from image import LAYOUTS, Image, backend_flags, nydusd
from machine import BIN, HERE, LIMIT, MIB, Failed, Late, Memory, cached_pages, directory, forget_pages, hash_seconds, overlay, read_all, run
from registry import guarded_registry, link, registry

RUNS = int(os.environ.get("RUNS", "5"))
IMAGES = os.environ.get("IMAGES", "python,node").split(",")
LINKS = [tuple(map(float, link.split("/"))) for link in os.environ.get("LINKS", "10/1000,50/200").split(",")]
ROWS = os.environ.get("ROWS", "").split(",") if os.environ.get("ROWS") else None
LOCAL_RUNS = max(RUNS, 5)  # they are quick, and every bound hangs on them
ALL_LIMIT = 90  # seconds that a read of everything may take


def local_times(image, work, host, unpacked):
    """Seconds over an unpacked tree (`alone`), and with nydusd and a full cache (`daemon`), and what the start
    touches (`chunks`, `bytes`)."""
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
            chunks = json.loads(run(f"{BIN}/touched-chunks", "--bootstrap", image.bootstrap, "--cache", cache, input=cached_pages(point)))
    return {"alone": statistics.median(alone[1:]), "daemon": statistics.median(daemon[1:])} | chunks


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


def ours(image, work, between, flags=None, everything=False, traces=None, environment=None, **rafs):
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
        with nydusd(scratch, image, cache, flags, environment) as (child, point):
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
            hashed = hash_seconds(f"{scratch}/api.sock") / elapsed * 100
        return {"time": elapsed, "mounted": mounted, "memory": memory.most, "hashed": hashed} | counted


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
    """Waits until nothing has come for longer than a daemon waits for a quiet moment."""
    last = None
    while last != (last := between.counted()["down"]):
        time.sleep(3)


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
        self.memory_limit = self.hash_limit = 0

    def head(self, text):
        print(f"\n{text}\n{'':48} {'seconds':>8} {'(min - max)':>15} {'requests':>8} {'MiB':>7} {'MiB mem':>7} {'hash %':>6}", flush=True)

    def row(self, setting, what, measured, bound=None, rival=None, most=None):
        """`bound`: seconds; `rival`: seconds of the parallel pull; `most`: (requests, bytes)."""
        times = sorted(one["time"] for one in measured)
        value = statistics.median(times)
        middle = {
            key: statistics.median(one[key] for one in measured) for key in ("requests", "down", "memory", "hashed") if key in measured[0]
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
        if "hashed" in middle and not what.startswith("all:"):  # which is no start
            judge("hash %", self.hash_limit, middle["hashed"], "{}")
        cells = [f"{value:8.2f}", f"({times[0]:.2f} - {times[-1]:.2f})".rjust(15)]
        cells.append(f"{middle['requests']:8.0f}" if "requests" in middle else f"{'':8}")
        cells.append(f"{middle['down'] / MIB:7.1f}" if "down" in middle else f"{'':7}")
        cells.append(f"{middle['memory'] / 1024:7.1f}" if "memory" in middle else f"{'':7}")
        cells.append(f"{middle['hashed']:6.1f}" if "hashed" in middle else f"{'':6}")
        print(f"{what:48} {' '.join(cells)}  {'; '.join(judged)}", flush=True)
        self.results.append(setting | {"row": what, "runs": measured, "bound": bound, "judged": judged})
        return value


def wanted(row):
    return ROWS is None or row.split()[0] in ROWS


def bounds(local, round_trip, rate):
    """Seconds without and with a trace, by the time L of the program alone, and with nydusd and all data local."""
    seconds_b, trip = local["bytes"] / (rate * 1e6 / 8), round_trip / 1e3
    free, traced = (1.25, 1.1) if round_trip <= 10 else (1.35, 1.15)
    return {
        kind: (free * (local[kind] + seconds_b) + 6 * trip, traced * (local[kind] + seconds_b) + 4 * trip)
        for kind in ("alone", "daemon")
    }


def measure(image, work, host, local, table):
    table.memory_limit, table.hash_limit = image.memory_limit, image.hash_limit
    plain = image.without_hints(host)
    for round_trip, rate in LINKS:
        setting = {"image": image.name, "round_trip_ms": round_trip, "rate_mbit": rate}
        log = os.environ.get("LINKLOG")
        log = log and f"{log}/{image.name}-{round_trip:g}-{rate:g}.log"
        traces = record(image, work, host) if any(wanted(row) for row in ("trace:", "trace-bytes:")) else None
        limits = bounds(local, round_trip, rate)
        (free, traced), least = limits["daemon"], limits["alone"]
        touch = local["bytes"]
        table.head(
            f"{image.name}, {round_trip:g} ms, {rate:g} Mbit/s: L {local['daemon']:.2f} s with nydusd and a full cache ({local['alone']:.2f} s "
            f"over the unpacked tree, which would make the bounds {least[0]:.2f} and {least[1]:.2f} s), touched {local['chunks']} "
            f"chunks, {touch / MIB:.1f} MiB, B {touch / (rate * 1e6 / 8):.2f} s"
        )
        with link(host, round_trip, rate, log) as between, guarded_registry(work, round_trip, rate) as guarded:
            reference = ["--image", f"docker://{guarded.address}/{image.name}:nydus", "--cache-dir", "{cache}"]
            reference += ["--ca-cert", f"{work}/ca.crt"]
            login = os.environ | {"DOCKER_CONFIG": work}

            def from_reference():
                found = ours(image, work, guarded, reference, environment=login)
                # The relay cannot count what TLS hides.
                return {key: value for key, value in found.items() if key != "requests"}

            # Each: what is done, the bound in seconds, the rival, most requests and bytes.
            rows = {
                "pull and unpack, 6 connections": (lambda: pull(image, work, between), None, None, None),
                "time: no trace": (lambda: ours(image, work, between, prefer="time"), free, "pull", (60, None)),
                "bytes: no trace, prefer = bytes": (
                    lambda: ours(image, work, between, prefer="bytes"), None, "pull", (60, 2 * touch),
                ),
                "followed: no trace, and an image without hints": (
                    lambda: ours(plain, work, between),
                    free + 20 * round_trip / 1e3 if image.name == "node" else None, "pull", None,
                ),
                "guesses: the same, not followed either": (
                    lambda: ours(plain, work, between, prefetch={"enable": False}), None, "pull", None,
                ),
                "trace: with the trace of another start": (
                    lambda: ours(image, work, between, traces=traces), traced, "pull", (12, None),
                ),
                "trace-bytes: the same, prefer = bytes": (
                    lambda: ours(image, work, between, traces=traces, prefer="bytes"), None, "pull", (12, 1.15 * touch),
                ),
                "image: from --image, TLS and token": (
                    from_reference, free + 12 * round_trip / 1e3, None, None,
                ),
                "pull-all and unpack, then read everything": (
                    lambda: pull(image, work, between, everything=True), None, None, None,
                ),
                "all: read everything": (lambda: ours(image, work, between, everything=True), None, "pull-all", None),
            }  # fmt: skip
            rows = {name: row for name, row in rows.items() if wanted(name)}
            found = {name: [] for name in rows}
            for _ in range(RUNS):  # in turns, so that all meet the same machine
                for name, (measured, *_) in rows.items():
                    try:
                        found[name].append(measured())
                    except Late as late:
                        print(f"{name}: {late}", file=sys.stderr, flush=True)
            rivals = {}
            for name, runs in found.items():
                if not runs:
                    print(f"{name:48} {'never':>8}", flush=True)
                    continue
                _, bound, rival, most = rows[name]
                rivals[name.split()[0]] = table.row(setting, name, runs, bound, rivals.get(rival), most)
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
