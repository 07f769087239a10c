"""What the README and the headers of configurations tell the reader to type is there and does what they say.

pytest tests/test_readme.py; the block "Step by step", run as it stands but smaller: pytest -m slow tests/test_readme.py
"""

from __future__ import annotations

import inspect
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data_prep.cli
from mbtrain import cli, config
from mbtrain.bench import VERBS
from mbtrain.sweep import spec as specs
from tests import launch
from tests.launch import ROOT

PROGRAMS = {"mbtrain": cli.PROGRAM, "mbtrain-prep": data_prep.cli.PROGRAM}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HEADERS = sorted((ROOT / "configs").rglob("*.yaml"))


def code_lines(path: Path) -> list[str]:
    """Indented and fenced lines of a page, comments of a configuration, and `code` within prose."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    if path.suffix == ".yaml":
        return [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
    fenced = [line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [*fenced, *indented, *re.findall(r"`([^`\n]+)`", text)]


def commands(line: str) -> list[list[str]]:
    """The calls of our programs in a shell line: [program, verb, arguments ...]; none in what is no command."""
    try:
        words = shlex.split(re.sub(r"\$\([^)]*\)", "X", line), comments=True)  # $(another command) is a value
    except ValueError:  # an apostrophe of prose
        return []
    found = []
    for i, word in enumerate(words):
        if word in PROGRAMS and (i == 0 or words[i - 1] in ("-m", "--module", "&&", "or:")):
            ends = [at for at in range(i, len(words)) if words[at] in ("|", ">", "&&", "&")]
            args = [arg for arg in words[i + 1 : min(ends, default=None)] if arg != "--"]
            if args and not args[0].startswith(("-", "→")):
                found.append([word, *args])
    return found


WRITTEN = sorted({tuple(call) for page in PAGES + HEADERS for line in code_lines(page) for call in commands(line)})


def test_commands_are_found() -> None:
    """The tests below are not empty: each verb that the README is about is among them."""
    verbs = {call[:2] for call in WRITTEN}
    assert {("mbtrain-prep", verb) for verb in ("text", "verify", "stats")} <= verbs
    assert {("mbtrain", verb) for verb in ("train", "eval", "sample", "summary", "export", "ui")} <= verbs
    assert commands("deepspeed --module mbtrain train x  # y") == [["mbtrain", "train", "x"]]
    assert commands("torchrun -m mbtrain -- train x --run='a b'") == [["mbtrain", "train", "x", "--run=a b"]]
    assert commands("raw files -> mbtrain-prep -> tars") == commands("the user's mbtrain eval") == []


@pytest.mark.parametrize("call", WRITTEN, ids=" ".join)
def test_a_written_command_names_a_verb_and_its_options(call: tuple[str, ...]) -> None:
    name, verb, *args = call
    program = PROGRAMS[name]
    assert verb in program.verbs
    function = program.verbs[verb]
    if verb == "bench":
        assert args[0] in VERBS
        function = VERBS[args[0]]
    parameters = inspect.signature(function).parameters.values()
    known = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)} | {"json", "help"}
    # Verbs that share their options take them as a mapping; their help lists each, which tests/data_prep hold them to.
    known |= {name.replace("-", "_") for name in re.findall(r"^  --([a-z-]+)", inspect.getdoc(function) or "", re.M)}
    options = dict(arg[2:].partition("=")[::2] for arg in args if arg.startswith("--"))
    dotted = {key: value for key, value in options.items() if "." in key}
    assert {key.replace("-", "_") for key in options if key not in dotted} <= known
    assert not any(arg.startswith("-") and not arg.startswith("--") for arg in args), "options are --key=value"
    assert all("=" in arg or arg[2:] in {*program.flags, "help"} for arg in args if arg.startswith("--"))
    if verb in ("train", "flops", "doctor", "coord-check"):
        given = [arg for arg in args if not arg.startswith("-")]
        path = given[0] if given and given[0] != "CONFIG" else "configs/quickstart.yaml"
        if not any(f"--out={path}" in call for call in WRITTEN):  # which another command makes
            config.load(ROOT / path, dotted)  # keys and values
    elif verb == "sweep":
        path = ROOT / args[0]
        if path.is_file():
            own = {"out", "share", "retry", "report", "json"}
            spec = specs.read(path, {key: value for key, value in options.items() if key not in own})
            specs.settings(spec, specs.planned(spec)[:1])
    else:
        assert not dotted


@pytest.mark.parametrize("page", PAGES + HEADERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_and_configurations_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.])((?:launch|configs|tests)/[\w./-]*\w\.\w+|\.ci/\w+)", text))
    if page.name == "README.md":
        assert "launch/quickstart.sh" in named
    missing = [path for path in named if not (ROOT / path).is_file()]
    assert not missing
    named_settings = re.findall(r"`--([a-z_]+\.[a-z_0-9.]+)=([^`\s]+)`", text)
    for key, value in named_settings:
        config.load(ROOT / "configs/quickstart.yaml", {key: value})


def step_by_step() -> list[str]:
    """The commands of the README's block of that name."""
    (_, after) = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Step by step\n")
    block = re.match(r"\n((?:(?:    .*)?\n)+)", after)
    assert block
    lines = [line.strip() for line in block[1].replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.slow
def test_step_by_step_does_what_it_says(tmp_path: Path) -> None:
    """In a copy of the tree, as written, but: installed already, few and short documents, a small model, seconds."""
    copy = tmp_path / "copy"
    hidden = shutil.ignore_patterns(".*", "runs", "shards", "mlruns", "exported", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=hidden)
    rng = random.Random(0)
    (copy / "mine").mkdir()
    for i in range(400):
        words = rng.choices(["def", "return", "byte", "patch"], k=rng.randint(5, 60))
        (copy / "mine" / f"{i:03d}.py").write_text(" ".join(words) + f" {i}\n")
    small = "--data.seq_len=64 --train.global_batch_size=4 --model.stages.0.n_layers=1 --model.stages.1.n_layers=1"

    def smaller(line: str) -> str:
        line = line.replace("SRC...", "mine")
        if " train " not in line:
            return line
        minutes = re.search(r"--train\.minutes=(\d+)", line)
        line = re.sub(r" --train\.minutes=\d+", "", line)
        share = int(minutes[1]) / 500 if minutes else 0.02
        return f"{line} --train.minutes={share}{'' if '--resume' in line else f' {small}'}"

    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**launch.environment(PATH=path), "PYTHONPATH": str(copy)}
    done = {}
    for line in step_by_step():
        if line.startswith(("bash launch/setup.sh", "mbtrain ui")):
            continue
        run = ["bash", "-c", smaller(line)]
        ended = subprocess.run(run, cwd=copy, env=env, capture_output=True, text=True, timeout=180)
        assert ended.returncode == 0, f"{smaller(line)}\n{ended.stdout}\n{ended.stderr}"
        done[line] = ended.stdout
    assert len(done) >= 10
    for run_name in ("mine", "two", "three"):
        assert list((copy / "runs" / run_name / "checkpoints").glob("step_*")), run_name
    assert "going on from" in (copy / "runs" / "mine" / "log.txt").read_text()
    assert (copy / "mlruns").exists()
    program = (
        "import torch\n"
        "from mbtrain import export\n"
        'model = export.load("exported")\n'
        'print(model(torch.tensor([list(b"any bytes")])).shape)\n'
    )
    loaded = subprocess.run([sys.executable, "-c", program], cwd=copy, env=env, capture_output=True, text=True)
    assert loaded.stdout == "torch.Size([1, 9, 257])\n", loaded.stderr
