"""Sweeps: many small runs of one experiment, with other values of some of its keys; side by side, and never twice.

    SWEEP/sweep.yaml        what is tried: the axes, their values, the seeds (spec.py has the format)
    SWEEP/experiment.yaml   the experiment's file as it was when the sweep began
    SWEEP/runs/<trial>/     ordinary run directories, for eval, sample, compare, summary, export and sync
    SWEEP/log.txt           a line for each trial that ended
    SWEEP/report.*          what came of it, and beside it pictures

    trial      what a trial is
    spec       a sweep file, or an experiment and axes from the command line -> trials with names that stay
    proxy      the small model on which a large one's values are tuned
    state      how the trials of a folder stand, and the locks by which several runners share one folder
    run        the runner: starts trials, takes up what was left, stops those that diverge
    warm       what a trial's process has imported before it is one
    child      what happens in a trial's process
    ship       one process that sends all trials to MLflow, below one parent run
    scores     what the trials came to, and how the axes are read: LR, width or depth, variants
    optimum    the best LR of a curve, how it moves with width, and whether it transfers
    report     the figures of all that; page: in Markdown; drawing: as pictures
    transfer   the best values, as the configuration of a large model

A sweep is read from its folder alone: by the next runner, and by the report.
"""

from mbtrain.sweep.state import trials
from mbtrain.sweep.trial import Trial

__all__ = ["Trial", "trials"]
