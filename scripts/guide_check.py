#!/usr/bin/env python3
"""Runs every command of docs/vendor.md in a new folder, in order, and stops at the first that ends otherwise than said.

    .venv/bin/python scripts/guide_check.py [--keep FOLDER] [GUIDE.md]

Blocks marked `sh` are run by one bash; blocks that begin with `# NAME.toml` or `# NAME.py` are files of that name. A
command whose last line ends in `# status N` has to end with N, others with 0. Needs the extra `verify`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """A block's commands: its lines, those joined that go on by a backslash or inside quotes."""
    found, waiting = [], ""
    for line in block.splitlines():
        waiting += line + "\n"
        if not line.endswith("\\") and waiting.count('"') % 2 == 0 and waiting.strip():
            found.append(waiting.strip())
            waiting = ""
    if waiting.strip():
        raise ValueError(f"a command without an end: {waiting}")
    return found


def script(guide: str, folder: Path) -> str:
    """Writes the guide's files, and gives its commands as one bash script."""
    lines = ['check() { [ $1 = $2 ] || { echo "guide: expected status $2, found $1" >&2; exit 1; }; }']
    for language, block in blocks(guide):
        if language == "sh":
            for command in commands(block):
                status = re.search(r"# status (\d)$", command)
                lines += [f"cat <<'COMMAND'\n$ {command}\nCOMMAND", command, f"check $? {status[1] if status else 0}"]
        elif name := re.match(r"# ([\w-]+\.\w+)\n", block):
            (folder / name[1]).write_text(block, encoding="utf-8")
    return "\n".join(lines) + "\n"


def run(guide: Path, folder: Path) -> int:
    """Runs a guide in a folder, where .venv and scripts are as in a clone; bash's status."""
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    text = script(guide.read_text(encoding="utf-8"), folder)
    return subprocess.run(["bash", "-c", text], cwd=folder).returncode


def main() -> int:
    """Status 1 if a command ended otherwise than the guide says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("guide", type=Path, nargs="?", default=ROOT / "docs" / "vendor.md")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="run there, and leave what the commands write")
    options = parser.parse_args()
    if options.keep is not None:
        options.keep.mkdir(parents=True)
        return run(options.guide, options.keep)
    with tempfile.TemporaryDirectory(prefix="dsjax-guide-") as folder:
        return run(options.guide, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
