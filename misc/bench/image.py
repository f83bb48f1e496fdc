"""The images that benchmarks start, and nydusd serving them."""

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

from machine import BIN, HERE, LIMIT, Failed, process, run, unmount
from registry import fetch

LAYOUTS = f"{HERE}/misc/.cache/images"
PATH = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
PROGRAMS = {
    "python": (["python3", "/srv/app/main.py"], PATH | {"PYTHONDONTWRITEBYTECODE": "1"}),
    "node": (["node", "/srv/app/main.js"], PATH | {"NODE_PATH": "/usr/share/nodejs:/usr/lib/nodejs"}),
}


class Image:
    """One image in the registry, as it came (NAME:oci) and converted (NAME:nydus)."""

    def __init__(self, name, host, work):
        self.name, self.work = name, work
        self.program, self.environment = PROGRAMS[name]
        layout = f"oci:{LAYOUTS}/{name}:latest"
        run("skopeo", "copy", "--quiet", "--dest-tls-verify=false", layout, f"docker://{host}/{name}:oci")
        told, self.manifest, self.bootstrap = self.convert(layout, host, "nydus")
        chunks = sum(layer["chunks"] for layer in told["layers"])
        # What a daemon may hold while it streams.
        # Percent of a cold start that a core may hash.
        self.hash_limit = {"blake3": 3, "sha256": 8}[told["digester"]]
        self.memory_limit = 15_000_000 + 64 * chunks + 4 * told["chunk_size"]
        *self.layers, _ = self.manifest["layers"]
        # The registry is to answer from memory: its disk is not what is measured.
        for layer in self.layers:
            fetch(f"http://{host}/v2/{name}/blobs/{layer['digest']}")
        with open(f"{LAYOUTS}/{name}/index.json", encoding="utf-8") as file:
            digest = json.load(file)["manifests"][0]["digest"].replace(":", "/")
        with open(f"{LAYOUTS}/{name}/blobs/{digest}", encoding="utf-8") as file:
            sizes = [layer["size"] for layer in json.load(file)["layers"]]
        self.source_bytes, self.bytes = sum(sizes), sum(layer["size"] for layer in self.layers)

    def convert(self, layout, host, tag, *options):
        """Converts it to NAME:tag; what was told, the manifest, and where its bootstrap lies."""
        told = f"{self.work}/{self.name}-{tag}.json"
        if "DIGESTER" in os.environ:
            options = [*options, "--digester", os.environ["DIGESTER"]]
        target = f"docker://{host}/{self.name}:{tag}"
        run(f"{BIN}/nydus-image", "convert", *options, "--output-json", told, layout, target)
        with open(told, encoding="utf-8") as file:
            told = json.load(file)
        kind = "application/vnd.oci.image.manifest.v1+json"
        manifest = json.loads(fetch(f"http://{host}/v2/{self.name}/manifests/{tag}", kind))
        blob = f"{self.work}/{self.name}-{tag}.tgz"
        with open(blob, "wb") as file:
            file.write(fetch(f"http://{host}/v2/{self.name}/blobs/{manifest['layers'][-1]['digest']}"))
        bootstrap = f"{self.work}/{self.name}-{tag}.boot"
        with tarfile.open(blob) as archive, open(bootstrap, "wb") as file:
            shutil.copyfileobj(archive.extractfile("image/image.boot"), file)
        return told, manifest, bootstrap

    def without_hints(self, host):
        """The same image as one that was converted without hints."""
        other = copy.copy(self)
        layout = f"oci:{LAYOUTS}/{self.name}:latest"
        _, _, other.bootstrap = self.convert(layout, host, "plain", "--hints", "off")
        return other

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
def nydusd(scratch, image, cache, source, environment=None, program=f"{BIN}/nydusd", level="warn"):
    """A daemon on the image; yields (process, mount point) as soon as the mount is there. `source`: flags."""
    point = f"{scratch}/mount"
    os.makedirs(point, exist_ok=True)
    before = os.stat(point).st_dev
    command = [program, "fuse", "--mountpoint", point, "--apisock", f"{scratch}/api.sock", "--log-level", level]
    command += [flag.format(cache=cache, bootstrap=image.bootstrap) for flag in source]
    with open(f"{scratch}/nydusd.log", "w+", encoding="utf-8") as log:
        try:
            with process(command, stdout=log, stderr=log, env=environment) as child:
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
