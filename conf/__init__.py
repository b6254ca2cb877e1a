"""Hydra's YAML files. A regular package, so that a `conf/` folder where a user happens to stand cannot hide it."""
