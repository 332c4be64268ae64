# make demo   install into .venv and score a synthetic slide
# make test   install if needed and run the tests
# make camelyon-phantom   40 synthetic slides in the files of CAMELYON: train, score, evaluate, compare with the truth
# make soak   kill runs at 200 random moments and compare what they leave (half an hour)
# make lint   what CI asks of the code's form
# make bench-peers   other programs into .venv-peers, and wsi beside them
# make test-readers   readers of other programs into .venv-readers, and what we export before them
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak test-readers lint bench-peers camelyon-phantom clean
PHANTOM := camelyon-phantom

demo: .venv/installed
	$(BIN)/wsi demo -o demo

test: .venv/installed
	$(BIN)/python -m pytest

camelyon-phantom: .venv/installed
	$(BIN)/python benchmarks/camelyon_phantom.py $(PHANTOM)
	$(BIN)/wsi score $(PHANTOM)/train/slides --model phantom -o $(PHANTOM)/train/results
	$(BIN)/wsi train slide-features $(PHANTOM)/train/results --reference $(PHANTOM)/train/reference.csv \
		-o $(PHANTOM)/slide-model
	$(BIN)/wsi score $(PHANTOM)/test/slides --model phantom -o $(PHANTOM)/test/results
	$(BIN)/wsi evaluate camelyon16 $(PHANTOM)/test/results --annotations $(PHANTOM)/test/annotations --true-mpp \
		--reference $(PHANTOM)/test/reference.csv --slide-model $(PHANTOM)/slide-model -o $(PHANTOM)/camelyon16
	$(BIN)/wsi evaluate camelyon17 $(PHANTOM)/test/results --reference $(PHANTOM)/test/stages.csv -o $(PHANTOM)/camelyon17
	$(BIN)/wsi evaluate segmentation $(PHANTOM)/test/results --annotations $(PHANTOM)/test/annotations \
		-o $(PHANTOM)/segmentation
	$(BIN)/python benchmarks/camelyon_phantom.py $(PHANTOM) --check

soak: .venv/installed
	$(BIN)/python -m tests.archive.soak --kills 200

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	! git grep -nE '^(<<<<<<<|>>>>>>>) '

# Editable: only a change of dependencies or of native code asks for another install.
.venv/installed: pyproject.toml constraints.txt CMakeLists.txt $(shell find native -type f)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

bench-peers: .venv-peers/installed
	.venv-peers/bin/python benchmarks/compare/stain.py
	.venv-peers/bin/python benchmarks/compare/read.py
	.venv-peers/bin/python benchmarks/compare/archive.py
	.venv-peers/bin/python benchmarks/compare/stores.py
	.venv-peers/bin/python benchmarks/compare/mil.py

# Peers one by one: one that does not install must not keep the others away.
PEERS := benchmarks/compare/requirements-peers
.venv-peers/installed: .venv-peers/wsi $(PEERS).txt $(PEERS)-alone.txt
	grep -v '^#' $(PEERS).txt | while read -r peer; do \
	  .venv-peers/bin/python -m pip install --quiet -c constraints.txt "$$peer" || echo "not installed: $$peer"; done
	grep -v '^#' $(PEERS)-alone.txt | while read -r peer; do \
	  .venv-peers/bin/python -m pip install --quiet --no-deps "$$peer" || echo "not installed: $$peer"; done
	touch $@

.venv-peers/wsi: pyproject.toml constraints.txt CMakeLists.txt $(shell find native -type f)
	test -d .venv-peers || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

# Only tests of exports: these packages bring versions of their own. One by one: one that does not install keeps no
# other away. tiatoolbox alone asks for older versions of everything; the last line but one is what it imports.
READERS := torchmil anndata ome-zarr ome-zarr-models highdicom spatialdata wsinfer \
	SimpleITK umap-learn transformers opencv-python-headless joblib
READERS_ALONE := tiatoolbox==2.1.3
test-readers: .venv-readers/installed
	.venv-readers/bin/python -m pytest -W ignore -rs tests/export

.venv-readers/installed: Makefile pyproject.toml constraints.txt CMakeLists.txt $(shell find native -type f)
	test -d .venv-readers || $(PYTHON) -m venv .venv-readers
	.venv-readers/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	for reader in $(READERS); do \
	  .venv-readers/bin/python -m pip install --quiet -c constraints.txt "$$reader" || echo "not installed: $$reader"; done
	for reader in $(READERS_ALONE); do \
	  .venv-readers/bin/python -m pip install --quiet --no-deps "$$reader" || echo "not installed: $$reader"; done
	touch $@

clean:
	rm -rf .venv .venv-peers .venv-readers build demo camelyon-phantom
