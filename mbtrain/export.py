"""Export: weights as safetensors and the configuration, loadable in three lines of Python, compared before it counts.

from mbtrain import export
model = export.load("exported")
logits = model(torch.tensor([list(b"any bytes")]))
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from mbtrain import config
from mbtrain.checkpoint import write_atomically
from mbtrain.errors import CheckpointError, ConfigError
from mbtrain.evaluate import load_model
from mbtrain.model import Model, build


def load(path: str | Path) -> Model:
    """The exported model, fp32, on CPU, in eval mode. Raises CheckpointError when it is not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    model = build(config.load(path / "config.yaml"))
    try:
        model.load_state_dict(load_file(path / "weights.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}/weights.safetensors: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def export_run(path: str | Path, out: str | Path) -> Path:
    """Write OUT/weights.safetensors and OUT/config.yaml; reload them and compare the logits, bit for bit.

    OUT must not exist yet. Raises CheckpointError when the reloaded model differs, and leaves nothing under OUT.
    """
    from safetensors.torch import save

    out = Path(out)
    if out.exists():
        raise ConfigError(f"--out={out}: exists already; choose another folder")
    model, settings, _, _ = load_model(path, torch.device("cpu"))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
        write_atomically(temporary / "weights.safetensors", save(weights))
        write_atomically(temporary / "config.yaml", config.to_yaml(settings).encode())
        ids = torch.arange(min(256, settings.data.seq_len)).unsqueeze(0) % 256
        with torch.inference_mode():
            if not torch.equal(load(temporary)(ids), model(ids)):
                raise CheckpointError(f"{out}: the exported weights give other logits than the run; not written")
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out
