# make quickstart   set up .venv and watch a small vision-language model learn
# make test         set up .venv and run every test, two files at a time
# make lint         ruff and pyright
# make reliability  kill runs at random moments, and compare what they come to with one that was left alone
# make test-npu     hold the npu backend against the real torch_npu and vllm-ascend (docs/npu.md)

PYTHON ?= python3
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

.PHONY: quickstart test lint reliability test-npu setup
quickstart: setup
	.venv/bin/rlcore grpo examples/quickstart.yaml

test: setup
	.venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: setup
	.venv/bin/ruff check --quiet .
	.venv/bin/pyright --pythonpath .venv/bin/python

reliability: setup
	.venv/bin/python ci/reliability.py

test-npu: setup
	bash ci/test_npu.sh

setup: .venv/installed

.venv/installed: requirements/base.txt requirements/cpu.txt requirements/ray.txt requirements/dev.txt pyproject.toml ci/setup.sh
	PYTHON=$(PYTHON) bash ci/setup.sh
