# Targets install what they need into .venv first (but for gpu-all); `make install` alone is enough on a fresh machine.
# FLASHCL_CUDA and FLASHCL_ARCHS (see setup.py) are read when the package is built: `make -B install` builds again.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: install demo test gpu-test gpu-all bench plots docs clean

install: $(STAMP)

# The constraints are passed twice because pip >= 25.3 no longer applies the first to the isolated build.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	@rm -f flashcl/_C.*.so # one left by an earlier build would hide that this build made none
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/pip install -e ".[test]"
	@$(BIN)/python -c 'from flashcl import _C; print("flashcl._C:", _C.build_info())' 2> /dev/null || \
		echo "flashcl._C was not built; everything else works. FLASHCL_CUDA=1 make -B install says why."
	@touch $@

demo: install
	@$(BIN)/flashcl demo

# `pytest`, not `python -m pytest`: that would put the repository on sys.path, where the folder triton_kernels
# shadows a foreign package of the same name. Tests run on one thread each: one process per core, and a file stays together.
test: install
	@$(BIN)/pytest -n auto --dist loadfile -m "not gpu"

# Contract, 1,000 repeats, graphs, streams, and compute-sanitizer over small shapes; what comes of it goes to bench/results/.
gpu-test: install
	@$(BIN)/python bench/gpu.py --no-bench --minutes $(or $(MINUTES),20)

# With .venv if it is there, else with the Python at hand: machines with a GPU often have torch and no network.
gpu-all:
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) bench/gpu.py --part $(or $(PART),1/1) --minutes $(or $(MINUTES),9)

bench: install
	@$(BIN)/flashcl bench --suite cpu --provider flashcl-torch,dense,torch.compile --mode full --seconds 4 --overwrite --out bench/results/bench-cpu.json

plots: install
	@$(BIN)/python bench/plots.py

docs: install
	@$(BIN)/pdoc flashcl flashcl.reference flashcl.contract --template-directory docs/theme -o docs/api

clean:
	rm -rf .venv build dist *.egg-info flashcl/_C.*.so .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
