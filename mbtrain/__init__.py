"""mbtrain: train multiscale byte models on raw files. Importing it imports neither torch nor mlflow."""

__version__ = "0.1.0"
