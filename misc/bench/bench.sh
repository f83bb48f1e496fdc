#!/bin/bash
# Whole scenarios on one machine: medians of RUNS (5) with the spread, and what they are measured
# against. Release build; needs root, a Debian mirror the first time, and an idle machine.
#
#   BIN     directory of the binaries (target/release)
#   RUNS    repetitions (5)
#   IMAGE   image of misc/images/make-images to measure with (node: tens of thousands of files)
#   ONLY    one of create reference convert mount fetch fuse variants mounts coldstart guest (all); the .py have knobs of their own
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
bin=${BIN:-$here/target/release}
runs=${RUNS:-5}
name=${IMAGE:-node}
images=$here/misc/.cache/images
fail() { echo "bench: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "mounting needs root"
export BIN=$bin RUNS=$runs
# The ways that the kernel offers a server, side by side.
variants() {
  export VARIANTS=${VARIANTS:-all} ROWS=${ROWS:-stat,stat-2,readdir,tar-warm,tar-cold,sequential,sequential-4,random,random-2}
  RUNS=$((runs < 3 ? runs : 3)) "$here/misc/bench/fuse.py"
}
case "${ONLY:-}" in
  fuse | mounts | coldstart | guest) exec "$here/misc/bench/$ONLY.py" ;;
  variants) variants; exit ;;
esac

"$here/misc/images/make-images" "$images" "$name"
work=$(mktemp -d "${TMPDIR:-/var/tmp}/nydus-bench.XXXXXX")
daemon=
stop_daemon() {
  if [ -n "$daemon" ]; then kill -TERM "$daemon" 2>/dev/null || true; wait "$daemon" 2>/dev/null || true; daemon=; fi
  mountpoint -q "$work/mount" && umount -l "$work/mount" || true
}
trap 'stop_daemon; rm -rf "$work"' EXIT
mkdir -p "$work/mount"
umoci unpack --image "$images/$name:latest" "$work/bundle" >/dev/null 2>&1
root=$work/bundle/rootfs

# milliseconds COMMAND...: its wall time on stdout, its output nowhere. What `before_COMMAND` does takes no time.
milliseconds() {
  local start end
  if declare -F "before_$1" >/dev/null; then "before_$1"; fi
  start=$(date +%s%N)
  "$@" >"$work/out" 2>&1 || { cat "$work/out" >&2; fail "$* failed"; }
  end=$(date +%s%N)
  echo $(((end - start) / 1000000))
}
# median WHAT UNIT < numbers
median() { sort -n | awk -v what="$1" -v unit="$2" '{v[NR]=$1} END {printf "%-44s %8s %s   (%s to %s, %d runs)\n", what, v[int((NR+1)/2)], unit, v[1], v[NR], NR}'; }
wanted() { [ -z "${ONLY:-}" ] || [ "$ONLY" = "$1" ]; }

echo "image $name: $(find "$root" | wc -l) entries, $(du -s --block-size=1M "$root" | cut -f1) MiB unpacked; $(nproc) cores; $("$bin/nydus-image" --version | tr '\n\t' '  ' | cut -c1-60)"

before_build() { rm -rf "$work/blobs" && mkdir "$work/blobs"; }
build() { "$bin/nydus-image" create --compressor zstd --bootstrap "$work/boot" --blob-dir "$work/blobs" "$root"; }
if wanted create; then
  before_squash() { rm -f "$work/squash"; }
  squash() { mksquashfs "$root" "$work/squash" -comp zstd -Xcompression-level 3 -no-progress -quiet; }
  milliseconds build >/dev/null; milliseconds squash >/dev/null # both warm
  : >"$work/ours"; : >"$work/theirs"
  for ((i = 0; i < runs; i++)); do # in turns, so that both meet the same machine
    milliseconds build >>"$work/ours"
    milliseconds squash >>"$work/theirs"
  done
  median "create, zstd" ms <"$work/ours"
  median "mksquashfs -comp zstd -Xcompression-level 3" ms <"$work/theirs"
  ours=$(($(du -sb "$work/blobs" | cut -f1) + $(stat -c %s "$work/boot")))
  theirs=$(stat -c %s "$work/squash")
  awk -v a="$ours" -v b="$theirs" 'BEGIN {printf "%-44s %8.3f x   (%d and %d bytes)\n", "size, ours to squashfs", a / b, a, b}'
  before_build_lz4() { rm -rf "$work/lz4" && mkdir "$work/lz4"; }
  build_lz4() { "$bin/nydus-image" create --compressor lz4_block --bootstrap "$work/lz4/boot" --blob "$work/lz4/blob" "$root"; }
  before_erofs() { rm -f "$work/erofs"; }
  erofs() { mkfs.erofs -zlz4 --quiet "$work/erofs" "$root"; }
  milliseconds build_lz4 >/dev/null; milliseconds erofs >/dev/null
  : >"$work/ours"; : >"$work/theirs"
  for ((i = 0; i < runs; i++)); do
    milliseconds build_lz4 >>"$work/ours"
    milliseconds erofs >>"$work/theirs"
  done
  median "create, lz4_block" ms <"$work/ours"
  median "mkfs.erofs -zlz4" ms <"$work/theirs"
  rm -rf "$work/lz4" "$work/erofs"
fi

# against WHAT RIVAL: the medians of what the files `ours` and `theirs` hold, and their ratio.
against() {
  median "$1" ms <"$work/ours"
  median "$2" ms <"$work/theirs"
  awk -v a="$(sort -n "$work/ours" | sed -n "$(((runs + 1) / 2))p")" -v b="$(sort -n "$work/theirs" | sed -n "$(((runs + 1) / 2))p")" \
    'BEGIN {printf "%-44s %8.2f x\n", "the first to the second", a / b}'
}

if wanted reference; then
  layer=$(find "$images/$name/blobs/sha256" -type f -printf '%s %p\n' | sort -n | tail -1 | cut -d' ' -f2)
  before_refer() { rm -f "$work/meta"; }
  refer() { "$bin/nydus-image" create --type targz-ref --features blob-toc --blob-inline-meta --blob "$work/meta" "$layer"; }
  inflate() { "$bin/builder-floor" inflate "$layer"; }
  milliseconds refer >/dev/null
  : >"$work/ours"; : >"$work/theirs"
  for ((i = 0; i < runs; i++)); do
    milliseconds refer >>"$work/ours"
    inflate >>"$work/theirs"
  done
  against "create --type targz-ref, largest layer" "inflating that layer, same library"
  awk -v a="$(stat -c %s "$work/meta")" -v b="$(stat -c %s "$layer")" 'BEGIN {printf "%-44s %8.2f %%   (%d of %d bytes)\n", "all metadata, of the layer", 100 * a / b, a, b}'
fi

if wanted convert; then
  for compressor in zstd lz4_block none; do
    before_convert() { rm -rf "$work/layout"; }
    convert() { "$bin/nydus-image" convert "oci:$images/$name:latest" "oci:$work/layout:latest" --compressor "$compressor"; }
    milliseconds convert >/dev/null
    : >"$work/ours"; : >"$work/theirs"
    for ((i = 0; i < runs; i++)); do
      milliseconds convert >>"$work/ours"
      "$bin/builder-floor" convert --compressor "$compressor" "$images/$name" >>"$work/theirs"
    done
    against "convert oci: to oci:, $compressor" "inflating, hashing and packing the same"
  done
fi

[ -e "$work/boot" ] || milliseconds build >/dev/null
cat >"$work/config.json" <<JSON
{"version": 2, "backend": {"type": "localfs", "localfs": {"dir": "$work/blobs"}},
 "cache": {"type": "filecache", "filecache": {"work_dir": "$work/cache"}}, "rafs": {"mode": "direct"}}
JSON

# Starts a daemon on a local bootstrap and an empty cache, and waits until the mount is there.
start_daemon() {
  rm -rf "$work/cache"
  "$bin/nydusd" fuse --bootstrap "$work/boot" --config "$work/config.json" --mountpoint "$work/mount" \
    --apisock "$work/api.sock" --log-level warn >"$work/nydusd.log" 2>&1 &
  daemon=$!
  until [[ $(</proc/self/mountinfo) == *" $work/mount "* ]]; do
    kill -0 "$daemon" 2>/dev/null || { cat "$work/nydusd.log" >&2; fail "nydusd ended"; }
  done
}
private_memory() { awk '/^Rss(Anon|Shmem):/ {sum += $2} END {print sum}' "/proc/$1/status"; }

if wanted mount; then
  : >"$work/ours"
  for ((i = 0; i < runs; i++)); do
    begin=$(date +%s%N)
    start_daemon
    ls "$work/mount" >/dev/null
    echo $((($(date +%s%N) - begin) / 1000000)) >>"$work/ours"
    stop_daemon
  done
  median "start, mount and first ls" ms <"$work/ours"
  : >"$work/ours"; : >"$work/memory"
  for ((i = 0; i < runs; i++)); do
    start_daemon
    milliseconds find "$work/mount" -ls >>"$work/ours"
    private_memory "$daemon" >>"$work/memory"
    stop_daemon
  done
  median "find -ls" ms <"$work/ours"
  median "nydusd after find -ls, RssAnon + RssShmem" KiB <"$work/memory"
fi

if wanted fetch; then
  read_all() { find "$work/mount" -xdev -type f -exec cat {} + >/dev/null; }
  : >"$work/ours"
  for ((i = 0; i < runs; i++)); do start_daemon; milliseconds read_all >>"$work/ours"; stop_daemon; done
  median "read every file, cold cache" ms <"$work/ours"
fi

[ -n "${ONLY:-}" ] || { "$here/misc/bench/fuse.py"; (variants); "$here/misc/bench/mounts.py"; "$here/misc/bench/coldstart.py"; "$here/misc/bench/guest.py"; }
