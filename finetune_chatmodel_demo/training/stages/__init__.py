"""The training stages beside sft: pre-training text, reward models, preferences (DPO) and PPO."""
