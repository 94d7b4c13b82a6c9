"""What DeepSpeed wraps: a stage turns a batch into sums of losses."""
