"""The compiled files: they keep to the stable ABI, export nothing but C functions of their own, and name no machine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lesa_kernels as lesa
from lesa_kernels.backends import libraries

PACKAGE = Path(lesa.__file__).parent


@pytest.fixture(params=["_cpu", "_cuda"])
def library(request: pytest.FixtureRequest) -> Path:
    path = PACKAGE / f"{request.param}.so"
    if not path.exists():
        pytest.skip(libraries.load_library(request.param).reason)
    return path


@pytest.fixture
def inspection() -> ModuleType:
    module, reason = libraries.inspection_module()
    if module is None:
        pytest.skip(reason)
    return module


def _symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """Kind and name of each dynamic symbol, names without their version."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) was not found")
    output = subprocess.run([nm, "-D", *options, str(path)], capture_output=True, text=True, check=True).stdout
    return [(fields[-2], fields[-1].split("@")[0]) for fields in map(str.split, output.splitlines())]


def test_needs_only_the_stable_abi(library: Path) -> None:
    """No mangled symbol of torch or c10: only those can break with another torch."""
    needed = {name for _, name in _symbols(library, "--undefined-only")}
    assert not {name for name in needed if re.match(r"_Z\w*?(2at|3c10|5torch)", name)}
    assert "aoti_torch_library_init_impl" in needed


def test_every_strong_symbol_is_provided(library: Path) -> None:
    """`-z defs` at link time; only the stream's getter, which lives in libtorch_cuda, is weak."""
    weak = {name for kind, name in _symbols(library, "--undefined-only") if kind in "wv"}
    own = {name for name in weak if not name.startswith(("_ITM_", "__gmon", "__cxa", "__pthread", "pthread_"))}
    assert own <= {"aoti_torch_get_current_cuda_stream"}


def test_exports_its_c_functions_alone(library: Path) -> None:
    exported = {name for _, name in _symbols(library, "--defined-only")}
    assert f"lesa{library.stem}_info" in exported
    assert all(name.startswith(f"lesa{library.stem}_") for name in exported)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.9, 0.9999])
def test_a_library_that_was_cut_short_is_refused(library: Path, tmp_path: Path, share: float) -> None:
    """The system's loader ends the process on most of these."""
    content = library.read_bytes()
    (tmp_path / library.name).write_bytes(content[: int(share * len(content))])
    with pytest.warns(RuntimeWarning, match=rf"{library.name} failed to load: .*status\(\) shows what serves instead"):
        found = libraries.load_library(library.stem, tmp_path, cuda="13.0")
    assert not found.loaded
    assert re.search("was cut short, it has .* bytes: install the package again", found.reason)


def test_an_inspection_module_that_was_cut_short_is_refused(inspection: ModuleType, tmp_path: Path) -> None:
    path = Path(str(inspection.__file__))
    content = path.read_bytes()
    (tmp_path / path.name).write_bytes(content[: len(content) // 2])
    module, reason = libraries.inspection_module(tmp_path)
    assert module is None and "was cut short" in reason and "install the package again" in reason


def test_names_no_folder_of_the_machine_that_built_it(library: Path) -> None:
    content = library.read_bytes()
    assert str(PACKAGE.parent).encode() + b"/csrc" not in content
    assert str(Path(torch.__file__).parent).encode() not in content


def test_inspection_module_agrees_with_status(inspection: ModuleType) -> None:
    for library in libraries.libraries():
        if library.loaded:
            assert library.facts
            assert inspection.facts(str(PACKAGE / f"{library.name}.so"), f"lesa{library.name}_info") == library.facts
    with pytest.raises(ValueError, match="path must name a library that is loaded, got nowhere"):
        inspection.facts("nowhere.so", "lesa_cpu_info")


def test_dimensions_that_lie_together_are_merged(inspection: ModuleType) -> None:
    assert inspection.merge_dimensions([2, 3, 4], [[12, 4, 1], [12, 4, 1]]) == ([24], [[1], [1]], True)
    padded = inspection.merge_dimensions([2, 3, 4], [[15, 5, 1], [12, 4, 1]])
    assert padded == ([6, 4], [[5, 1], [4, 1]], False)
    with pytest.raises(ValueError, match="each of strides must have 2 entries like sizes, got 1"):
        inspection.merge_dimensions([2, 3], [[1]])


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_16_bit_floats_convert_as_torch_does(inspection: ModuleType, name: str, dtype: torch.dtype) -> None:
    """Every bit pattern widens exactly; the values half way between two neighbours, and beside them, round alike."""
    bits = torch.arange(2**16, dtype=torch.int32)
    values = bits.to(torch.uint16).view(dtype).float()
    widened = torch.tensor([getattr(inspection, f"widen_{name}")(pattern) for pattern in bits.tolist()])
    torch.testing.assert_close(widened, values, rtol=0, atol=0, equal_nan=True)

    finite = values[values.isfinite()].sort().values.double()
    halfway = ((finite[1:] + finite[:-1]) / 2).float()
    ends = torch.tensor([float("inf"), -float("inf"), 65519.0, 65520.0, 3.4028e38])
    near = [halfway, halfway.nextafter(torch.tensor(torch.inf)), halfway.nextafter(torch.tensor(-torch.inf)), ends]
    samples = torch.cat(near)[::7]
    narrowed = [getattr(inspection, f"narrow_{name}")(value) for value in samples.tolist()]
    assert torch.equal(torch.tensor(narrowed, dtype=torch.int32).to(torch.uint16), samples.to(dtype).view(torch.uint16))
