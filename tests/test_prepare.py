"""What keeps a run from being prepared."""

from types import SimpleNamespace

import pytest

from mtl.errors import UserError
from mtl.prepare import open_checkpoint


def test_processes_that_see_different_checkpoints_are_told(tmp_path):
    """As where each machine has an output folder of its own: one would go on, the others start anew."""
    answers = iter([[None, None], [None, None], [None, 3]])  # no mistake of either turn; then the steps found
    distributed = SimpleNamespace(is_main=True, gather=lambda value: next(answers))
    settings = SimpleNamespace(resume_from_checkpoint="auto")
    with pytest.raises(
        UserError, match=r"checkpoints of different steps, \[None, 3\]. Give a folder that all machines"
    ):
        open_checkpoint(settings, tmp_path, distributed, {}, {})
