"""The documentation tells the truth: its Python runs, its links lead somewhere."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from secateur.discovery import recorder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_PYTHON = [p for p in PAGES if "```python" in p.read_text()]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda p: p.name)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recorder, "RULES", dict(recorder.RULES))  # a page shows how to add one
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)


def test_llama_cpp_continues_the_text_as_the_readme_shows(tmp_path, monkeypatch, secateur, capfd):
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir(tmp_path)
    commands, shown = re.findall(r"with the bundled model:\n\n```\n(.*?)```.*?```\n(.*?)```", README, re.DOTALL)[0]
    *steps, last = (shlex.split(line) for line in commands.splitlines())
    for program, *arguments in steps:
        assert program == "secateur" and secateur(*arguments)[0] == 0
    program, script, *arguments = last
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script))
    printed = capfd.readouterr().out
    assert program == "python" and not stop.value.code and printed.endswith("the same tokens\n")
    lines = [line.partition(":")[2].strip() for line in shown.splitlines()[:2]]
    assert lines[0] == lines[1] and lines[0].startswith("The old man opened the door")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
