"""Training: one loop for all stages, DeepSpeed behind `engine`, commits that survive a kill."""
