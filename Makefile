# make demo      explains pictures with the network in the package (no torch)
# make test      sets up everything and runs the tests
# make check     ruff and pyright, under a minute
# make quick     a selection of the tests, about two minutes
# make system    installs what some tests need beside Python, by apt: chromium, npm, g++, and ONNX Runtime's headers where Debian has them
# make test-all  what needs an environment of its own: the tests at the lowest versions of the runtime's dependencies, the site,
#                programs in OpenVINO, the page in a browser, the server under schemathesis, models in a Triton server, images on a Ray cluster and in an object store,
#                Kubernetes manifests
# make docs      builds the documentation's site in build/site; any warning fails
# make coverage  runs them and says which lines they do not reach
# make peers     sets up other implementations, times camrt beside them and writes docs/benchmarks.md; seven minutes on two cores, without the set-up
# make models    writes networks with the exporters that users have, exports and verifies each, writes docs/models.md
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

QUICK := tests/test_vjp.py tests/test_kernels.py tests/test_methods.py tests/test_explain.py tests/test_bundle.py tests/test_files.py \
	tests/test_distances.py tests/test_metrics.py
PEERS := .venv-peers/bin/python
WINSOR_CAM ?= winsorcam @ git+https://github.com/USD-AI-ResearchLab/Winsor-CAM@4f329984a12081de4fc836f2a7ed921a54deaa4b

SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: demo test check quick system lowest docs interop browser fuzz triton cluster manifests test-all coverage peers models clean

demo: .venv/demo-ready
	$(BIN)/camrt demo
	@if command -v npm > /dev/null; then $(MAKE) --no-print-directory camrt-demo/page; \
	else echo "With npm installed, make demo also makes a page that explains pictures in your browser."; fi

.PHONY: camrt-demo/page
camrt-demo/page: .venv/page-ready
	$(BIN)/camrt page camrt/demo/shapes.camrt --out $@ --examples camrt-demo/scene-?.png

.venv/page-ready: .venv/demo-ready
	$(PIP) --editable '.[cpu,compile]'
	touch $@

test: .venv/test-ready .venv/standin-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

check: .venv/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet tests/test_house.py -k 'pyright or imports'

# PyCUDA, built for the tests' stand-in for the NVIDIA driver; needs g++ (make system) and Python's headers
.venv/standin-ready: .venv/test-ready tests/standin.py
	$(BIN)/python tests/standin.py build .venv/standin && touch $@ || echo "PyCUDA was not built: the tests of the GPU side are skipped"

quick: .venv/test-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses 2 --dist worksteal $(QUICK)

.venv/demo-ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('camrt needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.11' if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0)"
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) --editable '.[cpu]'
	touch $@

.venv/test-ready: .venv/demo-ready
	$(PIP) torch --constraint constraints.txt
	$(PIP) --editable '.[test]'
	touch $@

LOWEST := tests/test_kernels.py tests/test_methods.py tests/test_explain.py tests/test_bundle.py tests/test_distances.py tests/test_metrics.py \
	tests/test_evaluate.py tests/test_cli.py tests/test_bench.py tests/test_recipe.py tests/test_golden.py tests/test_determinism.py \
	tests/test_demo.py tests/test_hostile.py tests/test_photos.py tests/test_explain_files.py tests/test_pruning.py tests/test_cores.py

test-all: lowest docs interop browser fuzz triton cluster manifests

system:
	$(SUDO) apt-get update --quiet
	$(SUDO) apt-get install --quiet --yes --no-install-recommends chromium g++
	command -v npm > /dev/null || $(SUDO) apt-get install --quiet --yes --no-install-recommends npm
	$(SUDO) apt-get install --quiet --yes --no-install-recommends libonnxruntime-dev \
		|| echo "this Debian has no libonnxruntime-dev: the C++ example is not tested"

lowest: .venv-lowest/ready
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest --quiet --numprocesses 2 --dist worksteal $(LOWEST)

.venv-lowest/ready: pyproject.toml constraints.txt tests/lowest.py
	test -d .venv-lowest || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python tests/lowest.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/constraints.txt torch
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/constraints.txt --editable '.[test]'
	touch $@

interop: .venv/test-ready
	$(PIP) --editable '.[cpu,openvino]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses 2 --dist worksteal tests/test_interop.py tests/test_compile.py tests/test_compile_pictures.py

browser: .venv/test-ready
	$(PIP) --editable '.[cpu,compile,browser]'
	$(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile tests/test_page.py tests/test_compile_cpp.py

fuzz: .venv/test-ready .venv-fuzz/ready
	SCHEMATHESIS=.venv-fuzz/bin/schemathesis $(BIN)/python -m pytest --quiet tests/test_serve.py -k schemathesis

.venv-fuzz/ready: Makefile
	test -d .venv-fuzz || $(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/python -m pip install --quiet schemathesis==4.32.5
	touch $@

triton: .venv/test-ready .venv-triton/ready
	TRITON=.venv-triton OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet tests/test_triton.py

.venv-triton/ready: pyproject.toml Makefile
	test -d .venv-triton || $(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet nvidia-pytriton==0.7.0 onnxruntime==1.31.1 --editable .
	touch $@

cluster: .venv/test-ready
	$(PIP) --editable '.[cpu,ray]' 'moto[server]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet tests/test_map_ray.py tests/test_map.py

manifests: .venv/test-ready .venv-kube/ready
	$(PIP) pyyaml
	KUBE=.venv-kube $(BIN)/python -m pytest --quiet tests/test_manifests.py

.venv-kube/ready: Makefile
	test -d .venv-kube || $(PYTHON) -m venv .venv-kube
	.venv-kube/bin/python -m pip install --quiet kubernetes-validate==1.37.0 kserve==0.21.0 kubernetes==31.0.0
	touch $@

docs: .venv/docs-ready
	rm -rf build/package build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

.venv/docs-ready: .venv/demo-ready
	$(PIP) --editable '.[cpu,docs]'
	touch $@

coverage: .venv/test-ready .venv/standin-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --cov --cov-report=term-missing:skip-covered --cov-report=json:build/coverage.json
	$(BIN)/python benchmarks/reliability.py coverage --out docs/reliability.json
	$(BIN)/python benchmarks/report.py

peers: .venv-peers/ready
	$(PEERS) benchmarks/peers.py --out docs/benchmarks.json
	$(PEERS) benchmarks/report.py

.venv-peers/ready: pyproject.toml benchmarks/peers.txt
	test -d .venv-peers || $(PYTHON) -m venv .venv-peers
	$(PEERS) -m pip install --quiet --requirement benchmarks/peers.txt --editable '.[cpu,export]'
	$(PEERS) -m pip install --quiet '$(WINSOR_CAM)' || echo "Winsor-CAM's public implementation could not be installed: it is left out"
	touch $@

models: .venv/zoo-ready .venv-keras/ready
	.venv-keras/bin/python benchmarks/zoo/keras_files.py build/zoo
	$(BIN)/python benchmarks/zoo/torch_files.py build/zoo
	$(BIN)/python benchmarks/zoo/hf_folders.py build/zoo
	$(BIN)/python benchmarks/zoo/packaged.py build/zoo
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/zoo/measure.py build/zoo --out docs/models.json
	$(BIN)/python benchmarks/report.py

.venv/zoo-ready: .venv/test-ready
	$(PIP) transformers==5.24.0
	touch $@

.venv-keras/ready: Makefile
	test -d .venv-keras || $(PYTHON) -m venv .venv-keras
	.venv-keras/bin/python -m pip install --quiet tensorflow-cpu==2.21.0 tf2onnx==1.17.0
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-fuzz .venv-triton .venv-kube .venv-peers .venv-keras build *.egg-info
