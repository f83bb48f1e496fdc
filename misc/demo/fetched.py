#!/usr/bin/env python3
"""fetched.py LAYOUT CACHE BACKEND_METRICS LIMIT: what a start fetched, of how much.

Bytes come from the daemon's backend counter, chunks from the chunk maps in the cache directory
(a header of 4096 bytes, then 32 bytes a chunk, all zero = not there). Fails above LIMIT percent of the bytes.
"""

import glob
import json
import sys


def blob(layout, digest):
    with open(f"{layout}/blobs/{digest.replace(':', '/')}", "rb") as file:
        return json.load(file)


def main():
    layout, cache, metrics, limit = sys.argv[1:]
    with open(f"{layout}/index.json", encoding="utf-8") as file:
        manifest = blob(layout, json.load(file)["manifests"][0]["digest"])
    *data, bootstrap = manifest["layers"]
    total = sum(layer["size"] for layer in data)
    with open(metrics, encoding="utf-8") as file:
        fetched = json.load(file)["read_amount_total"]

    ready = chunks = 0
    for path in glob.glob(f"{cache}/**/*.chunk_map", recursive=True):
        with open(path, "rb") as file:
            records = file.read()[4096:]
        chunks += len(records) // 32
        ready += sum(any(records[start : start + 32]) for start in range(0, len(records), 32))

    def line(name, text):
        print(f"  {name:<34} {text}")

    share = 100 * fetched / total
    mib = 1 << 20
    line("metadata, whole before the mount", f"{bootstrap['size'] / mib:.1f} MiB")
    line("data fetched", f"{fetched / mib:.1f} of {total / mib:.1f} MiB compressed ({share:.1f} %)")
    line("chunks fetched", f"{ready} of {chunks} in the blobs that were touched")
    if fetched == 0 or ready == 0:
        sys.exit("demo: nothing was counted as fetched; that cannot be")
    if share > float(limit):
        sys.exit(f"demo: more than {limit} % of the compressed bytes were fetched")


main()
