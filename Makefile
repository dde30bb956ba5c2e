# make demo        a guest in a window of text, its QEMU replaced three times
# make install     segue for all users, man pages, bash completion and units for systemd, below
#                  /usr/local (or PREFIX=...)
# make test        everything but the long tests, on real QEMU 7.2, 10.0 and 11.1
# make test-nested  parts of them on KVM with vhost-net and VFIO, in a nested guest
# make check       style and types
# Each installs what it needs (Debian packages by apt-get, as root or by sudo; Python packages
# into .venv) and is quick when nothing changed. Downloads are cached outside the checkout, in
# $SEGUE_CACHE, or else ~/.cache/segue.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
# Debian's own Python, unless it is too old: a virtual environment should not hang on a version
# manager's copy that may go away.
PYTHON ?= $(shell for p in /usr/bin/python3 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

DEMO_PACKAGES := python3-venv qemu-system-x86
TEST_PACKAGES := $(DEMO_PACKAGES) qemu-system-arm qemu-utils ovmf openssl gcc libc6-dev iproute2

.DEFAULT_GOAL := help
.PHONY: help setup demo install releases guest test test-long test-nested check format clean demo-packages test-packages

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

setup: test-packages $(VENV)/dev.stamp

demo: demo-packages $(VENV)/run.stamp
	@$(BIN)/segue demo

# A virtual environment of its own, since Debian's Python takes no packages but Debian's.
PREFIX ?= /usr/local
install: demo-packages
	@$(PYTHON) -m venv $(PREFIX)/lib/segue
	@$(PREFIX)/lib/segue/bin/pip install --quiet '.[completion]' argparse-manpage
	@mkdir -p $(PREFIX)/bin $(PREFIX)/lib/systemd/system $(PREFIX)/lib/systemd/user \
		$(PREFIX)/share/bash-completion/completions
	@ln -sf ../lib/segue/bin/segue $(PREFIX)/bin/segue
	@$(PREFIX)/lib/segue/bin/python scripts/man $(PREFIX)/share/man/man1
	@$(PREFIX)/bin/segue completion bash >$(PREFIX)/share/bash-completion/completions/segue
	@for unit in system/segue@.service user/segue@.service; do \
		sed 's#/usr/bin/segue#$(PREFIX)/bin/segue#' packaging/systemd/$${unit#system/} \
			>$(PREFIX)/lib/systemd/$$unit; done
	@echo "$(PREFIX)/bin/segue is there; machines that run take it up by: segue reexec --all"

releases: test-packages
	@$(PYTHON) scripts/qemu-releases
	@$(PYTHON) scripts/trixie-programs

guest: test-packages
	@$(PYTHON) scripts/linux-guest

test: setup releases guest
	$(BIN)/pytest

test-long: setup releases guest
	$(BIN)/pytest -m long

# On a real KVM with vhost-net and VFIO, wherever this runs: all in a guest of QEMU's TCG.
NETWORK := tests/qemu/test_network.py
NESTED := tests/nested tests/qemu/test_upgrade.py::test_rehearsal_leaves_the_guest_where_it_was \
	'$(NETWORK)::test_tap_through_every_release[on]' \
	'$(NETWORK)::test_an_undone_upgrade_leaves_the_tap_as_it_was[on]'

test-nested: setup releases guest
	scripts/nested-bed $(BIN)/pytest --timeout 900 -p no:cacheprovider --durations=0 -rP $(NESTED)

check: demo-packages $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

demo-packages:
	@scripts/debian-packages $(DEMO_PACKAGES)

test-packages:
	@scripts/debian-packages $(TEST_PACKAGES)

$(BIN)/python: | demo-packages
	@test -n "$(PYTHON)" || { echo "Segue needs Python 3.11 or newer" >&2; exit 1; }
	@echo "making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# Stamps depend on pyproject.toml alone: the package is installed editable, so a change of the
# sources needs nothing.
$(VENV)/run.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/run.stamp
