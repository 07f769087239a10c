"""Sweeps: many small runs of one experiment, with other values of some of its keys; side by side, and never twice.

    SWEEP/sweep.yaml        what is tried: the axes, their values, the seeds (spec.py has the format)
    SWEEP/experiment.yaml   the experiment's file as it was when the sweep began
    SWEEP/runs/<trial>/     ordinary run directories, for eval, sample, compare, summary, export and sync
    SWEEP/log.txt           a line for each trial that ended

    spec     a sweep file, or an experiment and axes from the command line -> trials with names that stay
    run      the runner: starts trials, takes up what was left, stops those that diverge
    child    what happens in a trial's process
    state    how the trials of a folder stand, and the locks by which several runners share one folder
    ship     one process that sends all trials to MLflow, below one parent run
    trial    what a trial is

A sweep is read from its folder alone: by the next runner, and by the report.
"""

from mbtrain.sweep.state import trials
from mbtrain.sweep.trial import Trial

__all__ = ["Trial", "trials"]
