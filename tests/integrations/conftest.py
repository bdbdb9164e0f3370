from __future__ import annotations

import pytest
from tiny_flux import TinyPipeline, tiny_pipeline


@pytest.fixture
def pipe() -> TinyPipeline:
    return tiny_pipeline()
