"""The engine that a test of a CUDA kernel runs on: `ptx`, or `host` where test_sanitized.py asks for it."""

from __future__ import annotations

import pytest
from engines import Engine, Unavailable, build_host, build_ptx

BUILDERS = {"ptx": build_ptx, "host": build_host}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", choices=BUILDERS, default="ptx", help="how CUDA kernels run without a GPU")


@pytest.fixture(scope="session")
def built_engine(pytestconfig: pytest.Config) -> Engine:
    name = pytestconfig.getoption("--engine", "ptx")
    try:
        return BUILDERS[name](pytestconfig.rootpath / "build" / "tests")
    except Unavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture
def engine(built_engine: Engine) -> Engine:
    built_engine.begin()
    return built_engine
