"""MLflow, as a bystander: the only rooms that know it.

    trainer, rank 0  --appends-->  RUN/metrics.jsonl, samples/, plots/ ...     the truth
                                       |  read
                     shipper: `python -m mbtrain.tracking RUN`  --sends-->  MLflow

The shipper is a process of its own: importing mlflow holds the GIL for seconds, and a server that is slow, gone or hung
must not be felt by a step. In each round it asks MLflow what it holds, and sends what the run directory has beyond
that: per metric key only steps above the largest one there. A step is therefore never there twice, also when a resumed
run makes it again, and what a server lost (an older backup, an empty database) is sent again. The shipper may be killed
at any time; what could not be sent stays in the run directory, for the next one and for `sync`.

    RUN/tracking.json      written by the trainer: where to send to, and which process the trainer is
    RUN/status.json        written by the trainer at its end: {"status": "FINISHED" | "FAILED" | "KILLED", "message"}
    RUN/mlflow.json        written by the shipper: {"run_id", "experiment_id", "tracking_uri"}
    RUN/run_uid            written by the shipper: the run's own name, a tag in MLflow that finds it again
    RUN/.mlflow_sent.json  written by the shipper: size and time of each artifact that was sent
    RUN/.mlflow.lock       locked by the one shipper at work, whose trainer it names
    RUN/mlflow.log         what the shipper says

    trainer    what the training process calls             pages    MLflow's pages: serve them, and their addresses
    shipper    the process, its lock and rounds; sync      sending  one run in MLflow: the only file that imports mlflow
    fetching   an experiment back as run directories     labels   by what MLflow's pages group runs
    files      what all of these share
"""

from mbtrain.tracking.fetching import fetch
from mbtrain.tracking.files import ENVIRONMENT, STATUSES, default_uri, run_id, store
from mbtrain.tracking.labels import labels
from mbtrain.tracking.pages import compare_url, ui
from mbtrain.tracking.shipper import stand_back, sync
from mbtrain.tracking.trainer import finish, leave_to_sync, spawn, start_shipper

__all__ = [
    "ENVIRONMENT",
    "STATUSES",
    "compare_url",
    "default_uri",
    "fetch",
    "finish",
    "labels",
    "leave_to_sync",
    "run_id",
    "spawn",
    "stand_back",
    "start_shipper",
    "store",
    "sync",
    "ui",
]
