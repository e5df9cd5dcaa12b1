# Each target needs python3 and nothing else: what it uses is installed into .venv or .venv-app.
PYTHON = .venv/bin/python
INSTALLED = .venv/installed
# A folder of checkpoints/: `make demo WORLD=tiny-world`.
WORLD = travelling-world

# Random calls of `make fuzz`; `make test` has 200, always the same.
EXAMPLES = 20000

# Gradio's pins are not ours, so the app has an environment of its own.
APP_PYTHON = .venv-app/bin/python
APP_INSTALLED = .venv-app/installed

# The oldest versions that setup.cfg admits.
OLDEST_PYTHON = .venv-oldest/bin/python
OLDEST_INSTALLED = .venv-oldest/installed

.PHONY: demo install app space test test-fast test-oldest test-app fuzz mutate lint bench clean

demo: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(PYTHON) -m research.evaluation.demo --world $(WORLD)

# For the commands of the pages: then `source .venv/bin/activate`.
install: $(INSTALLED)

# http://127.0.0.1:7860, or GRADIO_SERVER_PORT; another model with TOKENTRIM_CHECKPOINT.
app: $(APP_INSTALLED)
	$(APP_PYTHON) space/app.py

# A folder that is ready for `hf upload you/name build/space . --repo-type space`.
space:
	rm -rf build/space
	mkdir -p build/space/tokentrim/tools/commands build/space/tokentrim/tools/compare
	cp -r space/*.* space/example build/space
	cp -r LICENSE *.py tokentrim_*/ build/space/tokentrim
	cp tools/*.* build/space/tokentrim/tools
	cp tools/commands/*.py build/space/tokentrim/tools/commands
	cp tools/compare/*.* build/space/tokentrim/tools/compare
	cp -rL checkpoints build/space

# Everything, on all cores; each test uses one.
test: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -q -n auto --dist worksteal tests

# What a new method or a new layout can break.
FAST = contract methods policy quarantine reanchor statistics layout field_layouts rollout bundle
test-fast: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -q -n auto --dist worksteal -m "not slow" $(FAST:%=tests/test_%.py)

# The same with the oldest versions of what a user needs; some GB, as PyPI's torch 2.6 is a build for CUDA.
test-oldest: $(OLDEST_INSTALLED)
	HF_HUB_OFFLINE=1 $(OLDEST_PYTHON) -m pytest -q -n auto --dist worksteal -m "not slow" $(FAST:%=tests/test_%.py)

# The page in a real browser: `apt-get install chromium`.
test-app: $(APP_INSTALLED)
	$(APP_PYTHON) -m pip install --quiet --disable-pip-version-check pytest playwright
	HF_HUB_OFFLINE=1 $(APP_PYTHON) -m pytest -q -rs tests/test_visits.py tests/test_app.py tests/test_compare_page.py

fuzz: $(INSTALLED)
	HF_HUB_OFFLINE=1 EXAMPLES=$(EXAMPLES) $(PYTHON) -m pytest -q --hypothesis-show-statistics tests/test_fuzz.py

# Small faults of tests/mutations.yaml, one at a time: prints those that no test notices. `make mutate ONLY=far.py`.
mutate: $(INSTALLED)
	$(PYTHON) tests/mutate.py $(ONLY)

# What a rollout costs beside its forwards; more with `make bench BENCH="--tables gate layouts --size tiny"`, see --help.
bench: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(PYTHON) -m research.benchmarks.overhead $(BENCH)

lint: $(INSTALLED)
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .

# torch first and by itself, so that no other package chooses its build.
$(INSTALLED): constraints.txt setup.cfg
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[plots,test]"
	touch $(INSTALLED)

$(OLDEST_INSTALLED): setup.cfg
	python3 -m venv .venv-oldest
	sed -n '/^install_requires/,/^$$/s/^ *\([a-z-]*\)>=/\1==/p' setup.cfg > .venv-oldest/constraints.txt
	$(OLDEST_PYTHON) -m pip install --quiet --disable-pip-version-check --constraint .venv-oldest/constraints.txt torch
	$(OLDEST_PYTHON) -m pip install --quiet --disable-pip-version-check --constraint .venv-oldest/constraints.txt --editable ".[test]"
	touch $(OLDEST_INSTALLED)

$(APP_INSTALLED): constraints.txt setup.cfg space/requirements.txt
	python3 -m venv .venv-app
	$(APP_PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(APP_PYTHON) -m pip install --quiet --disable-pip-version-check --requirement space/requirements.txt --editable .
	touch $(APP_INSTALLED)

clean:
	rm -rf .venv .venv-app .venv-oldest build
