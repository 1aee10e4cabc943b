"""The documentation is executed: every python block runs, its output is the text block after it, its names exist.

Shell blocks are only parsed, since most of them train for minutes or want a cluster.
"""

import contextlib
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SYMBOLS = re.compile(r"((?:`\w+`,? ?(?:and )?)+)\(`([\w/]+\.py)`\)")  # `LIF` (`neurons/lif.py`)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_python(pages: list[Path]) -> list[Path]:
    return [page for page in pages if "```python\n" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", with_python(PAGES), ids=names)
def test_examples_run_and_print_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whatever an example writes
    blocks = FENCE.findall(page.read_text(encoding="utf-8"))
    namespace: dict = {"__name__": "__main__"}
    for (language, code), following in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{page.name}: {code.splitlines()[0]}", "exec"), namespace)
        if following[0] == "text":
            assert printed.getvalue().split() == following[1].split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash to parse with")
@pytest.mark.parametrize("page", PAGES, ids=names)
def test_shell_blocks_are_what_bash_can_read(page):
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "sh":
            found = subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True, check=False)
            assert found.stderr == "", code


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_symbols_tests_and_links_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    for group, file in SYMBOLS.findall(text):
        source = (ROOT / "spikeformers" / file).read_text(encoding="utf-8")
        for symbol in re.findall(r"`(\w+)`", group):
            assert re.search(rf"^(def|class) {symbol}\b|^{symbol}\b", source, re.MULTILINE), (
                f"{symbol} is not in {file}"
            )
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, f"no test is called {name}"
    for target in LINK.findall(text):
        assert (page.parent / target).exists(), f"broken link: {target}"
