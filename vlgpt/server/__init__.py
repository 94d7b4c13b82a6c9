"""The HTTP API: OpenAI-style chat completions with pictures (`vlgpt serve`)."""
