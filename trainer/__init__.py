"""The headless program: `dancegrpo`, or `python -m comfy_dancegrpo.trainer`."""
