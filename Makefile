# `make demo` and `make test` need python3 and nothing else: what they use is installed into .venv.
PYTHON = .venv/bin/python
INSTALLED = .venv/installed
# A folder of checkpoints/: `make demo WORLD=travelling-world`.
WORLD = tiny-world

# Random calls of `make fuzz`; `make test` has 200, always the same.
EXAMPLES = 20000

.PHONY: demo install test test-fast fuzz lint clean

demo: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(PYTHON) -m evaluation.demo --world $(WORLD)

# For the commands of the pages: then `source .venv/bin/activate`.
install: $(INSTALLED)

# Everything, on all cores; each test uses one.
test: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -q -n auto --dist worksteal tests

# What a new method or a new layout can break.
FAST = contract methods policy quarantine reanchor statistics layout field_layouts rollout bundle
test-fast: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -q -n auto --dist worksteal -m "not slow" $(FAST:%=tests/test_%.py)

fuzz: $(INSTALLED)
	HF_HUB_OFFLINE=1 EXAMPLES=$(EXAMPLES) $(PYTHON) -m pytest -q --hypothesis-show-statistics tests/test_fuzz.py

lint: $(INSTALLED)
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .

# torch first and by itself, so that no other package chooses its build.
$(INSTALLED): constraints.txt setup.cfg
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[plots,test]"
	touch $(INSTALLED)

clean:
	rm -rf .venv
