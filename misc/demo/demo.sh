#!/bin/bash
# The whole path on a real image: OCI layers in, a running container out.
#
#   BIN   directory of the binaries (target/release)
#
# Everything that is mounted is unmounted at the end, however the end comes. The image stays in
# misc/.cache, so that a second run takes seconds.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
bin=${BIN:-$here/target/release}
images=$here/misc/.cache/images
limit=30 # percent of the compressed bytes that a start may fetch

fail() { echo "demo: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "mounting needs root"
[ -e /dev/fuse ] || fail "there is no /dev/fuse; load the fuse module"
for program in nydusd nydusctl nydus-image; do [ -x "$bin/$program" ] || fail "$bin/$program is missing; run make build"; done

work=$(mktemp -d "${TMPDIR:-/var/tmp}/nydus-demo.XXXXXX")
daemon=
finish() {
  local status=$?
  mountpoint -q "$work/merged" && umount "$work/merged"
  if [ -n "$daemon" ] && kill -TERM "$daemon" 2>/dev/null; then wait "$daemon" || true; fi
  mountpoint -q "$work/image" && umount -l "$work/image"
  [ "$status" = 0 ] || [ ! -s "$work/nydusd.log" ] || { echo "--- nydusd.log"; tail -20 "$work/nydusd.log"; } >&2
  rm -rf "$work"
}
trap finish EXIT

now() { date +%s%N; }
ms() { echo "$((($2 - $1) / 1000000)) ms"; }
mib() { python3 -c 'import sys; print("%.1f MiB" % (int(sys.argv[1]) / 1048576))' "$1"; }
say() { printf '  %-34s %s\n' "$1" "$2"; }

echo "== an image from Debian packages: Python with numpy, pandas, flask in 5 layers"
"$here/misc/images/make-images" "$images" python
source_bytes=$(du -sb "$images/python/blobs" | cut -f1)
say "OCI layers, gzip" "$(mib "$source_bytes")"

echo "== convert: OCI layout to OCI layout"
start=$(now)
"$bin/nydus-image" convert "oci:$images/python:latest" "oci:$work/nydus:latest" >"$work/convert.log" 2>&1 ||
  { cat "$work/convert.log" >&2; fail "the conversion failed"; }
say "time" "$(ms "$start" "$(now)")"

echo "== mount lazily, run /srv/app/main.py in a chroot over overlayfs"
mkdir -p "$work"/{image,upper,overlay,merged,cache}
start=$(now)
"$bin/nydusd" fuse --image "oci:$work/nydus:latest" --cache-dir "$work/cache" --mountpoint "$work/image" \
  --apisock "$work/api.sock" >"$work/nydusd.log" 2>&1 &
daemon=$!
until mountpoint -q "$work/image"; do
  kill -0 "$daemon" 2>/dev/null || fail "nydusd ended"
  [ $(($(now) - start)) -lt 30000000000 ] || fail "nydusd is not ready after 30 s"
  sleep 0.005
done
mounted=$(now)
mount -t overlay overlay -o "lowerdir=$work/image,upperdir=$work/upper,workdir=$work/overlay" "$work/merged"
printed=$(chroot "$work/merged" /usr/bin/env PYTHONDONTWRITEBYTECODE=1 python3 /srv/app/main.py)
ready=$(now)
case $printed in ready*) ;; *) fail "the program printed: $printed" ;; esac
say "mounted after" "$(ms "$start" "$mounted")"
say "the program printed" "$printed"
say "ready after" "$(ms "$start" "$ready")"
"$bin/nydusctl" -S "$work/api.sock" --raw metrics cache >"$work/cache.json"
"$bin/nydusctl" -S "$work/api.sock" --raw metrics backend >"$work/backend.json"
"$here/misc/demo/fetched.py" "$work/nydus" "$work/cache" "$work/backend.json" "$limit"

umount "$work/merged"
kill -TERM "$daemon"
wait "$daemon" || fail "nydusd ended with $?"
daemon=
mountpoint -q "$work/image" && fail "still mounted after SIGTERM"

echo "== beside it: unpack the whole image (umoci), then run"
start=$(now)
umoci unpack --image "$images/python:latest" "$work/bundle" >/dev/null 2>&1 || fail "umoci failed"
unpacked=$(now)
chroot "$work/bundle/rootfs" /usr/bin/env PYTHONDONTWRITEBYTECODE=1 python3 /srv/app/main.py >/dev/null
say "unpacked after" "$(ms "$start" "$unpacked")"
say "ready after" "$(ms "$start" "$(now)")"
say "written to disk" "$(mib "$(du -s --block-size=1 "$work/bundle/rootfs" | cut -f1)")"
echo "== done: unmounted and clean"
