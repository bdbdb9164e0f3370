"""The device of the op tests: always the CPU and, where there is a GPU, each test once more on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if torch.cuda.is_available():
        metafunc.parametrize("device", ["cpu", "cuda"], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs float64 features, which only the CPU takes."""

    def on_cuda_in_float64(item: pytest.Item) -> bool:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        needs_float64 = torch.float64 in parameters.values() or item.get_closest_marker("float64")
        return parameters.get("device") == "cuda" and bool(needs_float64)

    left_out = [item for item in items if on_cuda_in_float64(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Make the tensors of a test on its device."""
    with torch.device(getattr(request, "param", "cpu")) as device:
        yield device
