"""The laws of the house (design, section 1), read off the source.

pytest tests/test_house.py
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launch
from tests.launch import ROOT

PACKAGES = ("mbtrain", "data_prep")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = ("torch", "mlflow", "deepspeed")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path, *, anywhere: bool = True) -> set[str]:
    """Modules that a file imports: anywhere in it, or only when it is itself imported (TYPE_CHECKING left out)."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if not anywhere and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                base = child.module or ""
                found.update(
                    f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in child.names
                )
            elif isinstance(child, ast.Call) and ast.unparse(child.func) in ("importlib.import_module", "_import"):
                found.update(str(arg.value) for arg in child.args if isinstance(arg, ast.Constant))
            walk(child)

    walk(ast.parse(path.read_text(encoding="utf-8")))
    return found


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("module", ["mbtrain", "mbtrain.cli", "data_prep", "data_prep.cli", "mbtrain.shards"])
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=launch.environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_room_knows_deepspeed_and_one_knows_mlflow() -> None:
    """The bench measures DeepSpeed's cost against a bare loop, through the engine too."""
    knowing = {name: {m for m, path in MODULES.items() if name in packages(imports(path))} for name in HEAVY}
    assert knowing["deepspeed"] == {"mbtrain.engine"}
    assert knowing["mlflow"] == {"mbtrain.tracking.sending"}


def test_leaves_and_data_prep_know_no_torch() -> None:
    for name in ("vocab", "shards", "schedule", "errors", "config", "metrics", "command", "tracking"):
        assert "torch" not in packages(imports(MODULES[f"mbtrain.{name}"])), name
    for name, path in MODULES.items():
        if name.startswith(("data_prep", "mbtrain.data")):
            assert not packages(imports(path)) & {"torch", "deepspeed", "mlflow"}, name


# Below first: a room imports only rooms named before it. `bench` and `cli` stand on everything.
STOREYS = [
    {
        "mbtrain",
        "mbtrain.errors",
        "mbtrain.redact",
        "mbtrain.vocab",
        "mbtrain.metrics",
        "mbtrain.media",
        "mbtrain.log",
        "mbtrain.startup",
    },
    {"mbtrain.config", "mbtrain.shards", "mbtrain.command", "mbtrain.plots", "mbtrain.media.containers"},
    {
        "mbtrain.hosts",
        "mbtrain.guard",
        "mbtrain.noise_scale",
        "mbtrain.intervals",
        "mbtrain.signals",
        "mbtrain.gpus",
        "mbtrain.tokens",
        "mbtrain.mbz",
        "mbtrain.codecs",
    },
    {"mbtrain.tasks", "mbtrain.tasks.rules"},
    {"mbtrain.tasks.marking"},
    {"mbtrain.supervise", "mbtrain.job", "mbtrain.widths"},
    {"mbtrain.media.image", "mbtrain.media.audio"},
    {"mbtrain.schedule", "mbtrain.data", "mbtrain.data.order", "mbtrain.data.scan"},
    {"mbtrain.tracking.files", "mbtrain.tracking.labels"},
    {"mbtrain.tracking.trainer", "mbtrain.tracking.pages", "mbtrain.tracking.sending"},
    {"mbtrain.tracking.shipper", "mbtrain.tracking.fetching"},
    {"mbtrain.tracking", "mbtrain.tracking.__main__"},
    {"mbtrain.render", "mbtrain.request"},
    {"mbtrain.data.rows", "mbtrain.data.mixture", "mbtrain.data.loader", "mbtrain.data.opening"},
    {"mbtrain.data.windows", "mbtrain.data.words"},
    {"mbtrain.model.compiled", "mbtrain.model.gpu_kernels"},
    {"mbtrain.model.cpu_kernels", "mbtrain.model.fused"},
    {"mbtrain.model.sequence", "mbtrain.model.flops", "mbtrain.model.loss", "mbtrain.model.patching"},
    {"mbtrain.model.mup", "mbtrain.model.chunks"},
    {"mbtrain.model.layers"},
    {"mbtrain.model.steps"},
    {"mbtrain.model.native", "mbtrain.model.captured"},
    {
        "mbtrain.model.megabyte",
        "mbtrain.model.perceiver",
        "mbtrain.model.space",
        "mbtrain.model.subword",
        "mbtrain.model",
        "mbtrain.model.decode",
        "mbtrain.model.decode_space",
        "mbtrain.checkpoint",
        "mbtrain.hardware",
    },
    {"mbtrain.model.sparing", "mbtrain.model.compiling"},
    {"mbtrain.optim.eager"},
    {"mbtrain.optim", "mbtrain.optim.adamw", "mbtrain.optim.muon", "mbtrain.optim.schedule_free"},
    {"mbtrain.evaluate", "mbtrain.modes", "mbtrain.engine", "mbtrain.watch", "mbtrain.units", "mbtrain.agreement"},
    {"mbtrain.sample", "mbtrain.export", "mbtrain.saving", "mbtrain.compress", "mbtrain.evaluation"},
    {"mbtrain.tasks.report"},
    {"mbtrain.compare.reading", "mbtrain.compare.markup", "mbtrain.compare.look"},
    {"mbtrain.compare.groups"},
    {"mbtrain.compare.curves"},
    {"mbtrain.compare.vectors", "mbtrain.compare.pictures"},
    {"mbtrain.compare.page"},
    {"mbtrain.compare"},
    {"mbtrain.sweep.trial", "mbtrain.sweep.optimum", "mbtrain.sweep.proxy"},
    {"mbtrain.sweep.spec", "mbtrain.sweep.scores"},
    {"mbtrain.sweep.state", "mbtrain.sweep.drawing"},
    {"mbtrain.sweep.page", "mbtrain.sweep.report", "mbtrain.sweep.transfer"},
    {"mbtrain.coord_check.places"},
    {"mbtrain.coord_check.measure", "mbtrain.coord_check.slopes", "mbtrain.coord_check.batch"},
    {"mbtrain.coord_check.picture", "mbtrain.coord_check.words"},
    {"mbtrain.coord_check"},
    {"mbtrain.session"},
    {"mbtrain.train"},
    {"mbtrain.sweep.child", "mbtrain.sweep.ship"},
    {"mbtrain.sweep.run", "mbtrain.sweep.warm", "mbtrain.sweep.__main__"},
    {"mbtrain.doctor", "mbtrain.doctor.step_request", "mbtrain.doctor.memory", "mbtrain.doctor.facts"},
    {"mbtrain.doctor.step", "mbtrain.doctor.launch", "mbtrain.doctor.asking", "mbtrain.doctor.checks", "mbtrain.cost"},
    {"mbtrain.doctor.examine"},
    {"mbtrain.doctor.table"},
]


def test_a_room_imports_rooms_below_it() -> None:
    """In the order of the storeys; within one, without circles (the next test)."""
    level = {module: i for i, storey in enumerate(STOREYS) for module in storey}
    assert set(level) <= set(MODULES), set(level) - set(MODULES)
    for module, at in level.items():
        if module == "mbtrain":
            continue
        ours = {name for name in imports(MODULES[module]) if name in MODULES and name != "mbtrain"}
        above = {name for name in ours if level.get(name, 99) > at}
        assert not above, f"{module} imports {above}"


def test_the_model_knows_no_data_and_no_training() -> None:
    for name, path in MODULES.items():
        if name.startswith("mbtrain.model"):
            ours = {m for m in imports(path) if m.startswith("mbtrain")}
            known = ("mbtrain.model", "mbtrain.config", "mbtrain.vocab", "mbtrain.tokens", "mbtrain.errors")
            assert all(m.startswith(known) for m in ours), name


def test_the_configuration_imports_vocab_and_errors_alone() -> None:
    ours = {name for name in imports(MODULES["mbtrain.config"]) if name.startswith("mbtrain.")}
    assert ours == {"mbtrain.vocab", "mbtrain.errors", "mbtrain.redact"}


def test_there_are_no_circles() -> None:
    """Whatever is imported, at the top or inside a function; only `mbtrain.cli` is run by `__main__`."""
    graph = {
        module: {name for name in imports(path) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    graph = {m: {n for n in names if not m.startswith(f"{n}.")} for m, names in graph.items()}
    left = dict(graph)
    while left:
        free = {module for module, names in left.items() if not names & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {module: names for module, names in left.items() if module not in free}


def test_mbtrain_never_imports_data_prep() -> None:
    """Shards are the contract between the two; only bench may make data."""
    for module, path in MODULES.items():
        if module.startswith("mbtrain") and not module.startswith("mbtrain.bench"):
            assert "data_prep" not in packages(imports(path)), module


def test_every_public_function_and_class_has_a_docstring() -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in FILES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path.name != "__main__.py" and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


def test_nobody_prints_evaluates_or_keeps_a_drawer_for_odds_and_ends() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "eval", "exec", "__import__"), f"{path}:{node.lineno}"
        assert path.stem not in ("utils", "util", "helpers", "misc", "common"), path


def shipped() -> list[Path]:
    """Every file that git has or would add."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("no git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


# Written in two halves, so that this file keeps its own law.
REGISTRIES = [
    "pypi." + "org",
    "python" + "hosted.org",
    "download." + "pytorch.org",
    "conda." + "anaconda",
    "npmjs." + "com",
]
FOLDERS = [rf"(?<![\w.}}-])/{folder}\b" for folder in ("work", "root", "tmp/w")]


def test_no_file_names_a_registry_or_one_machines_folders() -> None:
    """Which index to install from, and where things lie, is the user's own setting."""
    law = re.compile("|".join([*map(re.escape, REGISTRIES), *FOLDERS]))
    assert law.search("see https://" + REGISTRIES[0] + "/simple")
    assert law.search("cd " + "/" + "work/main")
    broken = []
    for path in shipped():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        broken += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(text.splitlines(), 1) if law.search(line)]
    assert not broken


def test_no_large_or_private_file_is_shipped() -> None:
    for path in shipped():
        assert path.stat().st_size < 2_000_000, path
        assert path.suffix not in (".tar", ".safetensors", ".pt", ".pkl", ".db", ".pem", ".key"), path
