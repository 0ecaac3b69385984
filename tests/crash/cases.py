"""A small conversion to disturb, and what must hold after every disturbance."""

import shutil

from crash.sizes import OPTIONS, shrink
from gemma4_moe import convert
from support.checkpoints import contents, write_checkpoint
from support.models import random_hf_state_dict


class Case:
    """One conversion: into a new directory, or over an old checkpoint."""

    def __init__(self, directory, *, overwrite):
        self.directory = directory
        directory.mkdir(exist_ok=True)
        shrink()
        self.source = write_checkpoint(directory / "hf", random_hf_state_dict(layers=2, E=6, H=40, I=24))
        self.target = directory / "nemo"
        self.options = OPTIONS | {"overwrite": overwrite}
        self._kept = directory.with_name(f"{directory.name}-old")
        self._old = None
        if overwrite:
            convert(self.source, self._kept, workers=1)
            self._old = contents(self._kept)
        convert(self.source, self.target, **self.options)
        self._whole = contents(self.target)
        self._before = contents(self.source)
        assert self._old != self._whole
        self.reset()

    def reset(self):
        """Put back what was there before the conversion."""
        shutil.rmtree(self.target, ignore_errors=True)
        if self._old is not None:
            shutil.copytree(self._kept, self.target)

    def check(self, disturb):
        """Disturb one run, and check that nothing is lost, that nothing is half done, and that it can be resumed."""
        self.reset()
        disturb(self)
        now = contents(self.target) if self.target.exists() else None
        assert now in (self._whole, self._old), "the target is neither as before nor complete"
        assert contents(self.source) == self._before, "the source has changed"
        convert(self.source, self.target, resume=True, **self.options)
        assert contents(self.target) == self._whole, "after --resume the target has other bytes"
        left = sorted(path.name for path in self.directory.iterdir())
        assert left == ["hf", "nemo"], f"after --resume there is {left}"
