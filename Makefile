# Two commands matter on a fresh machine: `make demo` and `make test`. They need Python >= 3.10 with venv, cargo, cc, make
# and a package index, and say in one line what is missing.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
MATURIN := $(BIN)/maturin build

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# pyo3 asks an interpreter at build time; which one does not matter for abi3, as long as there is one.
export PYO3_PYTHON := $(abspath $(BIN)/python)

.PHONY: help demo test check wheel wheel-aarch64 clean venv release-build dev-build

help:
	@echo "make demo            text detection on a page that it draws, on the CPU; ENGINE=det.engine: on TensorRT"
	@echo "make test            every test that needs no GPU"
	@echo "make check           format, lint, types, stubs, generated files"
	@echo "make wheel           dist/*_x86_64.whl, manylinux_2_28"
	@echo "make wheel-aarch64   dist/*_aarch64.whl, for Jetson and other ARM machines"
	@echo "make clean           removes what the others made, except $(VENV) and downloads"

venv:
	@.ci/venv $(VENV)
	@$(PIP) 'maturin>=1.14,<2'

# The extension is built once into a wheel, which then serves every environment. The two profiles have folders of their
# own since their wheels have the same name.
release-build dev-build: %-build: venv
	@rm -rf target/$*-wheel
	$(MATURIN) --profile $* --compatibility linux --interpreter $(BIN)/python --out target/$*-wheel
	@$(PIP) --no-deps --force-reinstall target/$*-wheel/*.whl

demo: release-build
	@$(PIP) "$$(echo target/release-wheel/*.whl)[demo]"
	$(BIN)/python examples/text_detection.py $(if $(ENGINE),--engine '$(ENGINE)')

test: export JETRT_ALLOW_DEBUG := 1
test: dev-build
	cargo test --no-default-features
	@$(PIP) "$$(echo target/dev-wheel/*.whl)[test]"
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest tests/drop_in
	.ci/numpy-floor target/dev-wheel/*.whl

check: export JETRT_ALLOW_DEBUG := 1
check: dev-build
	@$(PIP) "$$(echo target/dev-wheel/*.whl)[dev]" 'nvidia-cuda-nvrtc-cu12==12.2.140'
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --all-targets --no-default-features -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest jetrt._core --allowlist .ci/stubtest-allowlist
	$(BIN)/python abi/generate.py --check
	$(BIN)/python kernels/generate.py --check
	$(BIN)/python benches/report.py --check

# zig links against an old glibc, so that the wheel runs on older systems than the one that builds it. maturin finds it
# as a package of the first python on PATH.
wheel: ARCH := x86_64
wheel-aarch64: ARCH := aarch64
wheel wheel-aarch64: venv
	@.ci/rust-target $(ARCH)-unknown-linux-gnu
	@$(PIP) 'maturin[zig]>=1.14,<2' pytest pytest-timeout
	@rm -f dist/jetrt-*_$(ARCH).whl
	PATH="$(abspath $(BIN)):$$PATH" $(MATURIN) --release --zig --target $(ARCH)-unknown-linux-gnu --compatibility manylinux_2_28 --out dist
	JETRT_EXPECT_WHEEL=$(ARCH) $(BIN)/python -m pytest -q --noconftest tests/test_wheel.py
	@ls dist/jetrt-*_$(ARCH).whl

clean:
	cargo clean
	rm -rf dist demo.png .pytest_cache .mypy_cache .ruff_cache .hypothesis
