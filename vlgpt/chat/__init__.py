"""Conversations: what the terminal, the Gradio page and the HTTP API have in common."""
