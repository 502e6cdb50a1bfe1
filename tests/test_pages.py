"""Every command that README.md and docs/ show has known options, and it is run or has a reason why not."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

REPORTS = set(Path("docs/gpu").glob("*.md")) - {Path("docs/gpu/README.md")}
"""Pages that a command wrote on a GPU, kept unchanged."""
PAGES = [Path("README.md"), *sorted(set(Path("docs").rglob("*.md")) - REPORTS)]
RUN = {
    "README.md": "test_the_readme_s_small_commands_run_as_printed; make demo; the others need the published data",
    "docs/demo.md": "test_the_demo_s_page_shows_what_make_demo_runs",
    "docs/extend.md": "tests/test_extend.py",
}
NOT_RUN = {
    "docs/ablations.md": "trains for minutes; tests/lab runs the same on the smallest model",
    "docs/ask-and-serve.md": "needs a tuned checkpoint; tests/generate and tests/serve run the same on a small one",
    "docs/clusters.md": "needs a bucket and a cluster; tests/remote and tests/launch run the same on this machine",
    "docs/code.md": "shows the form of a command",
    "docs/convert.md": "needs the published weights; tests/convert runs the same on small ones",
    "docs/data.md": "needs CC12M and DataComp; tests/data and tests/curate run the same on small tars",
    "docs/evaluation.md": "needs the benchmarks' files; tests/eval runs the same on small ones",
    "docs/experiments.md": "records what was run then, at the commit it names",
    "docs/gpu/README.md": "needs a GPU; tests/bench runs the report's parts on a CPU",
    "docs/performance.md": "needs a GPU or the extra plan; tests/bench runs the same on a CPU, pytest -m plan the plan",
    "docs/server.md": "needs a tuned checkpoint; tests/serve runs the same on a small one",
    "docs/train.md": "needs the published data; tests/train runs the same on small rows",
    "docs/tune.md": "needs LLaVA's data; tests/train/test_tuning.py runs the same on a small list",
}
OURS = re.compile(r"(?:\.venv/bin/)?python -m ((?:oq2vl_jax|convert)[\w.]*)(.*)")


def commands_of(page):
    """(module, arguments) of every command of ours in the blocks and the spans of code of a page."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    spans = re.findall(r"`(python -m [^`\n]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
    for line in [*"\n".join(blocks).split("\n"), *spans]:
        for quoted in re.findall(r'--wrap "(.*?)"', line) or [line]:
            if found := OURS.search(filled(quoted)):
                yield found[1], shlex.split(re.sub(r"\s#\s.*", "", found[2]))


def filled(line):
    """A line of a loop of the shell with the value of its first round."""
    for variable, value in (
        ("$method", "generate"),
        ("$(basename $name)", "ccs"),
        ("$name", "ccs"),
        ("\\|", "|"),
        ("\\$SLURM_ARRAY_TASK_ID", "0"),
    ):
        line = line.replace(variable, value)
    return line


SHOWN = [
    pytest.param(module, arguments, id=f"{page}: {module} {' '.join(arguments)}"[:120])
    for page in PAGES
    if page.name != "experiments.md"
    for module, arguments in commands_of(page)
    if arguments and not any(word in ("CONFIG", "official|open_qwen2vl") for word in arguments)
]


class Parsed(BaseException):
    """Ends a command once its options are known."""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")  # of runpy, for a module tested before
@pytest.mark.parametrize(("module", "arguments"), SHOWN)
def test_a_shown_command_exists_with_its_options(module, arguments, monkeypatch):
    original = tyro.cli

    def parse_only(*args, **options):
        original(*args, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse_only)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__", alter_sys=False)


def test_every_page_with_commands_is_run_or_says_why_not():
    """Pages of ablations are written by ablate report; what they show takes hours."""
    ours = [page for page in PAGES if page.parent.name != "ablations"]
    shown = {str(page) for page in ours if any(True for _ in commands_of(page))}
    assert shown == (set(RUN) | set(NOT_RUN)) & {str(page) for page in PAGES}
    assert not set(RUN) & set(NOT_RUN)


def test_the_demo_s_page_shows_what_make_demo_runs():
    """The same modules with the same arguments, in the same order; the page's loop over two methods is one command."""
    page = [(module, arguments) for module, arguments in commands_of(Path("docs/demo.md"))]
    recipe = re.search(r"^demo: \.venv.*?\n(.*?)\n\n", Path("Makefile").read_text(), re.S | re.M)
    text = recipe[1].replace("\\\n", " ").replace("$(DEMO)", "demo").replace("$(BIN)/", "")
    made = [(found[1], shlex.split(found[2])) for line in text.split("\n") if (found := OURS.search(line))]
    made = [command for command in made if "demo/results/options" not in command[1]]
    assert page[: len(made)] == made


def test_the_readme_s_small_commands_run_as_printed(tmp_path):
    text = Path("README.md").read_text()
    block = re.search(r"```bash\n(.venv/bin/python -m oq2vl_jax.train tiny.*?)```", text, re.S)[1]
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    for command in block.strip().split("\n"):
        words = shlex.split(command.replace("runs/a", str(tmp_path / "a")))
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "-c", code.replace("runs/a", str(tmp_path / "a"))], capture_output=True)
    assert done.returncode == 0, done.stderr
