#!/usr/bin/env python3
"""The image root digest of a directory tree: a second implementation, from FORMAT.md alone.

    root_digest.py [--chunk-size N] [--root-mtime SECONDS[.NANOSECONDS]] DIRECTORY

Prints `sha256:HEX`. Run as root, so that every attribute and xattr can be read. SHA-256 only: BLAKE3 is
not in Python's library. `--root-mtime` replaces the root directory's time, which a bootstrap need not
take from the tree.
"""

import argparse
import hashlib
import os
import stat
import struct

SHA256 = 1  # the digester's code


def h(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def u32(value):
    return struct.pack("<I", value)


def sized(value):
    return u32(len(value)) + value


def xattrs(path):
    pairs = sorted(
        (os.fsencode(name), os.getxattr(path, name, follow_symlinks=False))
        for name in os.listxattr(path, follow_symlinks=False)
    )
    return h(b"rafs-xattrs-v1\0", u32(len(pairs)), *(sized(k) + sized(v) for k, v in pairs))


def hard_links(root):
    """Every regular file with two or more names here: (device, inode) -> its sorted paths."""
    names = {}
    pending = [b""]
    while pending:
        directory = pending.pop()
        for entry in os.scandir(os.path.join(root, directory)):
            path = os.path.join(directory, entry.name)
            if entry.is_dir(follow_symlinks=False):
                pending.append(path)
            elif entry.is_file(follow_symlinks=False):
                found = entry.stat(follow_symlinks=False)
                if found.st_nlink > 1:
                    names.setdefault((found.st_dev, found.st_ino), []).append(path)
    return {inode: sorted(paths) for inode, paths in names.items() if len(paths) > 1}


class Image:
    def __init__(self, root, chunk_size, root_mtime):
        self.root = root
        self.chunk_size = chunk_size
        self.root_mtime = root_mtime
        self.links = hard_links(root)

    def regular(self, path, size):
        digests = []
        with open(path, "rb") as file:
            while chunk := file.read(self.chunk_size):
                digests.append(h(chunk))
        return h(b"rafs-file-v1\0", struct.pack("<Q", size), u32(len(digests)), *digests)

    def directory(self, relative):
        names = sorted(os.listdir(os.path.join(self.root, relative)))
        children = (sized(name) + self.node(os.path.join(relative, name)) for name in names)
        return h(b"rafs-directory-v1\0", u32(len(names)), *children)

    def node(self, relative):
        path = os.path.join(self.root, relative)
        found = os.lstat(path)
        links = bytes(32)
        if stat.S_ISREG(found.st_mode):
            data = self.regular(path, found.st_size)
            paths = self.links.get((found.st_dev, found.st_ino))
            if paths:
                links = h(b"rafs-links-v1\0", u32(len(paths)), *map(sized, paths))
        elif stat.S_ISDIR(found.st_mode):
            data = self.directory(relative)
        elif stat.S_ISLNK(found.st_mode):
            data = h(b"rafs-symlink-v1\0", os.readlink(path))
        elif stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
            device = u32(os.major(found.st_rdev)) + u32(os.minor(found.st_rdev))
            data = h(b"rafs-device-v1\0", device)
        else:
            data = h(b"rafs-special-v1\0")
        seconds, nanoseconds = divmod(found.st_mtime_ns, 1_000_000_000)
        if relative == b"" and self.root_mtime is not None:
            seconds, nanoseconds = self.root_mtime
        return h(
            b"rafs-node-v1\0",
            struct.pack("<IIIqI", found.st_mode, found.st_uid, found.st_gid, seconds, nanoseconds),
            xattrs(path),
            links,
            data,
        )

    def digest(self):
        return h(b"rafs-image-v1\0", u32(SHA256), u32(self.chunk_size), self.node(b""))


def time(text):
    seconds, _, fraction = text.partition(".")
    return int(seconds), int(fraction.ljust(9, "0")) if fraction else 0


def main():
    parser = argparse.ArgumentParser(description="Print the image root digest of a directory tree.")
    parser.add_argument("--chunk-size", type=lambda text: int(text, 0), default=1 << 20)
    parser.add_argument("--root-mtime", type=time)
    parser.add_argument("directory", type=os.fsencode)
    arguments = parser.parse_args()
    image = Image(arguments.directory, arguments.chunk_size, arguments.root_mtime)
    print(f"sha256:{image.digest().hex()}")


if __name__ == "__main__":
    main()
