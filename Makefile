# make setup   .venv with everything, CPU only; nothing to do when it is up to date
# make demo    a short RL run on this machine, from the weights to the report; FLAGS=--no_ray goes to PPO
# make test    the short tests; .ci/run has the whole of it
# make test-slow   all slow tests; SHARE=K/N runs the K-th of N shares of them
# make test-gpu    what needs one GPU, in some minutes; PYTHON=... names the interpreter, which need not be .venv's
# make test-megatron-next   a sample of the layout tests against the newest Megatron-Core that runs here
# make clean   remove what tools and builds left, but not .venv and not runs/
.PHONY: setup demo test test-slow test-slurm test-gpu test-megatron-next clean

setup:
	@bash requirements/install.sh

demo: setup
	@bash examples/demo/run.sh $(FLAGS)

test: setup
	.venv/bin/python -m pytest -m "not slow and not gpu" --durations 25

test-slow: setup
	.venv/bin/python -m pytest -m "slow and not gpu and not slurm" $(if $(SHARE),--slow-share $(SHARE))

test-slurm: setup
	@bash requirements/system.sh
	.venv/bin/python -m pytest -m slurm tests/slurm --durations 10

PYTHON ?= python

test-gpu:
	@echo "test-gpu: needs a CUDA build of torch and: pip install$$(sed '/^#/d; s/.*/ "&"/' requirements/gpu-test.txt | tr -d '\n')"
	$(PYTHON) -m pytest tests/gpu -m gpu -rs --durations 5

# Megatron-Core 0.19 declares Python 3.12 and needs triton; both lie beside the environment, not in it.
build/megatron-next: requirements/megatron-next.txt
	rm -rf $@
	.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --ignore-requires-python \
	    --target $@ -r requirements/megatron-next.txt
	touch $@

test-megatron-next: setup build/megatron-next
	PYTHONPATH=$(CURDIR)/build/megatron-next .venv/bin/python -c \
	    "import megarlhf.parallel, megatron.core; assert megatron.core.__version__.startswith('0.19.2')"
	PYTHONPATH=$(CURDIR)/build/megatron-next .venv/bin/python -m pytest tests/distributed tests/conformance tests/models tests/engine \
	    tests/conversion -m "not gpu" -k "$(MEGATRON_NEXT_SAMPLE)"

MEGATRON_NEXT_SAMPLE = untied and (TP2-actor or TP2-SP-critic or PP2-VPP2-actor or PP2-uneven-sft or CP2-p2p-sft \
    or CP2-all-gather-critic or DP2-distopt-overlap-actor or recompute-selective-sft) or experts and (EP2-actor \
    or TP2-SP-EP2-ETP1-sft or PP2-VPP2-critic) or large and (TP2-SP-PP2-VPP2-CP2 or TP2-SP-EP2-ETP2) \
    or log_probs_and_gradients and packed or round_trip and TP2 or resume or leave_no_threads or sleeps or cannot_write

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
