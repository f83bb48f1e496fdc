"""Writes an eStargz layer from a plain tar, and its index as a file of its own.

    estargz.py TAR LAYER INDEX [CHUNK_SIZE]

Made from the published description of the format alone: every file's data begins a gzip member of its own,
every chunk of a larger file too; what follows a file's data in the tar (padding, the next headers) is in the
member of its last chunk. The last members are the index in a tar of its own, and a footer of 51 bytes.
"""

import base64
import datetime
import hashlib
import json
import struct
import sys
import tarfile
import zlib

LANDMARK = ".no.prefetch.landmark"
KINDS = {
    tarfile.REGTYPE: "reg", tarfile.AREGTYPE: "reg", tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "symlink",
    tarfile.LNKTYPE: "hardlink", tarfile.CHRTYPE: "char", tarfile.BLKTYPE: "block", tarfile.FIFOTYPE: "fifo",
}


class Layer:
    """A file of gzip members."""

    def __init__(self):
        self.bytes = bytearray()
        self.member = None

    def begin(self):
        """Ends the member and begins the next; its place."""
        self.end()
        self.member = zlib.compressobj(9, zlib.DEFLATED, 31)
        return len(self.bytes)

    def end(self):
        if self.member:
            self.bytes += self.member.flush()
        self.member = None

    def write(self, data):
        if not self.member:
            self.begin()
        self.bytes += self.member.compress(data)


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def padded(data):
    return data + bytes(-len(data) % 512)


def clean(name):
    return name.removeprefix("./").strip("/")


def entry_of(member):
    entry = {"name": clean(member.name), "type": KINDS[member.type]}
    if member.isdir():
        entry["name"] += "/"
    if member.isreg() and member.size:
        entry["size"] = member.size
    time = datetime.datetime.fromtimestamp(int(member.mtime), datetime.timezone.utc)
    entry["modtime"] = time.strftime("%Y-%m-%dT%H:%M:%SZ")
    if member.islnk():
        entry["linkName"] = clean(member.linkname)
    elif member.issym():
        entry["linkName"] = member.linkname
    entry.update(mode=member.mode, uid=member.uid, gid=member.gid)
    if member.ischr() or member.isblk():
        entry.update(devMajor=member.devmajor, devMinor=member.devminor)
    xattrs = {
        key.removeprefix("SCHILY.xattr."): base64.b64encode(value.encode("utf-8", "surrogateescape")).decode()
        for key, value in member.pax_headers.items()
        if key.startswith("SCHILY.xattr.")
    }
    if xattrs:
        entry["xattrs"] = xattrs
    return entry


def add_data(layer, entries, entry, data, chunk_size):
    """Appends the data of a file, and what the index says of each of its chunks."""
    if data:
        entry["digest"] = sha256(data)
    for at in range(0, len(data), chunk_size):
        chunk = data[at:at + chunk_size]
        if at:
            entry = {"name": entry["name"], "type": "chunk", "chunkOffset": at}
        entry["offset"] = layer.begin()
        if at + chunk_size <= len(data):
            entry["chunkSize"] = chunk_size
        entry["chunkDigest"] = sha256(chunk)
        layer.write(chunk)
        entries.append(entry)
    if not data:
        entries.append(entry)
    layer.write(bytes(-len(data) % 512))


def tar_header(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o444
    return info.tobuf(tarfile.GNU_FORMAT)


def footer(offset):
    extra = b"SG" + struct.pack("<H", 22) + b"%016xSTARGZ" % offset
    header = b"\x1f\x8b\x08\x04" + bytes(4) + b"\x00\xff" + struct.pack("<H", len(extra)) + extra
    return header + b"\x01\x00\x00\xff\xff" + bytes(8)


def main(source, target, index, chunk_size="0x400000"):
    chunk_size = int(chunk_size, 0)
    with open(source, "rb") as file:
        tar = file.read()
    layer, entries = Layer(), []
    layer.write(tar_header(LANDMARK, 1))
    mark = {"name": LANDMARK, "type": "reg", "size": 1, "modtime": "1970-01-01T00:00:00Z", "mode": 0o644}
    add_data(layer, entries, mark, b"\x0f", chunk_size)
    for member in tarfile.open(source):
        layer.write(tar[member.offset:member.offset_data])
        entry = entry_of(member)
        data = tar[member.offset_data:member.offset_data + member.size] if member.isreg() else b""
        add_data(layer, entries, entry, data, chunk_size)
    # As Go's encoder writes it.
    text = json.dumps({"version": 1, "entries": entries}, indent="\t").encode()
    at = layer.begin()
    layer.write(tar_header("stargz.index.json", len(text)) + padded(text) + bytes(1024))
    layer.end()
    with open(target, "wb") as file:
        file.write(layer.bytes + footer(at))
    with open(index, "wb") as file:
        file.write(text)


main(*sys.argv[1:])
