"""A process of its own that draws training batches with few open files."""

import subprocess
import sys

# while one worker is slow, the others' batches wait in the parent
FEW_FILES = """
import resource, time
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
given = Images.__getitem__
def slow(self, place):
    if place.step in (5, 50) and place.slot == 0:
        time.sleep(2)
    return given(self, place)
Images.__getitem__ = slow
for step, batch in zip(range(200), loaders[0]):
    assert len(batch) == 16
print("steps:", step + 1)
"""


def assert_takes_few_files(script: str, *words: object) -> None:
    """Draw 200 batches of 16 from the first of the ``loaders`` that a script makes of the data set class ``Images``."""
    done = subprocess.run([sys.executable, "-c", script + FEW_FILES, *map(str, words)], capture_output=True, text=True)
    assert done.stdout == "steps: 200\n", done.stderr
