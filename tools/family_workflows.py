"""Writes the bundled workflows of the model families, as the editor saves them, and the table of them: `python tools/family_workflows.py`.

One table of families with the settings that were published for them, and one graph. A new input of a node is in them after the next call;
tests/test_family_workflows.py fails until then.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfy_dancegrpo import nodes
from comfy_dancegrpo.workflow.schema import inputs_of, object_info

FOLDER = Path(__file__).resolve().parent.parent / "workflows"
PAGE = FOLDER.parent / "docs" / "families.md"
BEGIN, END = "<!-- written by tools/family_workflows.py -->\n", "<!-- end -->\n"
REGISTRY = {**nodes.HOST_CLASS_MAPPINGS, **nodes.NODE_CLASS_MAPPINGS}
REWARD = "openai/clip-vit-large-patch14"
DANCE = "Settings: DanceGRPO's published script {script} (arXiv 2505.07818), on all its GPUs together."
LORA = "It trains all weights at 1e-5; here a LoRA is trained, with the learning rate, rank and alpha of its FLUX.1 script for LoRAs."
OWN = ("Nobody has published settings of DanceGRPO for it: those of FLUX.1, with the model's own guidance, and with its own scheduler's shift "
       "(shift 0).")


@dataclass(frozen=True)
class Family:
    """A workflow: the model, what was published for it, and where. size: width, height, frames. noise: of a group's start."""

    title: str
    policy: str
    source: str
    size: tuple[int, int, int] = (720, 720, 1)
    steps: int = 16
    transition: str = "dance_sde"
    eta: float = 0.3
    shift: float = 3.0
    guidance: float = 3.5
    group: int = 12
    noise: str = "shared"
    prompts: int = 16
    iterations: int = 300
    optimizer_steps: int = 2
    train_fraction: float = 0.6
    rank: int = 128
    alpha: float = 256.0
    ema: float = 0.0
    prompt_file: str = "pictures"
    fps: float = 24.0
    drawing_steps: int = 28
    load: dict[str, Any] = field(default_factory=dict)
    advantage: dict[str, Any] = field(default_factory=dict)
    get: str = ""


FAMILIES = {
    "sd15": Family(
        "Stable Diffusion 1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5",
        f"{DANCE.format(script='finetune_sd_grpo.sh')} They are for version 1.4. {LORA}", (512, 512, 1), 50, "ddim", 1.0, 0.0, 5.0, 16,
        prompts=32, optimizer_steps=98, train_fraction=1.0, drawing_steps=50),
    "sdxl": Family(
        "SDXL", "stabilityai/stable-diffusion-xl-base-1.0",
        "Nobody has published settings of DanceGRPO for it: those of Stable Diffusion 1.4 (finetune_sd_grpo.sh), at 1024x1024 with the model's "
        f"own guidance. {LORA}",
        (1024, 1024, 1), 50, "ddim", 1.0, 0.0, 5.0, 16, prompts=32, optimizer_steps=98, train_fraction=1.0, drawing_steps=50),
    "sd35": Family(
        "Stable Diffusion 3.5 medium", "stabilityai/stable-diffusion-3.5-medium",
        "Settings: Flow-GRPO's published ones (arXiv 2505.05470), on all its GPUs together. Their noise is another, and they add a penalty of the "
        "distance to the base model; here the noise is DanceGRPO's (eta 0.3), without one.",
        (512, 512, 1), 10, shift=0.0, guidance=4.5, group=24, noise="independent", prompts=48, train_fraction=1.0, rank=32, alpha=64.0,
        ema=0.987, drawing_steps=40),
    "flux_dev": Family(
        "FLUX.1-dev", "black-forest-labs/FLUX.1-dev",
        f"{DANCE.format(script='finetune_flux_grpo_8gpus_lora.sh')} It takes 12 steps; the 16 are those of its scripts that train all weights."),
    "flux_kontext": Family(
        "FLUX.1 Kontext", "black-forest-labs/FLUX.1-Kontext-dev",
        "Settings: Flow-GRPO's published ones (arXiv 2505.05470, counting_flux_kontext), on all its GPUs together. Their noise is another; here it "
        "is DanceGRPO's (eta 0.3). The LoRA's rank and learning rate are those of its Stable Diffusion 3.5.",
        (512, 512, 1), 6, shift=0.0, guidance=2.5, group=21, noise="independent", prompts=48, train_fraction=1.0, rank=32, alpha=64.0, ema=0.987,
        prompt_file="edits"),
    "flux2": Family("FLUX.2-dev", "black-forest-labs/FLUX.2-dev", OWN, shift=0.0, guidance=4.0, drawing_steps=50),
    "qwen_image": Family(
        "Qwen-Image", "Qwen/Qwen-Image", f"{DANCE.format(script='finetune_qwenimage_grpo.sh')} {LORA} Guidance 1 is none: it trains without.",
        steps=20, guidance=1.0, drawing_steps=50),
    "qwen_image_edit": Family(
        "Qwen-Image-Edit", "Qwen/Qwen-Image-Edit",
        f"{DANCE.format(script='finetune_qwenimage_edit_grpo.sh')} {LORA} Guidance 1 is none: it trains without.",
        (512, 512, 1), 20, guidance=1.0, group=8, prompt_file="edits", drawing_steps=50),
    "z_image": Family(
        "Z-Image-Turbo", "Tongyi-MAI/Z-Image-Turbo", f"{OWN} As a distilled model it takes 8 steps, and guidance 0, which is none.",
        steps=8, shift=0.0, guidance=0.0, drawing_steps=8),
    "wan21": Family(
        "Wan 2.1, one frame as a picture", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", f"{DANCE.format(script='finetune_wan_2_1_grpo.sh')} {LORA}",
        (512, 512, 1), 20, guidance=5.0, iterations=1000, optimizer_steps=1, drawing_steps=50),
    "wan22": Family(
        "Wan 2.2 A14B", "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "Nobody has published settings of DanceGRPO for it: size, steps and group of Flow-GRPO's for Wan 2.1 (arXiv 2505.05470), the noise of "
        "DanceGRPO's for Wan 2.1, the model's own guidance, which is another for each of its two experts (guidance_scale_2 in Load Policy), and its "
        "own scheduler's shift.",
        (416, 240, 33), 20, shift=0.0, guidance=4.0, group=4, prompts=8, prompt_file="videos", fps=16.0, drawing_steps=40,
        load={"guidance_scale_2": 3.0}),
    "hunyuan_video": Family(
        "HunyuanVideo", "hunyuanvideo-community/HunyuanVideo",
        f"{DANCE.format(script='finetune_hunyuan_grpo.sh')} {LORA} Of 24 videos the 4 best and the 4 worst are trained. Each starts from noise of "
        "its own; the script's --use_same_noise would be initial_noise shared.",
        (480, 480, 53), 16, eta=0.25, shift=5.0, guidance=6.018, group=24, noise="independent", prompts=32, iterations=200,
        prompt_file="videos", drawing_steps=50, advantage={"best_of": 8}),
    "skyreels_i2v": Family(
        "SkyReels-V1 image to video", "xzyhku/SkyReels-V1-I2V",
        f"{DANCE.format(script='finetune_skyreels_i2v.sh')} {LORA} Its first frames are drawn by FLUX.1; here the prompt file names them.",
        (640, 400, 53), 16, shift=7.0, guidance=5.0, group=8, prompts=32, iterations=120, optimizer_steps=1, prompt_file="first_frames",
        drawing_steps=50, get="The folder is HunyuanVideo's, with Skywork/SkyReels-V1-Hunyuan-I2V's transformer; its model_index.json must name "
        "HunyuanSkyreelsImageToVideoPipeline as _class_name."),
    "ltx_video": Family(
        "LTX-Video", "Lightricks/LTX-Video",
        "Nobody has published settings of DanceGRPO for it: those of HunyuanVideo, at the model's own size and guidance, with 49 frames, and with "
        "its own scheduler's shift.",
        (704, 512, 49), 16, eta=0.25, shift=0.0, guidance=3.0, group=8, prompts=32, iterations=200, prompt_file="videos", fps=25.0, drawing_steps=50),
    "ltx2": Family(
        "LTX-2", "Lightricks/LTX-2",
        "Nobody has published settings of DanceGRPO for it: those of HunyuanVideo, at the model's own size and guidance, with 49 frames, and with "
        "its own scheduler's shift. Its sound is sampled and trained along, and not scored.",
        (768, 512, 49), 16, eta=0.25, shift=0.0, guidance=3.0, group=8, prompts=32, iterations=200, prompt_file="videos", drawing_steps=30),
}
# GiB on a GPU in training, as `dancegrpo validate --memory` estimates it from the published configurations: bfloat16, without text encoders
MEMORY = {"sd15": 3, "sdxl": 10, "sd35": 5, "flux_dev": 26, "flux_kontext": 24, "flux2": 72, "qwen_image": 46, "qwen_image_edit": 45,
          "z_image": 20, "wan21": 5, "wan22": 70, "hunyuan_video": 34, "skyreels_i2v": 41, "ltx_video": 7, "ltx2": 50}
SUFFIXES = {"pictures": "txt", "videos": "txt", "edits": "jsonl", "first_frames": "jsonl"}
TITLE_BAR, GAP = 30, 30
OURS = "DanceGRPO"


class Graph:
    """A graph in the form that ComfyUI's editor saves, put together node by node, in columns."""

    def __init__(self) -> None:
        self.info = object_info(REGISTRY, nodes.NODE_DISPLAY_NAME_MAPPINGS)
        self.nodes: list[dict] = []
        self.links: list[list] = []
        self.groups: list[dict] = []
        self.x = self.y = self.width = 0

    def column(self, x: int, width: int, y: int = 140) -> None:
        """The next nodes stand below each other from here."""
        self.x, self.y, self.width = x, y, width

    def add(self, kind: str, title: str = "", links: dict[str, tuple[dict, int]] | None = None, least: int = 0, **widgets: Any) -> dict:
        """A node under the last one, `least` high at least; widgets that are not given have their defaults. links: (node, output) by input."""
        told, declared = self.info[kind], inputs_of(REGISTRY[kind].INPUT_TYPES())
        inputs, values = [], []
        node: dict[str, Any] = {"id": len(self.nodes) + 1, "type": kind, "pos": [self.x, self.y]}
        for name, item in declared.items():
            entry: dict[str, Any] = {"name": name, "type": item.type}
            if item.is_widget:
                entry["widget"] = {"name": name}
                values += [widgets.pop(name, item.options.get("default", "")), *["fixed"] * item.controls]
            elif not item.required:
                entry["shape"] = 7
            entry["link"] = None
            if links and name in links:
                source, slot = links[name]
                entry["link"] = len(self.links) + 1
                self.links.append([entry["link"], source["id"], slot, node["id"], len(inputs), source["outputs"][slot]["type"]])
                source["outputs"][slot]["links"] = [*(source["outputs"][slot]["links"] or []), entry["link"]]
            inputs.append(entry)
        if widgets:
            raise ValueError(f"{kind} has no {', '.join(widgets)}")
        sockets = max(sum("widget" not in entry for entry in inputs), len(told["output"]))
        texts = sum(bool(item.options.get("multiline")) for item in declared.values())
        high = max(least, 24 * len(values) + 20 * sockets + 80 * texts + 16)
        outputs = [{"name": name, "type": type, "links": None} for name, type in zip(told["output_name"], told["output"], strict=True)]
        pack = "comfy-dancegrpo" if kind.startswith(OURS) else "comfy-core"
        node |= {"size": [self.width, high], "flags": {}, "order": len(self.nodes), "mode": 0, "inputs": inputs, "outputs": outputs,
                 **({"title": title} if title else {}), "properties": {"Node name for S&R": kind, "cnr_id": pack}, "widgets_values": values}
        self.nodes.append(node)
        self.y += high + TITLE_BAR + GAP
        return node

    def note(self, text: str, high: int) -> None:
        self.nodes.append({
            "id": len(self.nodes) + 1, "type": "MarkdownNote", "pos": [self.x, self.y], "size": [self.width, high], "flags": {},
            "order": len(self.nodes), "mode": 0, "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text],
            "color": "#432", "bgcolor": "#653"})

    def frame(self, title: str, color: str, *around: dict) -> None:
        """A group around nodes."""
        left, top = (min(node["pos"][k] for node in around) for k in (0, 1))
        right, bottom = (max(node["pos"][k] + node["size"][k] for node in around) for k in (0, 1))
        self.groups.append({"id": len(self.groups) + 1, "title": title, "bounding": [left - 15, top - 90, right - left + 30, bottom - top + 105],
                            "color": color, "font_size": 24, "flags": {}})

    def saved(self, name: str, needs: list[str]) -> dict:
        return {"id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"dancegrpo/{name}")), "revision": 0, "last_node_id": len(self.nodes),
                "last_link_id": len(self.links), "nodes": self.nodes, "links": self.links, "groups": self.groups, "config": {},
                "extra": {"ds": {"scale": 0.5, "offset": [60, 320]}, "dancegrpo": {"needs": needs}}, "version": 0.4}


def note_of(name: str) -> str:
    family = FAMILIES[name]
    frames = family.size[2]
    folder = f"It goes into the Hugging Face cache, or as a folder into models/diffusers/{family.policy}. {family.get}".strip()
    published = "`video_align_visual`" if frames > 1 else "`hps_v2`"
    lines = [
        f"# DanceGRPO on {family.title}", family.source,
        f"**Files.** `hf download {family.policy}` and `hf download {REWARD}` (the reward). {folder}",
        *([f"**Reward.** CLIP score is the smallest to get; the published run was trained on {published}."] if DANCE[:20] in family.source else []),
        f"**Prompts.** {family.prompt_file}_train.{SUFFIXES[family.prompt_file]} and _test are small sets of ours, for a try; name your own file, "
        "of some thousand prompts, in Prompt Set.",
        f"**Time and memory.** An iteration samples {family.prompts * family.group} {'videos' if frames > 1 else 'pictures'}: published settings "
        "share these out over 8 to 32 GPUs. On one GPU, lower prompts_per_iteration first, and optimizer_steps with it. "
        f"It needs about {MEMORY[name]} GiB on it while it trains; `dancegrpo validate FILE --memory` estimates that anew for other settings.",
    ]
    return "\n\n".join(lines)


def workflow(name: str) -> dict:
    """The saved workflow of a family."""
    f, g = FAMILIES[name], Graph()
    width, height, frames = f.size
    of_model = {"guidance_scale": f.guidance, "width": width, "height": height, "frames": frames}
    g.column(40, 340)
    policy = g.add(f"{OURS}LoadPolicy", policy=f.policy, dtype="bfloat16", **f.load)
    prompts = g.add(f"{OURS}PromptSet", "Training Prompts", file=f"{f.prompt_file}_train.{SUFFIXES[f.prompt_file]}")
    reward = g.add(f"{OURS}LoadReward", reward="clip_score", model=REWARD)

    g.column(420, 320)
    start = g.add(f"{OURS}LoopStart", links={"policy": (policy, 0), "prompts": (prompts, 0)}, run_name=name, iterations=f.iterations,
                  prompts_per_iteration=f.prompts, learning_rate=3e-4, weight_decay=1e-4, lora_rank=f.rank, lora_alpha=f.alpha,
                  lora_targets="attention", ema_decay=f.ema, micro_batch=1, checkpoint_every=10, gradient_checkpointing=True)
    g.column(780, 320)
    sampled = g.add(f"{OURS}GroupSample", links={"policy": (start, 0), "prompts": (start, 1)}, group_size=f.group, steps=f.steps,
                    transition=f.transition, eta=f.eta, shift=f.shift, initial_noise=f.noise, **of_model)
    preview = g.add("PreviewImage", "This Iteration", {"images": (sampled, 1)}, 300)
    g.column(1160, 280)
    scores = g.add(f"{OURS}Score", links={"rollout": (sampled, 0), "reward": (reward, 0)})
    advantages = g.add(f"{OURS}Advantage", links={"scores": (scores, 0)}, **f.advantage)
    update = g.add(f"{OURS}Update", links={"policy": (start, 0), "advantages": (advantages, 0)}, train_fraction=f.train_fraction,
                   optimizer_steps=f.optimizer_steps)
    g.column(1500, 440)
    end = g.add(f"{OURS}LoopEnd", "", {"update": (update, 0)}, 720)
    g.frame("The loop's body runs once an iteration", "#3f789e", start, sampled, preview, scores, update, end)

    g.column(2040, 300)
    save = g.add(f"{OURS}SaveLora", links={"lora": (end, 0)})
    plot = g.add(f"{OURS}PlotMetrics", links={"run": (end, 1)})
    heldout = g.add(f"{OURS}PromptSet", "Held-out Prompts", file=f"{f.prompt_file}_test.{SUFFIXES[f.prompt_file]}")
    g.column(2400, 420)
    curve = g.add("SaveImage", "Save Reward Curve", {"images": (plot, 0)}, 320, filename_prefix="reward_curve")
    evaluated = g.add(f"{OURS}Evaluate", links={"policy": (policy, 0), "lora": (end, 0), "prompts": (heldout, 0), "reward": (reward, 0)},
                      steps=f.steps, shift=f.shift, batch_size=1, grid_columns=4, **of_model)
    g.column(2880, 480)
    last = g.add("SaveImage", "Save Before/After", {"images": (evaluated, 0)}, 360, filename_prefix="before_after")
    drawn = g.add(f"{OURS}Sample", "Sample (by the model's own pipeline)",
                  {"policy": (policy, 0), "prompts": (heldout, 0), "lora": (end, 0)}, steps=f.drawing_steps, **of_model)
    g.column(3420, 420)
    if frames > 1:
        shown = g.add(f"{OURS}SaveVideo", "", {"images": (drawn, 0)}, 360, fps=f.fps, filename_prefix="tuned")
    else:
        shown = g.add("SaveImage", "Save Tuned", {"images": (drawn, 0)}, 360, filename_prefix="tuned")
    g.frame("After training", "#8A8", save, heldout, curve, evaluated, last, drawn, shown)

    g.column(40, 1060, -260)
    g.note(note_of(name), 260)
    return g.saved(name, [f.policy, REWARD])


def text_of(name: str) -> str:
    return json.dumps(workflow(name), indent=1, ensure_ascii=False) + "\n"


def table() -> str:
    """The rows about them in docs/families.md."""
    rows = ["| workflow | model | size | steps | eta | shift | guidance | group x prompts | GiB | settings |",
            "|---|---|---|---|---|---|---|---|---|---|"]
    for name, f in FAMILIES.items():
        script = re.search(r"published script (\S+)", f.source)
        other = "Flow-GRPO" if f.source.startswith("Settings: Flow-GRPO") else "none published: see its note"
        origin = f"DanceGRPO, `{script[1]}`" if script else other
        size = "x".join(str(edge) for edge in f.size[: 3 if f.size[2] > 1 else 2])
        shift = "" if f.transition == "ddim" else f"{f.shift:g}" if f.shift else "its own"
        guidance = f"{f.guidance:g}" + "".join(f", {value:g}" for value in f.load.values())
        rows.append(f"| `{name}` | {f.policy} | {size} | {f.steps} | {f.eta:g} | {shift} | {guidance} "
                    f"| {f.group} x {f.prompts} | {MEMORY[name]} | {origin} |")
    return "\n".join(rows) + "\n"


def page_with_table(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    for family_name in FAMILIES:
        (FOLDER / f"{family_name}.json").write_text(text_of(family_name), encoding="utf-8", newline="\n")
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
