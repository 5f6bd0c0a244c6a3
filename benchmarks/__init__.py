"""Measurements, each a command of its own; nothing here is part of the package that is installed."""
