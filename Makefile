# Every target sets itself up, on a fresh machine too: Python 3.11 or newer, make and the package index are enough.
#
#   make demo                      train a 4-bit network and ship it, in minutes on a CPU
#   make test                      the default tests; also test-slow, test-gpu, test-clients, test-executorch, lint, hooks
#   make bench-int4                what benchmarks/NOTES.md wants to know of the int4 kernels, on a GPU
#   make test ARGS="-k lsq -x"     more arguments for pytest
#   make test PYTHON=python3.12    another interpreter, in an environment of its own
#   make test SYSTEM=1             keep the packages that $(PYTHON) has: a CUDA or ROCm build of torch, a container's
#
# A Linux machine gets from the package index a torch that carries gigabytes of CUDA libraries. For the small CPU build,
# set PIP_EXTRA_INDEX_URL to the CPU index that torch's installation page names.

PYTHON ?= python3
SYSTEM ?=
VENV   ?= .venv$(if $(SYSTEM),-system)$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
ARGS   ?=

PY      := $(VENV)/bin/python
# -P keeps the repository root off sys.path: our kernels/ must not be found as Hugging Face's package `kernels`.
PYTEST  := $(PY) -P -m pytest
DEFAULT := not slow and not gpu and not clients

.PHONY: demo test test-slow test-gpu test-clients test-executorch .test-executorch bench-int4 lint hooks clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed-data
	$(PY) -P recipes/demo.py

test: $(VENV)/installed-dev
	$(PYTEST) -m "$(DEFAULT)" $(ARGS)

test-slow: $(VENV)/installed-dev
	$(PYTEST) -m "slow and not gpu and not clients" $(ARGS)

test-gpu: $(VENV)/installed-dev
	$(PYTEST) -m "gpu" $(ARGS)

test-clients: $(VENV)/installed-dev,clients
	$(PYTEST) -m "clients" $(ARGS)

# In an environment of its own, which is large: 2 GB and several minutes.
test-executorch:
	$(MAKE) VENV=$(VENV)-executorch .test-executorch

.test-executorch: $(VENV)/installed-dev,executorch
	$(PYTEST) -m "clients" tests/test_executorch.py tests/test_several_inputs.py tests/test_dynamic.py tests/test_client_readers.py $(ARGS)

# For one NVIDIA GPU, about four minutes; peers that are not installed are named.
bench-int4: $(VENV)/installed-dev
	$(PY) -m benchmarks.launch_cost
	$(PY) -m benchmarks.decode
	$(PY) -m benchmarks.dequantize
	$(PY) -m benchmarks.int8_linear --quick
	$(PY) -m benchmarks.int4_linear --quick --kernels "qat NF4" cuBLAS "dequantize NF4 + cuBLAS" "bnb NF4"

lint: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# What a commit is checked for once `pre-commit install` has run; it reads the files that git knows.
hooks: $(VENV)/installed-dev
	$(PY) -m pre_commit run --all-files --show-diff-on-failure

clean:
	rm -rf .venv* build dist *.egg-info

# One stamp an extra: the project is reinstalled when what decides its environment changes. With SYSTEM=1 the versions
# are the host's, so nothing is pinned.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --disable-pip-version-check --editable ".[$*]" $(if $(SYSTEM),,--constraint constraints.txt)
	@touch $@

# The host's packages come in through a .pth file and not --system-site-packages, which would skip those of a host that
# is itself a virtual environment.
$(PY):
	$(PYTHON) -m venv $(VENV)
ifneq ($(SYSTEM),)
	$(PYTHON) -c "import sys; print(*[p for p in sys.path if p.endswith('-packages')], sep='\n')" \
		> "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/host.pth"
endif
