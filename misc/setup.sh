#!/bin/bash
# Installs what demo, tests and bench need on Debian 12. Does nothing where all is present;
# as an ordinary user it only says what is missing (the tests then skip, each with its reason).
set -euo pipefail

packages=(
  acl attr libcap2-bin            # names and xattrs in test images
  apache2-utils openssl           # htpasswd, a private CA
  buildah skopeo umoci mmdebstrap # real images, reference unpacks
  chromium                        # looks at pages that nydusctl draws
  docker-registry                 # the registry
  erofs-utils squashfs-tools      # fsck.erofs, the builder's rival in the bench
  fuse3 python3 util-linux mount  # mounts, the second implementation of the root digest
  ca-certificates
)

missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} = 0 ]; then exit 0; fi
if [ "$(id -u)" != 0 ]; then
  echo "setup: not root, cannot install: ${missing[*]}" >&2
  exit 0
fi
echo "setup: installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Services that packages start (docker-registry) stay off: the tests start their own on free ports.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
  trap 'rm -f "$log" "$policy"' EXIT
fi
if ! { apt-get -qq update && apt-get -qq -y install --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  tail -20 "$log" >&2
  echo "setup: apt-get failed; is there a network and a Debian mirror?" >&2
  exit 1
fi
