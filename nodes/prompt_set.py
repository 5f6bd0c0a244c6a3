from __future__ import annotations

from comfy_dancegrpo import prompts
from comfy_dancegrpo.errors import RunError

from . import wires


class PromptSet:
    TITLE = "Prompt Set"
    DESCRIPTION = "Prompts to train on, or to evaluate on: typed in, a line each, or from a file in the input folder."
    SEARCH_ALIASES = ["text", "captions", "dataset", "csv", "jsonl"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.PROMPTS,)
    RETURN_NAMES = ("prompts",)
    OUTPUT_TOOLTIPS = ("The prompts, in order.",)
    FUNCTION = "read"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "text": ("STRING", {"default": "", "multiline": True, "tooltip": "Prompts, a line each. Added to the file's."}),
            "file": ("STRING", {"default": "", "tooltip": "A .txt (a line each), .jsonl or .csv file (\"prompt\") in the input folder; empty for none. "
                                                          "Built in, each as _train and _test: shapes, pictures and videos (.txt), edits and first_frames (.jsonl)."}),
            "limit": wires.integer(0, 0, 1_000_000, "Takes the first so many; 0 takes all."),
        }, "optional": {
            "image": wires.socket("IMAGE", "A picture to be edited, or a video's first frame, for every prompt that has none of its own; or a batch, one for "
                                           "each prompt in order."),
        }}

    @classmethod
    def VALIDATE_INPUTS(cls, text, file):
        if file is None or text is None:
            return True
        try:
            cls._prompts(text, file)
        except RunError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, text, file, limit, image=None):
        """Changes with the file, and with the pictures that it names."""
        if not (file and file.strip()):
            return ""
        keys = [prompt.picture.key for prompt in prompts.read(file) if prompt.picture]
        return repr((prompts.find(file).stat().st_mtime_ns, keys))

    @staticmethod
    def _prompts(text: str, file: str) -> list[str]:
        found = [line.strip() for line in text.splitlines() if line.strip()] + (prompts.read(file) if file.strip() else [])
        if not found:
            raise RunError('input "text": found no prompt, accepted: at least one, here or in "file"')
        return found

    def read(self, text: str, file: str, limit: int, image=None):
        found = self._prompts(text, file)
        taken = found[:limit] if limit else found
        return (prompts.PromptList(tuple(taken if image is None else prompts.pictured(taken, image)), file.strip() or "text"),)
