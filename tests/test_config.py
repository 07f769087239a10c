"""Configuration: every mistake is one line that names the dotted path, the value and what is allowed.

pytest tests/test_config.py
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain import config
from mbtrain.config import PRESETS, batch_shape, load, step_limit, to_yaml, validate
from mbtrain.errors import ConfigError
from tests import launch, tiny


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return launch.config_file(tmp_path, tiny.tree())


def changed(dotted: str, value: Any) -> dict[str, Any]:
    """The tiny tree with one value put somewhere in it."""
    tree: Any = copy.deepcopy(tiny.tree())
    *parents, last = dotted.split(".")
    node = tree
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[int(last) if isinstance(node, list) else last] = value
    return dict(tree)


def the_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    line = str(error.value)
    assert line == line.strip()
    assert "\n" not in line
    return line


def at(settings_: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        settings_ = settings_[int(part)] if part.isdigit() else getattr(settings_, part)
    return settings_


@pytest.mark.parametrize(
    ("dotted", "value", "expected"),
    [
        ("train.steps", "many", "a valid integer"),
        ("train.steps", 2.5, "a valid integer"),
        ("train.steps", 0, "greater than 0"),
        ("train.steps", [4], "a valid integer"),
        ("train.minutes", -1, "greater than 0"),
        ("train.flops", math.inf, "a finite number"),
        ("train.zero_stage", 4, "less than or equal to 3"),
        ("train.precision", "fp8", "'fp32', 'bf16', 'autocast' or 'fp16'"),
        ("train.compile", "perhaps", "a valid boolean"),
        ("train.seed", -1, "greater than or equal to 0"),
        ("train.seed", 2**63, "less than 9223372036854775808"),
        ("train.gradient_clipping", None, "a valid number"),
        ("optim.lr", "fast", "a valid number"),
        ("optim.lr", math.nan, "a finite number"),
        ("optim.lr", 0, "greater than 0"),
        ("optim.betas", 0.9, "a valid tuple"),
        ("optim.betas", [0.9], "missing"),
        ("optim.schedule", "linear", "'polynomial', 'cosine', 'wsd' or 'constant'"),
        ("optim.decay_share", 1.5, "less than or equal to 1"),
        ("model", None, "a valid dictionary"),
        ("model.stages", [], "at least 1 item"),
        ("model.stages", 5, "a valid tuple"),
        ("model.stages.1", 5, "a valid dictionary"),
        ("model.stages.1.d_model", "wide", "a valid integer"),
        ("model.stages.0.n_heads", 5, "a divisor of d_model = 32"),
        ("model.stages.0.n_heads", 32, "an even width per head for rotary, not 1"),
        ("model.stages.0.patch_size", 1, "a larger multiple of the next stage's 1"),
        ("model.stages.1.patch_size", 2, "1: it predicts bytes"),
        ("model.block.dropout", 1, "less than 1"),
        ("model.block.norm", "batchnorm", "'layernorm' or 'rmsnorm'"),
        ("model.preset", "newest", "'paper' or 'modern'"),
        ("model.kind", "rnn", "'megabyte', 'transformer', 'perceiver_ar' or 'subword'"),
        ("model.patching", "entropy", "'fixed' or 'space'"),
        ("model.cross_patch", -1, "greater than or equal to 0"),
        ("model.cross_patch", 5, "at most 4, the patch's positions"),
        ("model.latents", 8, "None for all others"),
        ("model.stages.1.window", 8, "None: finer stages"),
        ("data.seq_len", 30, "a multiple of model.stages.0.patch_size = 4"),
        ("data.path", 7, "a valid string"),
        ("data.check", "none", "'auto', 'size' or 'full'"),
        ("train.steps", True, "neither true nor false"),
        ("train.minutes", False, "neither true nor false"),
        ("optim.lr", True, "neither true nor false"),
        ("model.stages.0.d_model", True, "neither true nor false"),
        ("eval", True, "neither true nor false"),
        ("train.micro_batch_size", 3, "a divisor of train.global_batch_size = 4"),
        ("sample.top_p", 0, "greater than 0"),
        ("eval.every_steps", 0, "greater than 0"),
        ("checkpoint.keep_last", 0, "greater than 0"),
        ("name", "a/b", "pattern"),
        ("name", "..", "pattern"),
        ("name", 7, "a valid string"),
    ],
)
def test_a_wrong_value_is_one_line_with_path_value_and_allowed(dotted: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(changed(dotted, value))
    line = the_line(error)
    assert line.startswith(dotted), line
    if expected != "missing":
        assert str(value) in line
    assert expected in line


ONE = {"stages": tiny.STAGES[1]}


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"optim": {"betas": [0.9, 1.0]}}, "optim.betas.1: got 1.0, expected less than 1"),
        (
            {
                "model": {"stages": [{**tiny.STAGES[2][0], "patch_size": 64}, tiny.STAGES[2][1]]},
                "data": {"seq_len": 64},
            },
            "model.stages.0.d_model: got 32, expected at least patch_size = 64 (bytes are embedded",
        ),
        (
            {"model": {"kind": "transformer"}},
            "model.stages: got 2 of them, expected one, of patch_size 1, for model.kind=transformer",
        ),
        ({"model": {**ONE, "kind": "perceiver_ar"}}, "model.latents: got None, expected a number for"),
        ({"model": {**ONE, "kind": "perceiver_ar", "latents": 5}}, "model.latents: got 5, expected an even number"),
        ({"model": {**ONE, "kind": "perceiver_ar", "latents": 24}}, "data.seq_len: got 32, expected a multiple of"),
        ({"model": {**ONE, "kind": "perceiver_ar", "latents": 64}}, "data.seq_len: got 32, expected a multiple of"),
        (
            {"model": {**ONE, "kind": "subword"}},
            "model.vocabulary, model.vocabulary_size: got None, None, expected both",
        ),
        (
            {"model": {**ONE, "cross_patch": 1}},
            "model.cross_patch: got 1, expected it only with model.kind=megabyte",
        ),
        ({"model": {"without": "local", "cross_patch": 1}}, "model.cross_patch: got 1, expected 0 with"),
        ({"model": {"without": "global", "conv_encoder": [3]}}, "model.conv_encoder: got [3], expected none with"),
        ({"model": {"patching": "space", "conv_encoder": [3]}}, "model.patching: got space, expected fixed"),
        ({"model": {"cross_patch": 1, "isolate_documents": True}}, "model.isolate_documents: got True, expected false"),
        ({"model": {"conv_encoder": [3], "block": {"token_shift": True}}}, "model.block.token_shift: got True"),
        (
            {"model": {"cross_patch": 1}, "train": {"sequence_parallel": 2}},
            "train.sequence_parallel: got 2, expected 1",
        ),
        (
            {"model": {"stages": [{**tiny.STAGES[3][0], "patch_size": 8}, *tiny.STAGES[3][:0:-1]]}},
            "model.stages.1.patch_size: got 1, expected a larger multiple of the next stage's 2",
        ),
        ({"data": {"seq_len": 2}}, "data.seq_len: got 2, expected a multiple of model.stages.0.patch_size = 4"),
    ],
)
def test_an_impossible_combination_names_both_sides(sections: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny.make(**sections)
    assert the_line(error).startswith(line)


@pytest.mark.parametrize(
    ("dotted", "hint"),
    [
        ("trian", "did you mean train?"),
        ("train.stepss", "did you mean steps?"),
        ("model.presett", "did you mean preset?"),
        ("model.block.droput", "did you mean dropout?"),
        ("model.stages.1.patchsize", "did you mean patch_size?"),
        ("optim.grad_clip", "known here: lr, betas, eps"),
        ("nonsense", "known here: name, model, data"),
    ],
)
def test_an_unknown_key_is_refused_with_what_is_near(dotted: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(changed(dotted, 12345))
    line = the_line(error)
    assert line.startswith(f"{dotted}: unknown key (value 12345)")
    assert hint in line


def test_every_field_refuses_a_mapping_and_every_section_an_extra_key() -> None:
    """Walks the schema itself, so that a field added later is covered."""
    whole = tiny.make().model_dump(mode="json")
    whole["train"]["minutes"] = 1.0
    sections = {
        "": whole,
        **{name: part for name, part in whole.items() if isinstance(part, dict)},
        "model.block": whole["model"]["block"],
        "model.init": whole["model"]["init"],
        "model.stages.0": whole["model"]["stages"][0],
    }
    for name, section in sections.items():
        for key in [*section, "no_such_key"]:
            dotted = f"{name}.{key}".lstrip(".")
            tree: Any = copy.deepcopy(whole)
            node = tree
            for part in name.split(".") if name else []:
                node = node[int(part)] if isinstance(node, list) else node[part]
            node[key] = {"no such": 1}
            with pytest.raises(ConfigError) as error:
                validate(tree)
            assert the_line(error).startswith(dotted)


def test_a_missing_section_or_limit_is_said() -> None:
    for name in ("model", "data", "train"):
        tree = tiny.tree()
        del tree[name]
        with pytest.raises(ConfigError, match=rf"^{name}: missing"):
            validate(tree)
    tree = tiny.tree()
    del tree["train"]["steps"]
    with pytest.raises(ConfigError, match=r"^train.steps: got None, expected a limit: one of"):
        validate(tree)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model: [1, 2", "not valid YAML"),
        (b"a: b: c", "not valid YAML"),
        (b"", "expected a mapping of sections"),
        (b"- model", "expected a mapping of sections"),
        (b"just words", "got str"),
    ],
)
def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(file)
    assert said in the_line(error)
    assert str(file) in the_line(error)
    with pytest.raises(ConfigError, match="cannot read the config"):
        load(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="cannot read the config"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("dotted", "raw", "value"),
    [
        ("name", "007", "007"),
        ("name", "1e3", "1e3"),
        ("name", "off", "off"),
        ("sample.prompt", "", ""),
        ("sample.prompt", "12:30:00", "12:30:00"),
        ("sample.prompt", "a, b: c # d", "a, b: c # d"),
        ("optim.lr", "1e-3", 1e-3),
        ("optim.lr", "3", 3.0),
        ("optim.betas", "[0.8, 0.9]", (0.8, 0.9)),
        ("optim.betas", "[1e-1, 9e-1]", (0.1, 0.9)),
        ("train.steps", "0100", 100),
        ("train.flops", "1e15", 1e15),
        ("train.compile", "true", True),
        ("train.minutes", "null", None),
        ("train.minutes", "None", None),
        ("log.mlflow_uri", "http://host:5000", "http://host:5000"),
        ("model.stages.0.n_layers", "5", 5),
        ("model.stages.1", "{patch_size: 1, d_model: 64, n_layers: 1, n_heads: 2}", None),
        ("model.block.activation", "gelu", "gelu"),
        ("eval.every_steps", "7", 7),
    ],
)
def test_an_override_is_read_by_the_type_of_its_field(path: Path, dotted: str, raw: str, value: Any) -> None:
    got = at(load(path, {dotted: raw}), dotted)
    if value is None and isinstance(got, config.StageConfig):
        assert got.d_model == 64
    else:
        assert got == value
        assert type(got) is type(value)


@pytest.mark.parametrize(
    ("dotted", "raw", "said"),
    [
        ("model.stages.2.d_model", "8", "model.stages.2.d_model: '2' is no position in a list of 2"),
        ("model.stages.-1.d_model", "8", "'-1' is no position"),
        ("model.stages.x.d_model", "8", "'x' is no position"),
        ("model.stages.².d_model", "8", "'²' is no position"),
        ("name.first", "x", "name.first: name is a single value and has no keys"),
        ("train.steps.first.second", "x", "train.steps is a single value"),
        ("optim.betas", "[0.9,", "optim.betas: got '[0.9,', which is not valid YAML"),
        ("optim.betas", "[0.9, 0.9, 0.9]", "optim.betas"),
        ("train.steps", "1e3", "train.steps: got '1e3', expected a valid integer"),
        ("train.steps", "null", "expected a limit"),
        ("train", "3", "train: got '3'"),
        ("modell.preset", "paper", "modell: unknown key"),
        ("", "3", "unknown key"),
    ],
)
def test_a_wrong_override_is_one_line(path: Path, dotted: str, raw: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(path, {dotted: raw})
    assert said in the_line(error)


def test_overrides_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    tree = tiny.tree(preset="paper", model={"preset": "paper", "block": {"dropout": 0.3}})
    file = launch.config_file(tmp_path, tree)
    plain, over = load(file), load(file, {"model.block.dropout": "0.2", "model.block.norm": "rmsnorm"})
    assert plain.model.block.dropout == 0.3
    assert (over.model.block.dropout, over.model.block.norm) == (0.2, "rmsnorm")
    assert over.model.block.activation == plain.model.block.activation == "relu", "the rest is still the preset's"


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_fills_what_is_not_given_and_nothing_else(preset: str) -> None:
    before = copy.deepcopy(PRESETS)
    filled = tiny.make(preset=preset).model.model_dump(mode="json")
    for key, value in PRESETS[preset].items():
        assert filled[key] == value
    for key in ("norm", "activation", "dropout"):
        other = {"norm": "rmsnorm", "activation": "silu", "dropout": 0.25}[key]
        given_ = tiny.make(preset=preset, model={"block": {key: other}}).model.block.model_dump()
        assert given_ == {**PRESETS[preset]["block"], key: other}
    assert before == PRESETS, "presets are never written to"


def test_the_paper_preset_is_the_papers() -> None:
    """Section 2.1 and appendix A.2: pre-norm ReLU, learned positions, N(0, 0.006) cut at 2 sigma, dropout 0.1."""
    model = tiny.make(preset="paper").model
    assert (model.block.activation, model.block.norm, model.block.dropout) == ("relu", "layernorm", 0.1)
    assert (model.positions, model.tied) == ("learned", True)
    assert (model.init.scheme, model.init.std, model.init.residual) == ("truncated", 0.006, "plain")
    optim = tiny.make(optim={}).optim
    assert (optim.betas, optim.weight_decay) == ((0.9, 0.98), 0.1)
    assert config.OptimConfig().warmup_steps == 500


numbers = st.floats(1e-6, 1e6)


@settings(max_examples=60, deadline=None)
@given(
    stages=st.integers(1, 3),
    preset=st.sampled_from(list(PRESETS)),
    lr=numbers,
    prompt=st.text(st.characters(codec="utf-8")),
    minutes=st.none() | numbers,
    flops=st.none() | st.floats(1, 1e25),
    seed=st.integers(0, 2**63 - 1),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True),
    dropout=st.floats(0, 0.99),
    tied=st.booleans(),
    uri=st.none() | st.sampled_from(["off", "007", "1e3", "null", "~", "yes: no", "sqlite:///x.db"]),
)
def test_load_of_to_yaml_is_the_same_configuration(
    tmp_path_factory: pytest.TempPathFactory,
    stages: int,
    preset: str,
    lr: float,
    prompt: str,
    minutes: float | None,
    flops: float | None,
    seed: int,
    name: str,
    dropout: float,
    tied: bool,
    uri: str | None,
) -> None:
    made = tiny.make(
        stages,
        preset,
        name=name,
        model={"preset": preset, "tied": tied, "block": {"dropout": dropout}},
        train={"minutes": minutes, "flops": flops, "seed": seed},
        optim={"lr": lr},
        sample={"prompt": prompt},
        log={"mlflow_uri": uri},
    )
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(to_yaml(made), encoding="utf-8")
    assert load(file) == made
    assert to_yaml(load(file)) == to_yaml(made)


def test_every_section_is_frozen() -> None:
    made = tiny.make()
    sections = [made, made.model.block, made.model.init, made.model.stages[0]]
    sections += [value for _, value in made if isinstance(value, pydantic.BaseModel)]
    for section in sections:
        for key in type(section).model_fields:
            with pytest.raises(pydantic.ValidationError, match="frozen"):
                setattr(section, key, getattr(section, key))


def test_validation_does_not_write_into_what_it_was_given() -> None:
    tree = tiny.tree()
    before = copy.deepcopy(tree)
    validate(tree)
    assert tree == before


@settings(deadline=None)
@given(rows=st.integers(1, 96), micro=st.none() | st.integers(1, 96), ranks=st.integers(1, 16))
def test_a_batch_is_cut_exactly_or_not_at_all(rows: int, micro: int | None, ranks: int) -> None:
    tree = tiny.tree(train={"global_batch_size": rows, "micro_batch_size": micro})
    possible = rows % ranks == 0
    if micro is not None and possible:
        possible = rows % micro == 0 and (rows // ranks) % min(micro, rows // ranks) == 0
    if micro is not None and rows % micro:
        possible = False
    if not possible:
        with pytest.raises(ConfigError, match=r"^train\.(global|micro)_batch_size: got \d+, expected a "):
            batch_shape(validate(tree), ranks)
        return
    got, accumulation = batch_shape(validate(tree), ranks)
    assert got * accumulation * ranks == rows
    assert got <= (micro or rows)


def test_more_ranks_than_rows_is_said_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"train.global_batch_size: got 4, expected a multiple .* ranks, 8"):
        batch_shape(tiny.make(), 8)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"steps": 7}, 7),
        ({"bytes": 4 * 32}, 1),
        ({"bytes": 4 * 32 + 1}, 2),
        ({"bytes": 1}, 1),
        ({"flops": 4 * 32 * 10.0}, 1),
        ({"flops": 4 * 32 * 25.0}, 3),
        ({"flops": 1.0}, 1),
        ({"steps": 7, "bytes": 4 * 32 * 5, "flops": 4 * 32 * 10.0 * 6}, 5),
        ({"minutes": 1}, None),
        ({"minutes": 1, "steps": 2}, 2),
    ],
)
def test_the_first_limit_in_steps(limits: dict[str, float], steps: int | None) -> None:
    """Rows of 32 ids, 4 a step, 10 FLOPs a byte."""
    tree = tiny.tree()
    tree["train"] = {"global_batch_size": 4, **limits}
    assert step_limit(validate(tree), 10.0) == steps


def test_the_vocabulary_follows_from_boundaries() -> None:
    assert tiny.make().vocab_size == 257
    assert tiny.make(data={"boundary": False}).vocab_size == 256


def test_yaml_numbers_that_pyyaml_reads_as_strings_are_numbers(tmp_path: Path) -> None:
    """PyYAML takes 3e-4 for a string; the field's type knows better."""
    assert yaml.safe_load("3e-4") == "3e-4"
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tiny.tree()).replace("lr: 0.01", "lr: 3e-4"))
    assert load(file).optim.lr == 3e-4


SOURCES = [{"path": "shards/a"}, {"path": "elsewhere/b"}]


def test_a_path_is_a_mixture_of_one_and_sources_are_named_by_their_folders() -> None:
    assert config.source_paths(tiny.make(data={"path": "shards/std"})) == [("std", "shards/std")]
    several = config.validate({**tiny.tree(), "data": {"sources": SOURCES, "seq_len": 32}})
    assert config.source_paths(several) == [("a", "shards/a"), ("b", "elsewhere/b")]
    assert config.validate(several.model_dump(mode="json")) == several


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "data.path, data.sources: got neither, expected one of them"),
        ({"path": "a", "sources": SOURCES}, "data.path, data.sources: got both, expected one of them"),
        (
            {"sources": [{"path": "x/a"}, {"path": "y/a"}]},
            "data.sources: got two named 'a', expected names that differ",
        ),
        ({"sources": [{"path": "a", "weight": -1}]}, "data.sources.0.weight: got -1"),
        ({"sources": [{"path": "a", "wieght": 1}]}, "data.sources.0.wieght: unknown key .* did you mean weight"),
        ({"sources": [{"path": "a", "epochs": 0}]}, "data.sources.0.epochs: got 0"),
        ({"sources": [{"path": "a", "schedule": [[5, 1]]}]}, r"schedule: got \[\(5, 1.0\)\], expected \[\[0, weight\]"),
        ({"sources": [{"path": "a", "schedule": [[0, 1], [0, 2]]}]}, "with rising bytes"),
        ({"sources": [{"path": "a", "schedule": [[0, 1]], "weight": 2}]}, "and no weight beside it"),
        ({"path": "a", "temperature": 0}, "data.temperature: got 0"),
    ],
)
def test_sources_that_make_no_mixture_are_one_line(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        config.validate({**tiny.tree(), "data": {"seq_len": 32, **data}})
    assert "\n" not in str(error.value)


def test_a_source_is_changed_by_its_number(tmp_path: Path) -> None:
    path = launch.config_file(tmp_path, {**tiny.tree(), "data": {"sources": SOURCES, "seq_len": 32}})
    assert load(path, {"data.sources.1.weight": "2.5"}).data.mixture[1].weight == 2.5
    with pytest.raises(ConfigError, match=r"data\.sources\.2\.weight: '2' is no position in a list of 2"):
        load(path, {"data.sources.2.weight": "1"})
