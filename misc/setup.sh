#!/bin/bash
# Installs what demo, tests and bench need on Debian 12. Does nothing where all is present;
# as an ordinary user it only says what is missing (the tests then skip, each with its reason).
set -euo pipefail
cd "$(dirname "$0")"

packages=(
  acl attr libcap2-bin            # names and xattrs in test images
  apache2-utils openssl           # htpasswd, a private CA
  buildah skopeo umoci mmdebstrap # real images, reference unpacks
  chromium                        # looks at pages that nydusctl draws
  cryptsetup-bin                  # veritysetup, the judge of exported disks
  docker-registry                 # the registry
  erofs-utils squashfs-tools      # fsck.erofs, the builder's rival in the bench
  fuse3 python3 util-linux mount  # mounts, the second implementation of the root digest
  fdisk python3-pip               # partitioned disks, the S3 server
  strace                          # the order in which files become durable
  qemu-system-x86 busybox-static cpio # a virtual machine: see guest/make-guest
  ca-certificates
)

missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
install_packages() {
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
}

# The S3 server of the tests: Python modules in a folder that can move with the checkout.
moto=.cache/moto
install_moto() {
  rm -rf "$moto" && mkdir -p .cache &&
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-compile \
      --target "$moto" -r moto-requirements.txt &&
    rm -rf "$moto/bin" && cp moto-requirements.txt "$moto/requirements.txt"
}

if [ ${#missing[@]} != 0 ]; then
  if [ "$(id -u)" = 0 ]; then
    install_packages
  else
    echo "setup: not root, cannot install: ${missing[*]}" >&2
  fi
fi
if ! cmp -s moto-requirements.txt "$moto/requirements.txt"; then
  echo "setup: installing moto into misc/$moto" >&2
  if ! install_moto; then
    rm -rf "$moto"
    echo "setup: moto can not be installed; is there a network and a Python package index?" >&2
    echo "setup: the tests of the s3 backend with a real server will skip" >&2
  fi
fi
guest=.cache/guest
if [ "$(id -u)" = 0 ] && ! guest/make-guest "$guest"; then
  rm -rf "$guest"
  echo "setup: the virtual machine of the tests can not be made; is there a Debian mirror?" >&2
  echo "setup: the tests that boot one will skip" >&2
fi
