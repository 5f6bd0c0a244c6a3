"""Writes what the tests of the model families found into docs/families.md:

    python -m pytest tests/test_families.py --junitxml found.xml && python tools/family_checks.py found.xml
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
BEGIN, END = "<!-- written by tools/family_checks.py -->\n", "<!-- end of it -->\n"
COLUMNS = {  # of the table, by test; in brackets the parameter
    "the pipeline's picture": "test_without_noise_the_picture_is_the_pipelines",
    "with its guidance": "test_guidance_is_the_pipelines",
    "stochastic at no noise": "test_a_stochastic_transition_without_noise_is_the_deterministic_one",
    "ratio less 1, batch 8": "test_replay_gives_the_ratio_one_exactly[8]",
    "batch 4": "test_replay_gives_the_ratio_one_exactly[4]",
    "gradient": "test_the_gradient_is_that_of_finite_differences",
    "LoRA in diffusers": "test_diffusers_loads_the_lora_whole_and_at_full_strength",
}


def table(path: Path) -> list[str]:
    """Of pytest's XML: a row a case, in their order. What failed, or was not run, is said so."""
    found: dict[str, dict[str, str]] = {}
    for test in ElementTree.parse(path).iter("testcase"):
        name, _, case = test.get("name", "").rstrip("]").partition("[")
        of_case = re.fullmatch(r"(.+?)(?:-([84]))?", case)
        value = next((item.get("value") for item in test.iter("property") if item.get("name") == "found"), None)
        if of_case and value is not None and name in {column.partition("[")[0] for column in COLUMNS.values()}:
            ended = any(test.find(kind) is not None for kind in ("failure", "error"))
            found.setdefault(of_case[1], {})[name + (f"[{of_case[2]}]" if of_case[2] else "")] = "failed" if ended else f"{float(value):.0e}".replace("0e+00", "0")
    rows = [f"| case | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    return rows + [f"| `{case}` | {' | '.join(of.get(test, 'not run') for test in COLUMNS.values())} |" for case, of in found.items()]


def main(path: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, after = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(table(Path(path))) + "\n" + END + after.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
