"""The check that every bundle carries, verify.py: Python 3.9 and NumPy are all that it needs.

Its parts are modules here, where `dsjax align` uses them too; a bundle gets them joined to one file.
"""

from __future__ import annotations

import ast
from pathlib import Path

_PARTS = ("arrays", "errors", "ranks", "manifest", "verify")


def _imports(nodes: list[ast.Import | ast.ImportFrom]) -> str:
    """Import statements merged by module; what is joined needs none of ours."""
    plain = sorted({ast.unparse(node) for node in nodes if isinstance(node, ast.Import)})
    names: dict[str, set[str]] = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("dsjax"):
            names.setdefault(node.module, set()).update(alias.name for alias in node.names)
    first = f"from __future__ import {', '.join(sorted(names.pop('__future__')))}"
    listed = [f"from {module} import {', '.join(sorted(found))}" for module, found in sorted(names.items())]
    own = [line for line in plain if "numpy" not in line]
    return "\n\n".join([first, "\n".join(own + listed), "import numpy as np"])


def source() -> str:
    """The text of verify.py: the parts in order, each import once, under the words of the last part."""
    imports: list[ast.Import | ast.ImportFrom] = []
    bodies: list[str] = []
    for part in _PARTS:
        text = Path(__file__).with_name(f"{part}.py").read_text(encoding="utf-8")
        words, *statements = ast.parse(text).body
        found = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
        imports += found
        lines = text.splitlines()
        bodies.append("\n".join(lines[found[-1].end_lineno or 0 :]).strip())
    return "\n\n".join(["\n".join(lines[: words.end_lineno]), _imports(imports), "\n\n\n".join(bodies)]) + "\n"
