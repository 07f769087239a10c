"""Small tasks whose rules are known exactly, and what a run has learnt of them; `mbtrain eval-task`."""
