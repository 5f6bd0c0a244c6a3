"""The embedded policy, its learned reward and the set of captioned pictures that both were trained on.

`policy/` is a `FluxPipeline` folder, `reward/` a `CLIPModel` folder, `prompts/` the captions by split; `pretrain.py` makes all three.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
POLICY = FOLDER / "policy"
REWARD = FOLDER / "reward"
PROMPTS = FOLDER / "prompts"
