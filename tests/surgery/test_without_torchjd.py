from __future__ import annotations

import sys

import pytest

from mtl.surgery import TorchJD


def test_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ValueError, match=r"^weighting: needs the package torchjd, found none; pip install 'mtl-sft\["):
        TorchJD("UPGradWeighting")
