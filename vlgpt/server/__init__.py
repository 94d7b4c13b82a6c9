"""The HTTP API: OpenAI-style chat completions with images (`vlgpt serve`)."""
