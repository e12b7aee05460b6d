# Each target installs and builds what it needs first. The scripts do the work, and can be run alone.
PREFIX ?= /usr/local
DESTDIR ?=

.PHONY: setup build demo test test-containerd test-ch soak bench install check clean

setup:          ; scripts/setup
build: setup    ; scripts/build
demo: build     ; scripts/demo
test: build     ; scripts/test
test-containerd: build ; scripts/test-containerd
test-ch: build  ; scripts/test-ch
soak: build     ; scripts/soak
bench: build    ; scripts/bench
check:          ; scripts/check
install:        ; DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' scripts/install
clean:          ; cargo clean
