"""The command line: every verb helps, every mistake is one line and exit status 2, and nothing heavy is loaded early.

pytest tests/test_cli.py
"""

from __future__ import annotations

import inspect
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mbtrain import cli
from mbtrain.command import finish
from tests import launch, tiny
from tests.test_checkpoint import made_run


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(launch.config_file(tmp_path, tiny.tree()))


def run(*args: str) -> int:
    """The exit status of a command line in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(args))
    assert isinstance(end.value.code, int)
    return end.value.code


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--help"], ["-h"], ["help"]):
        assert run(*args) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        for verb in cli.PROGRAM.verbs:
            assert f"  mbtrain {verb} " in captured.out


@pytest.mark.parametrize("verb", list(cli.PROGRAM.verbs))
def test_every_verbs_help_answers_and_names_every_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([verb, "--help"], [verb, "whatever", "-h"]):
        assert run(*args) == 0
        captured = capsys.readouterr()
        assert captured.out.startswith(f"mbtrain {verb}")
        assert captured.err == ""
        for parameter in inspect.signature(cli.PROGRAM.verbs[verb]).parameters.values():
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                assert f"--{parameter.name.replace('_', '-')}" in captured.out


def test_help_takes_less_than_half_a_second_of_the_processor() -> None:
    """CPU time of the whole process, so that a busy machine does not matter."""
    command = [sys.executable, "-m", "mbtrain"]
    for args in (["--help"], ["train", "--help"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*command, *args], env=launch.environment(), capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stdout.startswith("mbtrain")
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], "trian: no such verb (did you mean train?); expected one of train, eval"),
        (["--json"], "--json: no such verb"),
        (["train"], "CONFIG: expected one configuration file, got 0"),
        (["train", "{config}", "more"], "CONFIG: expected one configuration file, got 2"),
        (["train", "gone.yaml"], "gone.yaml: cannot read the config (No such file or directory)"),
        (["train", "{config}", "--rnu=x"], "--rnu: no such option (did you mean run?)"),
        (["train", "{config}", "--optim.lr"], "--optim.lr: has no value"),
        (["train", "{config}", "--optim.lr=fast"], "optim.lr: got 'fast'"),
        (
            ["train", "{config}", "--optim.warmup=1"],
            "optim.warmup: unknown key (value '1'); did you mean warmup_steps?",
        ),
        (["train", "{config}", "--optim.betas=[0.9,"], "optim.betas: got '[0.9,', which is not valid YAML"),
        (["train", "{config}", "optim.lr=1"], "CONFIG: expected one configuration file, got 2"),
        (["train", "{config}", "--json=perhaps"], "--json: expected true or false, got 'perhaps'"),
        (["train", "{config}", "-j"], "-j: options are written --key=value"),
        (["train", "{config}", "--run=a", "--resume=b"], "--run=a, --resume=b: expected one folder"),
        (["train", "--resume=gone"], "gone/config.yaml: cannot read the config"),
        (["eval"], "RUN: expected one run directory or checkpoint, got 0"),
        (["eval", "a", "b"], "RUN: expected one run directory or checkpoint, got 2"),
        (["eval", "{tmp}"], "neither a run directory (no config.yaml) nor a checkpoint"),
        (["eval", "{tmp}", "--splitt=val"], "--splitt: no such option (did you mean split?)"),
        (["eval", "{tmp}", "--mode=slidng"], "--mode: expected"),
        (["eval", "{tmp}", "--batch=0"], "--batch: expected a whole number of at least 1, got '0'"),
        (["eval", "{tmp}", "--batch=2.5"], "--batch: expected a whole number"),
        (["eval", "{tmp}", "--precision=fp8"], "--precision: expected as-trained, fp32, bf16 or autocast, got 'fp8'"),
        (["sample", "{tmp}", "--prompt=a", "--prompt-file=b"], "expected one of them, got both"),
        (["sample", "{tmp}", "--prompt-file=gone"], "--prompt-file=gone: cannot be read (No such file or directory)"),
        (["sample", "{tmp}", "--temperature=-1"], "--temperature: expected a number of at least 0, got '-1'"),
        (["sample", "{tmp}", "--temperature=nan"], "--temperature: expected a number of at least 0, got 'nan'"),
        (["sample", "{tmp}", "--bytes=many"], "--bytes: expected a whole number of at least 1, got 'many'"),
        (["sample", "{tmp}", "--top-k=0"], "--top-k: expected a whole number of at least 1"),
        (["sample", "{tmp}", "--seed=-1"], "--seed: expected a whole number of at least 0"),
        (["sample", "{tmp}", "--topk=3"], "--topk: no such option (did you mean top-k?)"),
        (["export", "{tmp}"], "--out: expected a folder, got nothing"),
        (["export", "{tmp}", "--out={tmp}/new"], "neither a run directory"),
        (["export", "{tmp}", "--out={tmp}"], "exists already"),
        (["flops"], "CONFIG: expected one configuration file, got 0"),
        (["flops", "{config}", "--model.stages.7.d_model=3"], "'7' is no position in a list of 2"),
        (["bench"], "bench: expected one of"),
        (["bench", "speed"], "bench: expected one of"),
        (["ui", "--prot=3"], "--prot: no such option (did you mean port?)"),
        (["ui", "--port=x"], "--port: expected a whole number of at least 1, got 'x'"),
        (["sync"], "RUN: expected one run directory or checkpoint, got 0"),
        (["flops", sys.executable], "not valid YAML: 'utf-8' codec can't decode byte"),
        (["doctor", "gone.yaml"], "gone.yaml: cannot read the config (No such file or directory)"),
        (["doctor", "--train.zero_stage=2"], "CONFIG: expected one configuration file, got 0"),
        (["doctor", "{config}", "--optim.warmup=1"], "optim.warmup: unknown key"),
        (["doctor", "--hostfile=gone"], "--hostfile=gone: cannot be read (No such file or directory)"),
        (["doctor", "--hostfiel=x"], "--hostfiel: no such option (did you mean hostfile?)"),
        (["doctor", "--ranks=2", "--hostfile=gone"], "--ranks=2, --hostfile=gone: expected one of them"),
        (["doctor", "--master-port=0"], "--master-port: expected a whole number of at least 1, got '0'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "sub").mkdir()
    filled = [arg.replace("{config}", config).replace("{tmp}", str(tmp_path / "sub")) for arg in args]
    assert run(*filled) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("mbtrain: ")
    assert words in captured.err
    (tmp_path / "sub").rmdir()
    assert sorted(tmp_path.rglob("*")) == before, "a mistake leaves nothing behind"


def test_figures_are_json_although_json_knows_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    finish({"losses": [[math.nan, 1.0], (math.inf, -math.inf)], "path": Path("a")}, True)
    assert capsys.readouterr().out == '{"losses": [[null, 1.0], ["inf", "-inf"]], "path": "a"}\n'


def test_options_with_dashes_are_those_with_underscores(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("flops", config, "--data.seq-len=64", "--json") == 0
    dashed = capsys.readouterr().out
    assert run("flops", config, "--data.seq_len=64", "--json") == 0
    assert capsys.readouterr().out == dashed


def test_what_launchers_put_before_the_verb_is_accepted(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """deepspeed: --local_rank=N; torchrun: a -- that keeps it from reading our options."""
    assert run("flops", config, "--json") == 0
    plain = capsys.readouterr().out
    for before in (["--local_rank=0"], ["--"], ["--local_rank=3", "--"]):
        assert run(*before, "flops", config, "--json") == 0
        assert capsys.readouterr().out == plain
    assert run("--local_rank=0", "train", "gone.yaml") == 2
    assert "gone.yaml: cannot read the config" in capsys.readouterr().err


@pytest.mark.parametrize("verb", list(cli.PROGRAM.verbs))
def test_every_verb_takes_json(verb: str) -> None:
    assert "json" in inspect.signature(cli.PROGRAM.verbs[verb]).parameters


def test_json_is_the_last_line_and_only_where_asked_for(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option, wanted in (("--json", True), ("--json=true", True), ("--json=false", False)):
        assert run("flops", config, option) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert (last.startswith('{"parameters": ')) == wanted
    figures = launch.last_json(launch.mbtrain(["flops", config, "--json"]).stdout)
    assert {"parameters", "forward_flops_per_byte", "training_flops_per_byte"} <= set(figures)


def test_only_rank_0_says_what_all_ranks_know(config: str) -> None:
    """A wrong configuration is found by every rank alike."""
    for rank, lines in (("0", 1), ("1", 0)):
        done = subprocess.run(
            [sys.executable, "-m", "mbtrain", "train", config, "--optim.lr=0"],
            env=launch.environment(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == lines


def test_more_ranks_than_the_batch_has_rows_is_said_before_torch_is_loaded(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run("train", config) == 2
    assert "train.global_batch_size: got 4, expected a multiple of the number of ranks, 3" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(config: str) -> None:
    """`mbtrain flops CONFIG | true`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mbtrain", "flops", config]
    done = subprocess.run(command, env=launch.environment(), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 0


def test_export_says_where_and_json_holds_the_path(tmp_path: Path) -> None:
    made_run(tmp_path / "run", tiny.make(1))
    ended = launch.mbtrain(["export", str(tmp_path / "run"), f"--out={tmp_path / 'out'}", "--json"])
    assert launch.last_json(ended.stdout) == {"path": str(tmp_path / "out")}


def test_examples_in_help_name_only_real_verbs_and_options() -> None:
    """Every `mbtrain VERB ... --option` line of the help pages parses against that verb."""
    from mbtrain.config import Config

    seen = 0
    for text in [inspect.getdoc(verb) or "" for verb in cli.PROGRAM.verbs.values()]:
        for line in text.splitlines():
            match = re.match(r" +(?:deepspeed .*--module |torchrun .*-m )?mbtrain (?:-- )?(\S+)( .*)$", line)
            if not match:
                continue
            seen += 1
            verb = cli.PROGRAM.verbs[match[1]]
            known = inspect.signature(verb).parameters
            for key in re.findall(r" --([a-z_.0-9-]+)", match[2]):
                if "." in key:
                    assert key.split(".")[0] in {*Config.model_fields, "grid", "random"}, line  # axes of a sweep
                else:
                    assert key.replace("-", "_") in known, line
    assert seen >= 5
