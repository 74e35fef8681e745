# From a bare machine with python3 (3.11 or later), pip (22.3 or later) and make:
#
#   make book     execute what changed, compute the verdicts, build the site: _build/html/index.html
#   make test     the tests of the package, of the notebooks as programs, of the built site in a browser
#   make lint     ruff and mypy
#   make bench    the benchmarks
#   make serve    the site on http://127.0.0.1:8000/
#   make setup    only the environment, .venv
#   make lock     write requirements.lock from what .venv holds
#   make clean    remove what was built; .venv stays
#
# Another Python: make PYTHON=python3.12 book

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Debian's Python makes no pip inside an environment, so the pip outside installs into it. Every installation names
# .venv; an environment that happens to be activated is left alone.
PIP = $(PYTHON) -m pip --python $(PY) --disable-pip-version-check
READY := $(VENV)/ready-$(shell cat requirements.lock pyproject.toml | cksum | cut -d ' ' -f 1)

.PHONY: book test lint bench serve setup lock clean

book: $(READY)
	@$(PY) -m bdpo build

test: book
	@$(PY) -m pytest -n auto

lint: $(READY)
	@$(PY) -m bdpo sync --check
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy

bench: $(READY)
	@for file in $(wildcard bench/*.py); do echo "$$file" && $(PY) "$$file" || exit 1; done

serve: book
	@$(PY) -m bdpo serve

setup: $(READY)

# An environment that an interrupted run left half-made carries a mark, and is made again.
$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'bdpo needs Python 3.11 or later; try: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 1; }
	@$(PYTHON) -c 'import pip, sys; sys.exit([int(n) for n in pip.__version__.split(".")[:2]] < [22, 3])' || \
	  { echo 'bdpo needs pip 22.3 or later beside $(PYTHON); try: apt install python3-pip' >&2; exit 1; }
	@if [ -e $(VENV)/half-made ]; then rm -rf $(VENV); fi
	@if [ ! -x $(PY) ]; then \
	  mkdir -p $(VENV) && touch $(VENV)/half-made && $(PYTHON) -m venv --without-pip $(VENV); fi
	@rm -f $(VENV)/ready-*
	$(PIP) install --quiet --requirement requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/half-made && touch $@

# setuptools builds the package and is needed by torch; pip freeze leaves it out unless asked. The other edits: any
# build of torch will do, what only some systems need carries a marker, and triton (asked for by liger-kernel) is left
# to torch, whose CUDA builds fix its version.
lock:
	@{ echo '# Every version that the book was built with, written by make lock on Python 3.11, the oldest supported.'; \
	  echo '# A CUDA build of torch brings its own libraries, at versions that torch fixes.'; \
	  { $(PIP) freeze --all --exclude bdpo --exclude pip --exclude triton; \
	    echo 'appnope==0.1.4 ; sys_platform == "darwin"'; echo 'colorama==0.4.6 ; sys_platform == "win32"'; } \
	  | sed -E -e 's/^(torch==[0-9.]+)\+.*/\1/' -e 's/^(pexpect|ptyprocess)==.*/& ; sys_platform != "win32"/' \
	    -e 's/^liger_kernel==.*/& ; sys_platform == "linux"/' \
	  | LC_ALL=C sort --ignore-case; } > requirements.lock.new && mv requirements.lock.new requirements.lock

clean:
	rm -rf _build build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
