"""`python -m comfy_dancegrpo.trainer`."""

from .cli import main

main()
