#!/usr/bin/env python3
"""Virtual machines: virtiofs and vhost-user-blk of ours, and virtiofsd with an unpacked copy of the same tree.

One guest after the other on an emulated processor, each operation timed inside of it, what is read in the
host's memory and not in the guest's. An emulated processor makes all of it slow alike: compare ratios, and how
often the guest was interrupted for answers, which does not depend on the processor.

    BIN    directory of nydusd and nydus-image (target/release)
    IMAGE  image of misc/images/make-images (python)
    RUNS   rounds of all guests (3); the medians are shown
"""
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("BIN", HERE / "target/release"))
NAME = os.environ.get("IMAGE", "python")
RUNS = int(os.environ.get("RUNS", "3"))
GUEST = HERE / "misc/.cache/guest"
IMAGES = HERE / "misc/.cache/images"
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"

# What is measured, in the guest: `sequential` and `random` read files whose names it knows; `walk` looks at each
# entry of the tree with nothing in the guest's memory, `again` with all of it there.
JOB = r"""
{mount}
ms() {{ awk '{{printf "%d", $1 * 1000}}' /proc/uptime; }}
drop() {{ echo 3 > /proc/sys/vm/drop_caches; }}
interrupts() {{ awk '/virtio/ {{ sum += $2 }} END {{ print sum }}' /proc/interrupts; }}
row() {{
    name=$1; shift
    i=$(interrupts); a=$(ms); "$@" > /dev/null 2>&1; b=$(ms); j=$(interrupts)
    echo "row: $name $((b - a)) $((j - i))"
}}
# Five times, for the clock counts in steps of 10 ms.
sequential() {{ for i in 1 2 3 4 5; do echo 1 > /proc/sys/vm/drop_caches; xargs cat < /large; done; }}
whole() {{ tar -cf - -C /mnt . | cat > /dev/null; }}
# What it looks for there is not; it has to ask each entry.
walk() {{ find /mnt -size +1000000000k; }}
cat > /tmp/random.py <<'END'
import os, random, sys
random.seed(5)
files = []
for top, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = os.path.join(top, name)
        if os.path.isfile(path) and not os.path.islink(path) and os.path.getsize(path) > 1 << 20:
            files.append((os.open(path, os.O_RDONLY), os.path.getsize(path)))
files.sort(key=lambda one: one[1])
for fd, size in files:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
for _ in range(3000):
    fd, size = random.choice(files)
    os.pread(fd, 4096, random.randrange(size >> 12) << 12)
END
mkdir -p /o /root2 && mount -t tmpfs t /o && mkdir /o/u /o/w
mount -t overlay -o lowerdir=/mnt,upperdir=/o/u,workdir=/o/w o /root2
mkdir -p /root2/mnt && mount --bind /mnt /root2/mnt && cp /tmp/random.py /root2/tmp/ && mount -t proc p /root2/proc
row ready chroot /root2 /usr/bin/python3 -c 'import json, decimal, email'
find /mnt -type f -size +1024k > /large
sequential > /dev/null
row sequential sequential
chroot /root2 /usr/bin/python3 /tmp/random.py /mnt > /dev/null 2>&1
drop; row random chroot /root2 /usr/bin/python3 /tmp/random.py /mnt
walk > /dev/null
drop; row walk walk
row walk-again walk
whole > /dev/null
drop; row tar whole
true
"""


def guest(work, mount, devices):
    """Rows that a guest prints, by name: milliseconds and interrupts."""
    job = work / "job"
    job.write_text(JOB.format(mount=mount))
    archive = subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], input=b"job\n", cwd=work, stdout=subprocess.PIPE, check=True)
    initrd = work / "initrd"
    initrd.write_bytes((GUEST / "initrd").read_bytes() + archive.stdout)
    command = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "1024", "-smp", "1",
               "-nographic", "-nodefaults", "-serial", "stdio", "-no-reboot", "-kernel", GUEST / "vmlinuz", "-initrd", initrd,
               "-append", "console=ttyS0 panic=-1 quiet",
               "-object", "memory-backend-memfd,id=mem,size=1024M,share=on", "-numa", "node,memdev=mem", *devices]
    printed = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=600, check=True).stdout.decode(errors="replace")
    if "guest: end 0" not in printed:
        sys.exit(f"bench: the guest failed:\n{printed}")
    rows = {}
    for line in printed.splitlines():
        if line.startswith("row: "):
            _, name, time_taken, interrupts = line.split()
            rows[name] = int(time_taken), int(interrupts)
    return rows


def wait(path, child):
    while not path.exists():
        if child.poll() is not None:
            sys.exit(f"bench: {child.args[0]} ended before it served")
        time.sleep(0.02)


def serve(work, command, sockets):
    """Starts a server, and waits for its sockets."""
    log = open(work / "server.log", "wb")
    child = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
    for socket in sockets:
        wait(socket, child)
    return child


def fs(socket):
    return ["-chardev", f"socket,id=fs,path={socket}", "-device", "vhost-user-fs-pci,chardev=fs,tag=myfs,queue-size=1024"]


def disks(sockets):
    return [word for number, socket in enumerate(sockets) for word in (
        "-chardev", f"socket,id=d{number},path={socket}", "-device", f"vhost-user-blk-pci,chardev=d{number},num-queues=1")]


def main():
    subprocess.run([HERE / "misc/images/make-images", IMAGES, NAME], check=True)
    subprocess.run([HERE / "misc/guest/make-guest", GUEST], check=True)
    work = pathlib.Path(tempfile.mkdtemp(prefix="nydus-guest.", dir="/var/tmp"))
    try:
        measure(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def measure(work):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
    image, tree = work / "nydus", work / "bundle/rootfs"
    subprocess.run([BIN / "nydus-image", "convert", f"oci:{IMAGES / NAME}", f"oci:{image}"], **quiet)
    subprocess.run(["umoci", "unpack", "--image", f"{IMAGES / NAME}:latest", work / "bundle"], **quiet)
    socket = work / "device.sock"
    source = ["--image", f"oci:{image}", "--cache-dir", work / "cache", "--trace", "off"]
    subprocess.run([BIN / "nydusd", "prefetch", "--all", *source[:4]], **quiet)

    def virtiofs(command):
        socket.unlink(missing_ok=True)
        child = serve(work, command, [socket])
        rows = guest(work, "mount -t virtiofs myfs /mnt || exit 3", fs(socket))
        child.terminate()
        child.wait()
        return rows

    def blk():
        child = serve(work, [BIN / "nydusd", "blk", "--split", "--sock", socket, *source], [socket])
        time.sleep(0.5)
        sockets = [socket, *sorted(work.glob("device.sock.*"), key=lambda path: int(path.suffix[1:]))]
        letters = [chr(ord("a") + number) for number in range(len(sockets))]
        options = ",".join(["ro", *(f"device=/dev/vd{letter}" for letter in letters[1:])])
        rows = guest(work, f"mount -t erofs -o {options} /dev/vda /mnt || exit 3", disks(sockets))
        child.terminate()
        child.wait()
        return rows

    kinds = {
        "virtiofsd, unpacked": lambda: virtiofs([VIRTIOFSD, f"--socket-path={socket}", "-o", f"source={tree}", "-o", "cache=auto"]),
        "nydusd virtiofs": lambda: virtiofs([BIN / "nydusd", "virtiofs", "--sock", socket, *source]),
        "nydusd blk, EROFS": blk,
    }
    found = {kind: [] for kind in kinds}
    for _ in range(RUNS):
        for kind, run in kinds.items():
            found[kind].append(run())
    names = ["ready", "sequential", "random", "walk", "walk-again", "tar"]
    for column, what in enumerate(["milliseconds inside the guest", "interrupts of the guest by its devices"]):
        print(f"image {NAME}, medians of {RUNS}, {what} (ratio to virtiofsd: less is better)")
        print(f"{'':24}" + "".join(f"{name:>18}" for name in names))
        base = None
        for kind, rounds in found.items():
            medians = [statistics.median(rows[name][column] for rows in rounds) for name in names]
            base = base or medians
            cells = [f"{value:.0f} ({value / max(one, 1):.2f})" for value, one in zip(medians, base)]
            print(f"{kind:24}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
