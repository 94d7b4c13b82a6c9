"""`vlgpt doctor`: what to know before a run starts: environment, configuration, and, on GPUs, the real path."""
