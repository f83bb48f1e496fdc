#!/bin/bash
# Runs every fuzz target of tests/fuzz for FUZZ_SECONDS each. cargo-fuzz wants nightly's sanitizer
# flags; with RUSTC_BOOTSTRAP the stable compiler of this project takes them.
set -euo pipefail
cd "$(dirname "$0")/../tests/fuzz" || { echo "fuzz: there are no fuzz targets" >&2; exit 1; }
command -v cargo-fuzz >/dev/null || cargo install --locked --quiet cargo-fuzz
export RUSTC_BOOTSTRAP=1
unset CARGO_TARGET_DIR # the sanitizer's flags would rebuild everything in the shared directory
mapfile -t targets < <(cargo fuzz list)
[ ${#targets[@]} -gt 0 ] || { echo "fuzz: tests/fuzz lists no target" >&2; exit 1; }
for target in "${targets[@]}"; do
  echo "fuzz: $target for ${FUZZ_SECONDS:-60} s"
  mkdir -p "corpus/$target"
  seeds=()
  [ ! -d "seeds/$target" ] || seeds+=("seeds/$target")
  cargo fuzz run "$target" "corpus/$target" "${seeds[@]}" -- -max_total_time="${FUZZ_SECONDS:-60}" -rss_limit_mb=4096
done
