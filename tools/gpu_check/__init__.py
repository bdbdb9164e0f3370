"""One command for a machine with a GPU: build, test, check memory accesses, measure, report (`make gpu-check`)."""
