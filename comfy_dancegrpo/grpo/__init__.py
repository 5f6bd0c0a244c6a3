"""The algorithm (DanceGRPO, arXiv 2505.07818): transitions, rollout, advantages, objective, update.

Imports no model family, no reward and no host: a policy is whatever has the methods of `protocol.Denoiser`.
"""
