# `make demo`, `make app` and `make test` need python3 and nothing else: what they use is installed
# into .venv and .venv-app.
PYTHON = .venv/bin/python
INSTALLED = .venv/installed
# A folder of checkpoints/: `make demo WORLD=travelling-world`.
WORLD = tiny-world

# http://127.0.0.1:7860, or GRADIO_SERVER_PORT; another model with TOKENTRIM_CHECKPOINT.
app: $(APP_INSTALLED)
	$(APP_PYTHON) space/app.py

# A folder that is ready for `hf upload you/name build/space --repo-type space`.
space:
	rm -rf build/space
	mkdir -p build/space/tokentrim/tools/commands build/space/checkpoints
	cp space/* build/space
	cp LICENSE *.py build/space/tokentrim
	cp tools/*.* build/space/tokentrim/tools
	cp tools/commands/*.py build/space/tokentrim/tools/commands
	cp -r checkpoints/tiny-world build/space/checkpoints
