"""Settings that hold for all tests of learning."""

import pytest


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute alike on processors with bfloat16 and without."""
    descent = pytest.importorskip("pwopt.learn.descent", reason="learning needs torch")
    monkeypatch.setattr(descent, "has_bfloat16", lambda device: False)
