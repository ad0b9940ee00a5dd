"""docs/vendor.md: its commands do what it says, and how they are taken out of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

spec = importlib.util.spec_from_file_location("guide_check", ROOT / "scripts" / "guide_check.py")
assert spec is not None and spec.loader is not None
guide_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(guide_check)

GUIDE = """
```toml
# a.toml
x = 1
```

    not this

```sh
A="1
2"
ls a.toml \\
    && true
false  # status 1
```
"""


def test_commands_and_files_are_found(tmp_path: Path) -> None:
    assert guide_check.commands(guide_check.blocks(GUIDE)[1][1]) == [
        'A="1\n2"',
        "ls a.toml \\\n    && true",
        "false  # status 1",
    ]
    text = guide_check.script(GUIDE, tmp_path)
    assert (tmp_path / "a.toml").read_text() == "# a.toml\nx = 1\n"
    assert subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True).returncode == 0
    wrong = guide_check.script(GUIDE.replace("false ", "true "), tmp_path)
    done = subprocess.run(["bash", "-c", wrong], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "expected status 1, found 0" in done.stderr


@pytest.mark.full
@pytest.mark.verify
@pytest.mark.aot
def test_the_vendor_guide_runs(tmp_path: Path) -> None:
    """Five minutes on two cores."""
    command = [sys.executable, str(ROOT / "scripts" / "guide_check.py"), "--keep", str(tmp_path / "guide")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
