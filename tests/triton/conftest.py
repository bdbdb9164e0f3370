"""The engine that Triton's kernels run on: the GPU where there is one, else the interpreter and the PTX simulator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import op_inputs
import pytest
import torch

from lesa_kernels.ops import TOLERANCES, Tolerance

ON_GPU = torch.cuda.is_available()
ENGINES = ["gpu"] if ON_GPU else ["interpreter", "ptx"]
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(params=ENGINES)
def lesa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package of launchers; its kernels run on the engine of the test, on tensors of its device."""
    from triton_engines import interpreter, on_gpu, simulator

    runs = {"gpu": on_gpu, "interpreter": interpreter, "ptx": simulator}[request.param]
    if request.param == "interpreter":
        # It truncates where it casts to bfloat16: up to one unit in the last place instead of half of one.
        loose = Tolerance(2 * TOLERANCES[torch.bfloat16].relative, TOLERANCES[torch.bfloat16].absolute)
        monkeypatch.setattr(op_inputs, "TOLERANCES", {**TOLERANCES, torch.bfloat16: loose})
    with torch.device(DEVICE), runs() as package:
        yield package


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what does not apply to Triton's kernels; mark what one engine or another need not run every time."""
    here = Path(__file__).parent
    mine = [item for item in items if isinstance(item, pytest.Function) and item.path.is_relative_to(here)]
    left_out = {item for item in mine if not _applies(item)}
    for item in set(mine) - left_out:
        if not _is_quick(item):
            item.add_marker(pytest.mark.exhaustive)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def _parameters_of(item: pytest.Function) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _applies(item: pytest.Function) -> bool:
    """Whether Triton's kernels can pass: none take float64, and the interpreter does not round to bfloat16."""
    parameters = _parameters_of(item)
    if torch.float64 in parameters.values() or item.get_closest_marker("float64"):
        return False
    truncates = parameters.get("lesa") == "interpreter" and parameters.get("dtype") == torch.bfloat16
    return not (truncates and item.originalname in _ROUNDING and parameters.get("source") != torch.bfloat16)


_ROUNDING = {
    "test_half_precision_rounds_to_nearest_even_and_overflows_to_infinity",
    "test_push_copies_and_converts_as_copy_does",
}
# What a parameter may be in a quick test, where engines run thousands of op_inputs. One compilation takes a second.
_QUICK: dict[str, dict[str, list[Any]]] = {
    # What all shapes and counts compile takes half an hour; tools/gpu_check/smoke.py has the other dtypes.
    "gpu": {
        "dtype": [torch.bfloat16],
        "shape": [(0,), (7,), (4, 4097)],
        "feature": [(7, 9), (2, 1030)],
        "count": [1, 8, 17],
        "rows": [1, 4, 17],
        "source": [torch.float32],
        "order": [0, 3],
    },
    "interpreter": {"dtype": [torch.float32, torch.bfloat16], "count": [1, 3, 8, 17, 64], "rows": [1, 4, 17]},
    "ptx": {
        "dtype": [torch.bfloat16],
        "shape": [(0,), (7,), (1030,)],
        "feature": [(7, 9), (2, 1030)],
        "count": [8, 64],
        "rows": [4],
        "source": [torch.float32],
        "order": [0, 3],
    },
}
# Likewise of single tests: the products of all pairs take seconds in the interpreter, of 64 features half a minute.
_QUICK_OF_TEST: dict[tuple[str, str], dict[str, list[Any]]] = {
    ("interpreter", "test_gram_takes_1_to_64_features"): {"count": [1, 3, 8]},
    ("interpreter", "test_gram_takes_any_shape_and_layout"): {"shape": [(), (0,), (7,), (3, 0, 2), (1030,)]},
    ("interpreter", "test_gram_of_features_whose_products_leave_the_range_of_float32"): {"size": [67]},
    ("interpreter", "test_sizes"): {"inputs": [1, 51, 2], "outputs": [1, 3, 5]},
    ("ptx", "test_gram_takes_1_to_64_features"): {"count": [8]},
    ("ptx", "test_gram_of_features_whose_products_leave_the_range_of_float32"): {"size": [67, 9001]},
}


def _is_quick(item: pytest.Function) -> bool:
    parameters = _parameters_of(item)
    if ON_GPU and "lesa" not in parameters:
        return False  # simulated, or about the dispatcher: passes or fails here as it does without a GPU
    engine = parameters.get("lesa", "")
    quick = _QUICK.get(engine, {}) | _QUICK_OF_TEST.get((engine, item.originalname), {})
    return all(value in quick[name] for name, value in parameters.items() if name in quick)
