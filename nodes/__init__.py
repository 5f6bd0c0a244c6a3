"""ComfyUI blocks, one file per stage. Importing them imports no torch.

`NODE_CLASS_MAPPINGS` are ours; `HOST_CLASS_MAPPINGS` stand in for the few of ComfyUI's own that training graphs contain, where
there is no ComfyUI.
"""

from . import adjust_scores, advantage, apply_policy_lora, comfy_core, evaluate, group_sample, judge_reward, load_lora, load_policy, loop, plot_metrics, prompt_set, remote_reward, rewards, sample, save_lora, save_video, update, watch

NODES = (
    load_policy.LoadPolicy, prompt_set.PromptSet, loop.LoopStart, group_sample.GroupSample, rewards.LoadReward, rewards.Score,
    rewards.ScoresFromNumbers, adjust_scores.AdjustScores, advantage.Advantage, update.Update, loop.LoopEnd, loop.LoopRunner, evaluate.Evaluate,
    plot_metrics.PlotMetrics, save_lora.SaveLora, save_video.SaveVideo, apply_policy_lora.ApplyPolicyLora, load_lora.LoadLora, sample.Sample,
    watch.Watch, remote_reward.RemoteReward, judge_reward.JudgeReward,
)
NODE_CLASS_MAPPINGS = {f"DanceGRPO{node.__name__}": node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {f"DanceGRPO{node.__name__}": node.TITLE for node in NODES}
HOST_CLASS_MAPPINGS = comfy_core.NODES
