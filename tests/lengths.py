"""House limits that no linter checks: files of at most 500 lines, functions of at most 60, README of at most 150."""

import ast
import subprocess
import sys
from pathlib import Path

FILE_LINES, FUNCTION_LINES, README_LINES = 500, 60, 150


def excesses(root: Path) -> list[str]:
    """Every place in the tracked files of `root` that is over a limit, as `path:line what (length)`."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True, check=True)
    found = []
    for name in listed.stdout.split("\n"):
        path = root / name
        if not name or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > FILE_LINES:
            found.append(f"{name}: file ({text.count(chr(10))} lines, at most {FILE_LINES})")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION_LINES:
                    found.append(f"{name}:{node.lineno} {node.name} ({length} lines, at most {FUNCTION_LINES})")
    readme = root / "README.md"
    if readme.is_file() and readme.read_text(encoding="utf-8").count("\n") > README_LINES:
        found.append(f"README.md: over {README_LINES} lines")
    return found


if __name__ == "__main__":
    problems = excesses(Path(__file__).parent.parent)
    print("\n".join(problems) or "lengths: all within limits")
    sys.exit(bool(problems))
