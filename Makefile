# The front door. Every target sets up what it needs, on a fresh Debian machine too.
#
#   make           .venv with a CPython >= 3.13, anyfork built and installed in it
#   make demo      workers from a sub-interpreter, beside trio and busy threads, at work
#   make test      the tests on that CPython
#   make matrix    the tests on every CPython of tools/pythons, and on real hosts
#                  (SIXTHS=1: each test on one of the builds of 3.13 to 3.15, for the time)
#   make sanitize  ASan, UBSan, valgrind, TSan      (SHORT=1: a short form)
#   make fuzz      libFuzzer over what owner, template and standby receive  (FUZZ_SECONDS=60)
#   make soak      100,000 forks per CPython, starts per method and calls (COUNT=n, NAMES="3.14 3.15")
#   make bench     against os.fork(), interleaved
#   make clean     .venv and build; the cached CPythons stay (tools/pythons clean)

SCALE ?= 1
COUNT ?= 100000
NAMES ?=
EXCEPT ?=
SIXTHS ?=
FUZZ_SECONDS ?=
SOURCES := $(shell find src include python -type f) meson.build meson.options pyproject.toml

.PHONY: all demo test matrix sanitize fuzz soak bench clean
all: .venv/ready

.venv/ready: $(SOURCES) tools/setup
	@tools/setup
	@touch $@

demo: .venv/ready
	@tools/in anyfork demo

test: .venv/ready
	@tools/test --scale $(SCALE)

matrix:
	@tools/matrix --scale $(SCALE) $(if $(SIXTHS),--sixths) $(if $(EXCEPT),--except $(EXCEPT)) $(NAMES)

sanitize:
	@tools/sanitize $(if $(SHORT),--short)

fuzz: .venv/ready
	@tools/in env $(if $(FUZZ_SECONDS),FUZZ_SECONDS=$(FUZZ_SECONDS)) tools/fuzz

soak:
	@tools/soak --count $(COUNT) $(NAMES)
	@tools/soak --methods --count $(COUNT) $(or $(NAMES),host)
	@tools/soak --talk --count $(COUNT) $(or $(NAMES),host)

bench: .venv/ready
	@tools/in python bench/bench_spawn.py
	@tools/in python bench/bench_methods.py
	@tools/in python bench/bench_lifeline.py
	@tools/in python bench/bench_zygote.py
	@tools/in python bench/bench_run.py
	@tools/in python bench/bench_channel.py
	@tools/in python bench/bench_talk.py

clean:
	rm -rf .venv build
