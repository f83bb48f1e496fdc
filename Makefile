# The front door. `make` or `make help` lists the targets.
# CARGO_TARGET_DIR, PREFIX and DESTDIR are honoured.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test check build bench doc fuzz soak install clean

PREFIX ?= /usr/local
PROGRAMS := nydusd nydusctl nydus-image
TARGET := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),$(CURDIR)/target)
FUZZ_SECONDS ?= 60
SOAK_KILLS ?= 500
SOAK_SUPERVISED_KILLS ?= 1000
SOAK_MOUNTS ?= 1000
SOAK_MINUTES ?= 20
SOAK_ENTRIES ?= 1000000
export CARGO_TARGET_DIR := $(TARGET)

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install the Debian packages that demo, tests and bench use (root; nothing to do if present)
	@misc/setup.sh

demo: setup ## A real image: built, converted, mounted lazily, run (release build, root)
	@cargo build --release --workspace --bins
	@BIN=$(TARGET)/release misc/demo/demo.sh

test: setup ## All set-up, then every test (root mounts for real; otherwise each skip says why)
	@cargo build --workspace --profile fast --bins --tests
	@cargo test --workspace --profile fast

check: ## Format, lints, rustdoc: no warning passes
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets --profile fast -- -D warnings
	@$(MAKE) --no-print-directory doc

build: ## Release binaries, their man pages and shell completions
	@cargo build --release --workspace --bins
	@rm -rf $(TARGET)/release/share
	@for program in $(PROGRAMS); do $(TARGET)/release/$$program pages $(TARGET)/release/share; done
	@ls -lh $(addprefix $(TARGET)/release/,$(PROGRAMS))

bench: setup ## Medians of whole scenarios on this machine (release build, root), then criterion
	@cargo build --release --workspace --bins
	@BIN=$(TARGET)/release misc/bench/bench.sh
	@cargo bench --workspace --features storage/testing --benches

doc: ## rustdoc of the workspace; a warning is an error
	@RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items

fuzz: ## Every fuzz target for FUZZ_SECONDS (60) each; installs cargo-fuzz if missing
	@FUZZ_SECONDS=$(FUZZ_SECONDS) misc/fuzz.sh

soak: setup ## The long runs: SOAK_KILLS (500) kills under readers, SOAK_SUPERVISED_KILLS (1000) that they must not notice, SOAK_MOUNTS (1000) live mounts, SOAK_MINUTES (20) of load, SOAK_ENTRIES (1000000) in an image, the corpus images
	@cargo build --workspace --profile fast --bins --tests
	@misc/images/make-images misc/.cache/images debian python node
	@NYDUS_TEST_KILLS=$(SOAK_KILLS) NYDUS_TEST_SUPERVISED_KILLS=$(SOAK_SUPERVISED_KILLS) \
		NYDUS_TEST_MOUNTS=$(SOAK_MOUNTS) NYDUS_TEST_MINUTES=$(SOAK_MINUTES) NYDUS_TEST_ENTRIES=$(SOAK_ENTRIES) \
		NYDUS_TEST_CORPUS=$(CURDIR)/misc/.cache/images \
		cargo test --workspace --profile fast --test e2e -- --nocapture corpus kills memory mounts:: steady::

install: build ## Build, then copy to $(DESTDIR)$(PREFIX): programs, man pages, completions, systemd unit
	@install -D -m 0755 -t $(DESTDIR)$(PREFIX)/bin $(addprefix $(TARGET)/release/,$(PROGRAMS))
	@find $(TARGET)/release/share -type f -printf '%P\n' | while read -r page; do \
		install -D -m 0644 "$(TARGET)/release/share/$$page" "$(DESTDIR)$(PREFIX)/share/$$page"; done
	@for unit in misc/packaging/*.service; do sed 's|/usr/local/bin/|$(PREFIX)/bin/|' $$unit | \
		install -D -m 0644 /dev/stdin "$(DESTDIR)$(PREFIX)/lib/systemd/system/$${unit##*/}"; done

clean: ## Remove build products and cached images
	@cargo clean
	@rm -rf misc/.cache
