"""Export: weights as safetensors and the configuration, loadable in three lines of Python, compared before it counts.

from mbtrain import export
model = export.load("exported")
logits = model(torch.tensor([list(b"any bytes")]))
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import torch

from mbtrain import config, tokens
from mbtrain.checkpoint import write_atomically
from mbtrain.errors import CheckpointError, ConfigError
from mbtrain.evaluate import load_model
from mbtrain.model import Model, build
from mbtrain.shards import file_sha256


def load(path: str | Path) -> Model:
    """The exported model, fp32, on CPU, in eval mode. Raises CheckpointError when it is not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    _must_be_whole(path)
    model = build(config.load(path / "config.yaml"))
    try:
        model.load_state_dict(load_file(path / "weights.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}/weights.safetensors: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def _must_be_whole(path: Path) -> None:
    """Compare the files with SHA256SUMS (which `sha256sum -c` reads too)."""
    try:
        lines = (path / "SHA256SUMS").read_text(encoding="ascii").splitlines()
        sums = {name: expected for expected, name in (line.split("  ", 1) for line in lines)}
        for name in dict.fromkeys(("weights.safetensors", "config.yaml", *sums)):
            if file_sha256(path / name) != sums.get(name):
                raise CheckpointError(f"{path / name}: its content is not what was exported (sha256 differs)")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole export ({error})") from error


def export_run(path: str | Path, out: str | Path, last: bool = False) -> Path:
    """Write weights.safetensors, config.yaml and SHA256SUMS to OUT; reload and compare the logits, bit for bit.

    A vocabulary of tokens lies beside them. last: the weights that were trained, where the run also keeps averages.
    OUT must not exist yet. Raises CheckpointError when the reloaded model differs, and leaves nothing under OUT.
    """
    from safetensors.torch import save

    out = Path(out)
    if out.exists():
        raise ConfigError(f"--out={out}: exists already; choose another folder")
    model, settings, _, _ = load_model(path, torch.device("cpu"), last)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
        settings, files = tokens.copied(settings, out)
        files |= {
            "weights.safetensors": save(weights),
            "config.yaml": config.to_yaml(tokens.written(settings)).encode(),
        }
        sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
        for name, content in {**files, "SHA256SUMS": sums.encode()}.items():
            write_atomically(temporary / name, content)
        ids = torch.arange(min(256, settings.data.seq_len)).unsqueeze(0) % 256
        with torch.inference_mode():
            if not torch.equal(load(temporary)(ids), model(ids)):
                raise CheckpointError(f"{out}: the exported weights give other logits than the run; not written")
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out
