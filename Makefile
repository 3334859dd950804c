# make setup   .venv with everything, CPU only; nothing to do when it is up to date
# make demo    a short RL run on this machine, from the weights to the report
# make test    the short tests; .ci/run has the whole of it
# make clean   remove what tools and builds left, but not .venv and not runs/
.PHONY: setup demo test clean

setup:
	@bash requirements/install.sh

demo: setup
	@bash examples/demo/run.sh

test: setup
	.venv/bin/python -m pytest -m "not slow and not gpu"

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
