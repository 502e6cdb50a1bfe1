# Both targets need only Python 3.11+ and make; they create and use .venv in this folder.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test test-slurm test-matrix docs test-plan bench-peers bench-peers-jax bridge-full-size works-with lint clean-demo

# Large temporaries of XLA's CPU backend come from malloc: keeping them mapped, in huge pages, saves a quarter of a step or more.
# One arena keeps temporaries of 2 GB mapped (bench_mid: a seventh of the mean step); the demo's small step takes 1.17 times as long.
MALLOC := glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=10000000000:glibc.malloc.trim_threshold=10000000000
ONE_ARENA := :glibc.malloc.arena_max=1
demo: export GLIBC_TUNABLES := $(MALLOC)
demo: .venv/.demo-installed
	$(BIN)/python -m oq2vl_jax.demo.easy_vqa --out $(DEMO)/data
	$(BIN)/python -m oq2vl_jax.curate.filter configs/filter_easy_vqa.toml --metadata '$(DEMO)/data/captions/*.parquet' \
	    --shards '$(DEMO)/data/captions/*.tar' --out $(DEMO)/filter
	$(BIN)/python -m oq2vl_jax.curate.reshard --shards '$(DEMO)/data/captions/*.tar' --uids $(DEMO)/filter/uids.npy \
	    --out $(DEMO)/data/filtered
	$(BIN)/python -m oq2vl_jax.data.pack --shards '$(DEMO)/data/filtered/*.tar' --out $(DEMO)/packed/captions \
	    --tokenizer $(DEMO)/data/tokenizer --num-tokens 256 --max-images 10 --visual-tokens 16 --template plain
	$(BIN)/python -m oq2vl_jax.data.pack --shards '$(DEMO)/data/questions/*.tar' --out $(DEMO)/packed/questions \
	    --tokenizer $(DEMO)/data/tokenizer --num-tokens 300 --max-images 2 --visual-tokens 64
	$(BIN)/python -m oq2vl_jax.train configs/easy_vqa.py
	$(BIN)/python -m oq2vl_jax.train configs/easy_vqa_tune.py
	$(BIN)/python -m oq2vl_jax.eval --checkpoint $(DEMO)/runs/questions --tasks easy_vqa --data $(DEMO)/data/test \
	    --out $(DEMO)/results/generate --method generate
	$(BIN)/python -m oq2vl_jax.eval --checkpoint $(DEMO)/runs/questions --tasks easy_vqa --data $(DEMO)/data/test \
	    --out $(DEMO)/results/options --method options
	rm -rf $(DEMO)/exported
	$(BIN)/python -m convert.to_hf $(DEMO)/runs/questions --out $(DEMO)/exported --dtype float32 --native
	$(BIN)/python -m convert.ask_hf $(DEMO)/exported --image $(DEMO)/data/test/0.png --prompt "what is the red shape?" \
	    --same-as $(DEMO)/runs/questions
	$(BIN)/python -m oq2vl_jax.demo.report --pictures $(DEMO)/data/test \
	    --predictions $(DEMO)/results/generate/easy_vqa/predictions.jsonl \
	    --by-options $(DEMO)/results/options/easy_vqa/predictions.jsonl \
	    --runs $(DEMO)/runs/captions $(DEMO)/runs/questions --out $(DEMO)/report

# The 2B model through the bridge: 24 GB of memory, 45 GB of disk, about 15 minutes on two cores.
bridge-full-size: .venv/.test-installed
	$(BIN)/python -m pytest -m slow tests/convert/test_full_size.py -s

# A process per core: compiling for the tests is most of the time.
test: lint docs
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# The suite on every interpreter named: make test-matrix PYTHONS="python3.11 python3.13"; each has a folder in build/.
PYTHONS ?= python3
test-matrix:
	for python in $(PYTHONS); do \
	    $(MAKE) test-on ON=build/venv-$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') PYTHON=$$python \
	        || exit 1; \
	done

test-on:
	test -x $(ON)/bin/python || $(PYTHON) -m venv $(ON)
	$(ON)/bin/python -m pip install --quiet torch==2.13.0 --editable '.[dev]' $(WITH)
	$(ON)/bin/python -m pytest --numprocesses auto --dist worksteal

# Compiles the published step for GPUs that are not there: 5 GB of CUDA packages.
test-plan: .venv/.test-installed
	$(BIN)/python -m pip install --quiet --editable '.[plan]'
	$(BIN)/python -m pytest -m plan tests/bench -s

# The job files of configs/launch on a Slurm of one node, on this machine: as root on Debian, about 8 minutes on two cores.
test-slurm: .venv/.test-installed
	command -v slurmctld || apt-get install -y --no-install-recommends slurm-wlm munge
	$(BIN)/python -m pytest -m slurm tests/launch

# Exports asked by transformers 4.57 and newest, PEFT and vLLM, each in its own environment: 6 GB, a quarter of an hour.
works-with: .venv/.test-installed
	$(BIN)/python -m tests.works_with.compare

# Our step against PyTorch's on whatever device is here, same weights and rows, in turns: about 8 minutes on two cores.
bench-peers: export GLIBC_TUNABLES := $(MALLOC)$(ONE_ARENA)
bench-peers: .venv/.test-installed
	$(BIN)/python -m tests.peers.compare configs/bench_mid.py

# Our step against MaxText's and EasyDeL's on a CPU, the same rows of text, in turns, each in an environment of its own:
# 5 GB, Python 3.12 and 3.11, about 10 minutes on two cores after the installation.
PEERS := build/peers
PYTHON312 ?= python3.12
PYTHON311 ?= python3.11
bench-peers-jax: export GLIBC_TUNABLES := $(MALLOC)$(ONE_ARENA)
bench-peers-jax: .venv/.test-installed $(PEERS)/maxtext/.installed $(PEERS)/easydel/.installed
	$(BIN)/python -m tests.peers.compare_jax --python maxtext=$(PEERS)/maxtext/bin/python \
	    --python easydel=$(PEERS)/easydel/bin/python

$(PEERS)/maxtext/.installed: tests/peers/maxtext.txt
	$(PYTHON312) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement tests/peers/maxtext.txt
	$(@D)/bin/python -m pip install --quiet --no-deps maxtext==0.2.5
	touch $@

# It asks for jax 0.9, which ours does not support; the last line installs the jax of the tests, with which it runs too.
$(PEERS)/easydel/.installed:
	$(PYTHON311) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet torch==2.13.0 easydel==0.3.0 pillow tyro
	$(@D)/bin/python -m pip install --quiet --no-deps jax==0.10.2 jaxlib==0.10.2
	touch $@

lint: .venv/.test-installed
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright

# The pages as a site, build/site/index.html; a link that leads nowhere fails.
docs: .venv/.test-installed
	rm -rf build/pages build/site && mkdir -p build && cp -r docs build/pages
	sed 's#\([("]\)docs/#\1#g' README.md > build/pages/index.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/mkdocs.yml

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch is pinned: on a machine without a GPU this version comes as a CPU build, an unpinned one with gigabytes of CUDA.
.venv/.demo-installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet torch==2.13.0 --editable '.[demo]'
	touch $@

.venv/.test-installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet torch==2.13.0 --editable '.[dev]'
	touch $@

clean-demo:
	rm -rf $(DEMO)
